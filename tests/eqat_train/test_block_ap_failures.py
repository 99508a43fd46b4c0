"""Block-AP that diverges, is interrupted or is asked for what cannot be: what it says and what it leaves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqat_train.block_ap import BlockApSettings, run_block_ap
from eqat_train.block_ap import run as block_ap_run
from eqat_train.block_ap import steps as block_steps
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.errors import (
    CheckpointError,
    EqatError,
    InputError,
    OutputExistsError,
    TrainingDivergedError,
    UnsupportedSchemeError,
)
from tests.eqat_train.block_ap_runs import SCHEME, Watcher, train_block_ap
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokens


def test_a_diverged_loss_names_block_step_and_rates_and_keeps_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny_model(tmp_path / "model")
    with pytest.raises(TrainingDivergedError, match=r"block 0 .*step \d+ .*weight 1e\+30, .*no block was finished"):
        train_block_ap(source, tmp_path, lr_weight=1e30, lr_scale=1e30, lr_zero=1e30)
    assert not (tmp_path / "out").exists()

    train_block = block_ap_run.train_block

    def diverge_in_the_second(block: Any, call: Any, *rest: Any) -> Any:
        if (tmp_path / "work" / "blocks" / "000.safetensors").exists():
            raise TrainingDivergedError("loss became nan")
        return train_block(block, call, *rest)

    monkeypatch.setattr(block_ap_run, "train_block", diverge_in_the_second)
    with pytest.raises(TrainingDivergedError, match=r"block 1 .*1 finished block is kept in .*blocks") as caught:
        train_block_ap(source, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    kept = load_file(tmp_path / "work" / "blocks" / "000.safetensors")
    assert "model.layers.0.self_attn.q_proj.qweight" in kept


def test_parameters_that_diverge_in_the_last_step_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer_of = block_steps._optimizer

    def spoiled(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = optimizer_of(*arguments)
        parameter = optimizer.param_groups[-1]["params"][0]
        optimizer.register_step_post_hook(lambda *_: parameter.data.fill_(torch.nan))
        return optimizer

    monkeypatch.setattr(block_steps, "_optimizer", spoiled)
    with pytest.raises(TrainingDivergedError, match="end of the last epoch"):
        run_block_ap(
            save_tiny_model(tmp_path / "model"),
            tiny_tokens(1),
            tiny_tokens(0),
            BlockApSettings(SCHEME, epochs=1, device="cpu"),
            tmp_path / "out",
            work_dir=tmp_path / "work",
            reporter=Reporter(),
        )


def test_an_interrupted_run_leaves_no_output_and_no_activations(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    source = save_tiny_model(tmp_path / "model")
    with pytest.raises(KeyboardInterrupt):
        train_block_ap(source, tmp_path, activations="disk", reporter=Watcher(interrupt))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "work"}
    assert not list((tmp_path / "work").iterdir())
    train_block_ap(source, tmp_path)  # what an earlier run left there is no obstacle


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scheme": QuantScheme(2, 48)},
            UnsupportedSchemeError,
            r"group_size 48 does not divide in_features 64 of model\.layers\.0\.self_attn\.q_proj; "
            r"use 16, 32, 64 or -1",
        ),
        ({"scheme": QuantScheme(2, 32, sym=True)}, UnsupportedSchemeError, "cannot be trained, use w2g32"),
        ({"activations": "gpu"}, InputError, "need a CUDA device"),
        ({"epochs": -1}, InputError, "epochs is -1"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
        ({"lr_scale": float("nan")}, InputError, "lr_scale is nan"),
        ({"lr_weight": 0.0, "lr_scale": 0.0, "lr_zero": 0.0}, InputError, "every learning rate is 0"),
        ({"min_lr_factor": 0.5}, InputError, "min_lr_factor is 0.5"),
        ({"zero_range": (2, 1)}, InputError, r"zeros-in is 2,1; at 2 bits both lie in 0\.\.3"),
        ({"zero_range": (1, 4)}, InputError, "zeros-in is 1,4"),
        ({"compute_dtype": torch.float64}, InputError, "compute_dtype is torch.float64"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    options: dict[str, Any], error: type[EqatError], message: str, tmp_path: Path
) -> None:
    source = save_tiny_model(tmp_path / "model")
    with pytest.raises(error, match=message):
        train_block_ap(source, tmp_path, **options)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("work/*/*"))


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (tiny_tokens(2) + VOCABULARY, tiny_tokens(2), "train tokens span .* the model's vocabulary is 0..256"),
        (tiny_tokens(2), tiny_tokens(2, 7), "val samples have 7 tokens and train samples 24"),
        (tiny_tokens(0), tiny_tokens(2), "there are no training samples"),
        (tiny_tokens(2).int(), tiny_tokens(2), r"train tokens are torch.int32 \[2, 24\]; expected int64"),
        (tiny_tokens(2), tiny_tokens(2)[0], r"val tokens are torch.int64 \[24\]; expected int64 \[samples, seq\]"),
    ],
)
def test_unusable_tokens_are_refused(train: torch.Tensor, val: torch.Tensor, message: str, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    settings = BlockApSettings(SCHEME, device="cpu")
    with pytest.raises(InputError, match=message):
        run_block_ap(source, train, val, settings, tmp_path / "out", work_dir=tmp_path / "w", reporter=Reporter())
    assert not (tmp_path / "out").exists() and not (tmp_path / "w").exists()


def test_an_existing_output_and_a_quantized_model_are_refused_before_training(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    steps: list[None] = []
    train_block_ap(source, tmp_path)
    shutil.rmtree(tmp_path / "work")  # a run that is not finished would go on
    watcher = Watcher(lambda: steps.append(None))
    with pytest.raises(OutputExistsError):
        train_block_ap(source, tmp_path, reporter=watcher)
    with pytest.raises(InputError, match=r"already quantized \(eqat\)"):
        train_block_ap(tmp_path / "out", tmp_path, out="again", reporter=watcher)
    assert not steps


def test_a_block_tensor_that_the_checkpoint_lacks_is_named_before_training(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        train_block_ap(source, tmp_path)
