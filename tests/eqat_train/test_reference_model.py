"""A short run of the whole recipe on a real model: far below the full budget, and still far better than rounding."""

import math
from pathlib import Path

import pytest

from eqat_train.config import build_config
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter

# Shares of round-to-nearest's loss gap to full precision, in nats, that must be closed. Measured: see docs/results.md.
BLOCK_AP_CLOSES, E2E_QP_CLOSES = 0.25, 0.4


@pytest.mark.slow
def test_a_short_run_closes_much_of_the_gap_that_rounding_opens(
    shared_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = shared_root / "data"
    settings = {
        "model": str(shared_root / "models" / "ref-28m"), "data": str(data / "calibration.txt.xz"),
        "eval_data": str(data / "heldout.txt.xz"), "eval_tokens": 8192, "sample_tokens": 0, "val_samples": 4,
        "samples": 32, "seq_len": 128, "batch": 2, "epochs": 1, "lr_weight": 3e-4, "lr_scale": 1e-3,
        "e2e_samples": 96, "e2e_seq_len": 128, "e2e_batch": 8, "lr_e2e": 1e-3,
    }  # fmt: skip
    result = train(build_config(settings), Reporter())
    full, rounded, block_ap, e2e_qp = (math.log(row.perplexity or math.nan) for row in result.results)
    print(full, rounded, block_ap, e2e_qp)
    assert (rounded - block_ap) / (rounded - full) > BLOCK_AP_CLOSES
    assert (rounded - e2e_qp) / (rounded - full) > E2E_QP_CLOSES
    assert e2e_qp < block_ap
