"""Block-AP on CUDA: every place of the activations, every compute dtype, no waiting for the device in the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eqat_train.block_ap import BlockApReport, BlockApSettings, run_block_ap
from eqat_train.block_ap import trainer as block_trainer
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from tests.tiny_models import save_tiny_model, tiny_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def _train(model: Path, out: Path, **options: object) -> BlockApReport:
    settings = BlockApSettings(QuantScheme(2, 32), lr_weight=1e-3, lr_scale=1e-3, device="cuda", **options)
    work = out.with_suffix(".work")
    return run_block_ap(model, tiny_tokens(16), tiny_tokens(5), settings, out, work_dir=work, reporter=Reporter())


def test_every_place_gives_the_same_bytes(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    for place in ("gpu", "ram", "disk"):
        assert _train(model, tmp_path / place, activations=place).activations == place
    files = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("gpu", "ram", "disk")]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_compute_dtype_lowers_the_loss(dtype: torch.dtype, tmp_path: Path) -> None:
    report = _train(save_tiny_model(tmp_path / "model"), tmp_path / "out", compute_dtype=dtype)
    assert all(block.val_losses[-1] < block.start_val_loss for block in report.blocks)


def test_the_training_step_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = block_trainer._Losses.record

    def checked(losses: object, step: int, loss: torch.Tensor) -> None:
        torch.cuda.set_sync_debug_mode("default")  # looking at losses now and then is allowed
        record(losses, step, loss)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(block_trainer._Losses, "record", checked)
    validate = block_trainer.validate

    def relaxed(*arguments: object) -> float | None:
        torch.cuda.set_sync_debug_mode("default")
        return validate(*arguments)

    monkeypatch.setattr(block_trainer, "validate", relaxed)
    try:
        _train(save_tiny_model(tmp_path / "model"), tmp_path / "out", epochs=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
