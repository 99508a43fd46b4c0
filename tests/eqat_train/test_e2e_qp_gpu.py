"""E2E-QP on a GPU: kernels and a loop that does not wait give what plain torch on the CPU gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_train.data import TokenWindows
from eqat_train.e2e_qp import E2eReport, E2eSettings, run_e2e_qp
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.errors import TrainingDivergedError
from tests.tiny_checkpoints import quantize_folder, raw_tensors
from tests.tiny_models import save_tiny_model, tiny_tokens

pytestmark = pytest.mark.gpu
DATA = TokenWindows.from_ids(tiny_tokens(32))
SETTINGS = E2eSettings(batch_size=8, micro_batch_size=4, lr=2e-3, compute_dtype=torch.float32, device="cuda")


class Listener(Reporter):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


def run(
    start: Path, out: Path, settings: E2eSettings, reporter: Reporter | None = None, val: TokenWindows | None = None
) -> E2eReport:
    work = out.with_name(f"{out.name}.work")
    return run_e2e_qp(start, DATA, settings, out, val=val, work_dir=work, reporter=reporter or Reporter())


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return quantize_folder(save_tiny_model(tmp_path / "fp"), tmp_path / "start", QuantScheme(2, 32))


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_losses_are_those_of_the_cpu(start: Path, tmp_path: Path, checkpointing: bool | None) -> None:
    listener = Listener()
    settings = replace(SETTINGS, gradient_checkpointing=checkpointing)
    ours = run(start, tmp_path / "gpu", settings, listener, val=DATA)
    theirs = run(start, tmp_path / "cpu", replace(settings, device="cpu"), val=DATA)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=1e-3)
    assert ours.val_loss_after == pytest.approx(theirs.val_loss_after, rel=1e-4)
    assert [fields["step"] for kind, fields in listener.events if kind == "e2e_step"] == [1, 2, 3, 4]
    assert set(ours.memory) == {"packed_weights", "scales", "training", "dense"}
    assert 0 < sum(ours.memory.values()) < ours.peak_memory
    names = {name for name, (kind, _, _) in raw_tensors(tmp_path / "gpu").items() if name.endswith(".qweight")}
    before, after = raw_tensors(start), raw_tensors(tmp_path / "gpu")
    assert names and all(before[name] == after[name] for name in names)


def test_a_small_budget_takes_smaller_micro_batches_and_gives_the_same_losses(start: Path, tmp_path: Path) -> None:
    whole = run(start, tmp_path / "whole", replace(SETTINGS, micro_batch_size=None))
    small = run(start, tmp_path / "small", replace(SETTINGS, micro_batch_size=None, activation_budget=2**18))
    assert small.losses == pytest.approx(whole.losses, rel=1e-4)


def test_a_diverging_run_names_its_step_and_writes_nothing(start: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"step 2 of 4, lr .* starting checkpoint is unchanged"):
        run(start, tmp_path / "out", replace(SETTINGS, lr=1e30))
    assert not (tmp_path / "out").exists()


def test_bfloat16_on_real_group_sizes_learns(tmp_path: Path) -> None:
    start = quantize_folder(save_tiny_model(tmp_path / "fp", "qwen2"), tmp_path / "start", QuantScheme(3, 64))
    settings = replace(SETTINGS, compute_dtype=torch.bfloat16, epochs=3)
    report = run(start, tmp_path / "out", settings)
    assert report.losses[-1] < report.losses[0]
