"""E2E-QAT: end-to-end quantization-aware training of a whole model."""

from .run import QatReport, QatSettings, check_e2e_qat, run_e2e_qat

__all__ = ["QatReport", "QatSettings", "check_e2e_qat", "run_e2e_qat"]
