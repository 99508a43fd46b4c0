"""E2E-QP: the scales of a packed model, trained end to end by next-token loss."""

from .run import run_e2e_qp
from .settings import E2eReport, E2eSettings

__all__ = ["E2eReport", "E2eSettings", "run_e2e_qp"]
