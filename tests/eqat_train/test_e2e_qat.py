"""E2E-QAT: what is trained is what is shipped, a stopped run goes on to the same bytes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from eqat_train.config import build_config, read_recipe, recipes
from eqat_train.data import TokenWindows
from eqat_train.e2e_qat import QatReport, QatSettings, check_e2e_qat, run_e2e_qat
from eqat_train.e2e_qat import trainer as qat_trainer
from eqat_train.e2e_qat.memory import check_memory
from eqat_train.models.loading import load_dense_model
from eqat_train.options import TrainConfig
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.checkpoint import CheckpointReader
from formats.errors import InputError, TrainingDivergedError, UnsupportedSchemeError
from formats.model import open_checkpoint
from tests.eqat_train.block_ap_runs import Watcher, fingerprint, train_block_ap
from tests.tiny_models import save_tiny_model, tiny_tokens

SETTINGS = QatSettings(QuantScheme(2, 32), epochs=2, batch_size=4, lr_weight=1e-3, device="cpu")


def run(model: Path, root: Path, settings: QatSettings = SETTINGS, **options: Any) -> QatReport:
    return run_e2e_qat(
        model,
        TokenWindows.from_ids(tiny_tokens(16)),
        settings,
        root / "out",
        val=TokenWindows.from_ids(tiny_tokens(4, seed=1)),
        work_dir=root / "work",
        reporter=options.pop("reporter", Reporter()),
        **options,
    )


def divergence(model: Path, checkpoint: Path) -> float:
    """Mean KL(full precision || quantized) on other tokens, in float64."""
    ids = tiny_tokens(6, seed=5)
    with torch.no_grad():
        wanted, found = (
            load_dense_model(folder, torch.float64)(input_ids=ids, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
            for folder in (model, checkpoint)
        )
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "olmoe"])
def test_it_comes_nearer_to_the_model_than_rounding(architecture: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", architecture, dtype=torch.bfloat16)
    train_block_ap(model, tmp_path / "rounded", epochs=0)
    # so little data says little of the activations
    report = run(model, tmp_path, replace(SETTINGS, epochs=8, start="mse"))
    assert report.losses[-1] < report.losses[0] and 0 < report.codes_changed < 0.5
    assert divergence(model, tmp_path / "out") < 0.8 * divergence(model, tmp_path / "rounded" / "out")
    with CheckpointReader(model) as before, open_checkpoint(tmp_path / "out") as after:
        assert set(after.passthrough_names) | {f"{name}.weight" for name in after.layer_names} >= set(
            name for name in before.tensors if not name.endswith(".bias")
        )
        for name in after.passthrough_names:
            old, new = before.get(name), after.get(name)
            assert old.dtype == new.dtype
            assert torch.equal(old, new) == (old.dim() > 1), name  # norms and biases are trained, matrices are not


def test_the_stored_model_is_the_trained_one(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "qwen2")
    watched = Watcher()
    report = run(model, tmp_path, reporter=watched)
    ids = tiny_tokens(4, seed=1)
    with torch.no_grad():
        logits = load_dense_model(tmp_path / "out", torch.float32)(input_ids=ids, use_cache=False).logits
    stored = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert report.val_loss_after == pytest.approx(stored, rel=1e-5)
    assert [kind for kind, _ in watched.events].count("qat_step") == len(report.losses) == 8


def test_a_head_that_is_quantized_and_next_tokens_are_trained_too(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    settings = replace(SETTINGS, overrides={"lm_head": "w4g32", "*.0.*": "skip"}, distill=0.0)
    report = run(model, tmp_path, settings)
    assert report.losses[-1] < report.losses[0]
    with open_checkpoint(tmp_path / "out") as found:
        assert found.layer("lm_head").scheme == QuantScheme(4, 32)
        assert len(found.layer_names) == 8 and not any(".0." in name for name in found.layer_names)


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model", "olmoe")  # with experts that see nothing in some steps
    run(model, tmp_path / "whole")
    monkeypatch.setattr(qat_trainer, "SAVE_SECONDS", 0)
    steps = 0

    def interrupt() -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, reporter=Watcher(interrupt))
    assert not (tmp_path / "out").exists()
    watched = Watcher()
    report = run(model, tmp_path, reporter=watched)
    assert any("going on with an unfinished E2E-QAT: 3 of 8" in text for text in watched.messages), watched.messages
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "whole" / "out") and len(report.losses) == 8
    with pytest.raises(InputError, match="lr_weight"):
        (tmp_path / "again").mkdir()
        run(model, tmp_path / "whole2")
        monkeypatch.setattr(qat_trainer, "SAVE_SECONDS", 0)
        with pytest.raises(KeyboardInterrupt):
            steps = 0
            run(model, tmp_path / "again", reporter=Watcher(interrupt))
        run(model, tmp_path / "again", replace(SETTINGS, lr_weight=2e-3))


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    with pytest.raises(UnsupportedSchemeError, match="does not divide in_features"):
        check_e2e_qat(model, replace(SETTINGS, scheme=QuantScheme(2, 48)))
    train_block_ap(model, tmp_path, epochs=0)
    with pytest.raises(InputError, match="already quantized"):
        check_e2e_qat(tmp_path / "out", SETTINGS)
    with pytest.raises(TrainingDivergedError, match="nothing was written"):
        run(model, tmp_path / "diverged", replace(SETTINGS, lr_norm=1e30))
    assert not (tmp_path / "diverged" / "out").exists()
    check_memory(10**12, 10**12, SETTINGS)  # a CPU pages


@pytest.mark.parametrize(
    ("name", "value"), [("lr_norm", -1.0), ("distill", 1.5), ("batch_size", 0), ("start", "zero"), ("max_grad_norm", 0)]
)
def test_settings_outside_their_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        replace(SETTINGS, **{name: value})


def test_recipes_are_settings_and_the_command_line_comes_after(tmp_path: Path) -> None:
    assert {"best", "paper"} <= set(recipes())
    assert build_config({"model": "m"}, recipe="paper") == TrainConfig(model="m")  # the defaults are the paper's
    best = build_config({"model": "m", "lr_zero": 0.5}, recipe="best")
    assert best.stage == "e2e-qat" and best.lr_zero == 0.5 and best.lr_norm == read_recipe("best")["lr_norm"]
    with pytest.raises(InputError, match="--recipe is 'worst'; allowed are best"):
        build_config({"model": "m"}, recipe="worst")


def test_zero_points_stay_in_the_range_of_the_narrowest_layer() -> None:
    four = replace(SETTINGS, scheme=QuantScheme(4, 32), zero_range=(1, 9))
    with pytest.raises(InputError, match=r"at 2 bits both lie in 0\.\.3"):
        replace(four, overrides={"*.q_proj": "w2"})
