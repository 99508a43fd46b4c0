"""Block-AP: what is trained is what is shipped, one block at a time, repeatably."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eqat_train.block_ap import BlockApReport, BlockApSettings, run_block_ap
from eqat_train.block_ap import run as block_ap_run
from eqat_train.block_ap import steps as block_steps
from eqat_train.block_ap.capture import BlockCall
from eqat_train.block_ap.fake_quant_linear import FakeQuantLinear
from eqat_train.block_ap.steps import cosine
from eqat_train.block_ap.trainable_block import TrainableBlock
from eqat_train.models.decoder import is_quantizable
from eqat_train.models.loading import load_dense_model, load_tokenizer
from eqat_train.ops.fake_quant import fake_quant
from eqat_train.reporting.progress import Reporter, Task
from formats import QuantScheme, dequantize, round_to_nearest
from formats.checkpoint import CheckpointReader
from formats.errors import (
    CheckpointError,
    EqatError,
    InputError,
    OutputExistsError,
    TrainingDivergedError,
    UnsupportedSchemeError,
)
from formats.model import open_checkpoint
from tests.tiny_models import ARCHITECTURES, HIDDEN_SIZE, SEQUENCE, VOCABULARY, save_tiny_model, tiny_tokens

SCHEME = QuantScheme(2, 32)
# Random tiny models need larger steps than the paper's rates to move in sixteen of them.
FAST = {"lr_weight": 1e-3, "lr_scale": 1e-3, "lr_zero": 1e-2, "device": "cpu"}


class _Watcher(Reporter):
    """Calls a function at every step, and keeps the events."""

    def __init__(self, at_step: Callable[[], None] = lambda: None) -> None:
        self.at_step, self.events = at_step, []
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def task(self, title: str, total: int) -> Task:
        watcher = self

        class Watching(Task):
            def update(self, advance: int = 1, **metrics: float) -> None:
                watcher.at_step()

        return Watching()


def _train(
    model: Path,
    root: Path,
    *,
    scheme: QuantScheme = SCHEME,
    reporter: Reporter | None = None,
    out: str = "out",
    samples: int = 16,
    **options: Any,
) -> BlockApReport:
    settings = BlockApSettings(scheme, **{**FAST, **options})
    return run_block_ap(
        model,
        tiny_tokens(samples),
        tiny_tokens(5, seed=1),
        settings,
        root / out,
        work_dir=root / "work",
        reporter=reporter or Reporter(),
    )


def _fingerprint(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_loss_of_every_block_below_round_to_nearest(architecture: str, tmp_path: Path) -> None:
    report = _train(save_tiny_model(tmp_path / "model", architecture), tmp_path)
    assert len(report.blocks) == 2
    for block in report.blocks:
        assert len(block.train_losses) == len(block.val_losses) == 2
        assert block.train_losses[1] < block.train_losses[0]
        assert block.val_losses[1] < block.start_val_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stored_blocks_forward_is_bit_for_bit_the_trained_fake_quant_forward(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(2, SEQUENCE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))
    calls: list[BlockCall] = []
    trained: list[torch.Tensor] = []
    validate, finish = block_ap_run.validate, TrainableBlock.finish_

    def remember_call(block: TrainableBlock, call: BlockCall, *rest: Any) -> Any:
        calls.append(call)
        return validate(block, call, *rest)

    def forward_and_finish(block: TrainableBlock) -> Any:
        with torch.no_grad():
            trained.append(block(calls[-1], hidden))
        return finish(block)

    monkeypatch.setattr(block_ap_run, "validate", remember_call)
    monkeypatch.setattr(TrainableBlock, "finish_", forward_and_finish)
    scale_dtype = torch.float32 if architecture == "qwen2" else torch.float16
    _train(save_tiny_model(tmp_path / "model", architecture, dtype=dtype), tmp_path, scale_dtype=scale_dtype)
    stored = load_dense_model(tmp_path / "out")
    assert len(trained) == 2
    for layer, call, expected in zip(stored.model.layers, calls, trained, strict=True):
        with torch.no_grad():
            assert torch.equal(call.run(layer, hidden), expected)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, -1), (8, 16)])
def test_the_packed_layer_is_the_trained_one(bits: int, group_size: int) -> None:
    scheme = QuantScheme(bits, group_size)
    torch.manual_seed(bits)
    layer = FakeQuantLinear(nn.Linear(64, 8), scheme, torch.float16)
    with torch.no_grad():  # anywhere training might take them, beyond the ranges too
        layer.weight.add_(torch.randn_like(layer.weight) * 0.1)
        layer.scales.mul_(torch.rand_like(layer.scales) * 3 - 1)
        layer.zeros.add_(torch.randn_like(layer.zeros) * 2**bits)
    weight = fake_quant(layer.weight, layer.scales, layer.zeros, bits, group_size, torch.float16)
    assert torch.equal(dequantize(layer.quantized()), weight)


@pytest.mark.parametrize("zero_range", [(1, 2), (0, 1), (3, 3)])
def test_zeros_held_in_a_range_are_trained_and_packed_alike(zero_range: tuple[int, int], tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    _train(source, tmp_path, zero_range=zero_range, lr_zero=0.1)
    with open_checkpoint(tmp_path / "out") as found:
        zeros = torch.cat([found.layer(name).zeros.flatten() for name in found.layer_names])
    assert sorted(set(zeros.tolist())) == list(range(zero_range[0], zero_range[1] + 1))


def test_a_held_zero_moves_back_inside_and_the_packed_layer_is_the_trained_one() -> None:
    torch.manual_seed(0)
    layer = FakeQuantLinear(nn.Linear(64, 8), SCHEME, torch.float16, zero_range=(1, 2))
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight) * 0.1)
        layer.zeros.add_(torch.randn_like(layer.zeros) * 4)
    inputs = torch.eye(64)
    weight = layer(inputs).T - layer.bias[:, None]
    packed = layer.quantized()
    assert set(packed.zeros.unique().tolist()) == {1, 2}
    torch.testing.assert_close(dequantize(packed), weight.detach(), rtol=0, atol=1e-6)
    weight.square().sum().backward()
    outside = (layer.zeros < 0.5) | (layer.zeros > 2.5)
    assert bool(layer.zeros.grad[outside].abs().gt(0).any())


def test_everything_in_a_block_is_trained_and_nothing_else_changes(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", "qwen2", dtype=torch.bfloat16)
    _train(source, tmp_path, lr_weight=1e-2)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    packed = {"qweight", "qzeros", "scales", "g_idx"}
    assert {name for name in after if name.rpartition(".")[2] not in packed} == {
        name for name in before if not (name.startswith("model.layers.") and "proj.weight" in name)
    }
    for name, tensor in after.items():
        if name in before:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, before[name]) != name.startswith("model.layers."), name


def test_zero_epochs_is_round_to_nearest(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", "qwen2", dtype=torch.bfloat16)
    settings = BlockApSettings(QuantScheme(3, 32), epochs=0, scale_dtype=torch.bfloat16, device="cpu")
    empty = torch.empty(0, 0, dtype=torch.int64)
    report = run_block_ap(
        source, empty, empty, settings, tmp_path / "out", work_dir=tmp_path / "work", reporter=Reporter()
    )
    assert report.activations is None and report.blocks[0].train_losses == ()
    with open_checkpoint(tmp_path / "out") as quantized, CheckpointReader(source) as reader:
        assert len(quantized.layer_names) == 14
        for name in quantized.layer_names:
            expected = round_to_nearest(reader.get(f"{name}.weight"), settings.scheme, torch.bfloat16)
            layer = quantized.layer(name)
            assert torch.equal(layer.codes, expected.codes)
            assert torch.equal(layer.zeros, expected.zeros)
            assert torch.equal(layer.scales, expected.scales)
            if layer.bias is not None:
                assert torch.equal(layer.bias, reader.get(f"{name}.bias"))
        for name in quantized.passthrough_names:
            assert torch.equal(quantized.get(name), reader.get(name))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_output_is_a_complete_checkpoint(architecture: str, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", architecture)
    _train(source, tmp_path)
    out = tmp_path / "out"
    assert load_tokenizer(out)("a").input_ids == load_tokenizer(source)("a").input_ids
    assert json.loads((out / "generation_config.json").read_text())
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.scheme == SCHEME
        assert checkpoint.reader.config["model_type"] == architecture
        assert checkpoint.reader.quantization_config["modules_to_not_convert"] == ["lm_head"]
        assert ("lm_head.weight" in checkpoint.reader.tensors) == (architecture == "llama")
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["block-ap.written.json"]


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    for out, shard_size in (("one", 2**30), ("many", 30_000)):
        run_block_ap(
            source,
            tiny_tokens(2),
            tiny_tokens(0),
            BlockApSettings(SCHEME, **FAST),
            tmp_path / out,
            work_dir=tmp_path / "work",
            reporter=Reporter(),
            shard_size=shard_size,
        )
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    with CheckpointReader(tmp_path / "one") as one, CheckpointReader(tmp_path / "many") as many:
        assert set(one.tensors) == set(many.tensors)
        assert all(torch.equal(one.get(name), many.get(name)) for name in one.tensors)


def test_training_is_repeatable_byte_for_byte_and_does_not_depend_on_the_place(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model", "smollm3")
    for out, place in (("a", "ram"), ("b", "ram"), ("c", "disk")):
        _train(source, tmp_path, out=out, activations=place)
    assert _fingerprint(tmp_path / "a") == _fingerprint(tmp_path / "b") == _fingerprint(tmp_path / "c")


def test_a_ragged_last_batch_is_trained_on(tmp_path: Path) -> None:
    steps: list[None] = []
    source = save_tiny_model(tmp_path / "model")
    _train(source, tmp_path, samples=5, batch_size=2, reporter=_Watcher(lambda: steps.append(None)))
    assert len(steps) == 2 * 2 * 3  # blocks, epochs, batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_compute_trains_too(dtype: torch.dtype, tmp_path: Path) -> None:
    report = _train(save_tiny_model(tmp_path / "model"), tmp_path, compute_dtype=dtype)
    assert all(block.val_losses[-1] < block.start_val_loss for block in report.blocks)


def test_only_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[nn.Module] = []
    real_parameters: list[int] = []
    build = block_ap_run.build_skeleton
    monkeypatch.setattr(
        block_ap_run, "build_skeleton", lambda *args, **options: models.append(build(*args, **options)) or models[0]
    )

    def count() -> None:
        real_parameters.append(sum(p.numel() for p in models[0].parameters() if not p.is_meta))

    _train(save_tiny_model(tmp_path / "model"), tmp_path, reporter=_Watcher(count))
    block = sum(p.numel() for p in models[0].model.layers[0].parameters())
    linears = sum(m.weight.numel() for m in models[0].model.layers[0].modules() if is_quantizable(m))
    scales_and_zeros = 2 * linears // SCHEME.group_size
    assert set(real_parameters) == {block + scales_and_zeros}
    assert all(p.is_meta for p in models[0].parameters())


def test_events_and_messages_tell_what_happened(tmp_path: Path) -> None:
    watcher = _Watcher()
    report = _train(save_tiny_model(tmp_path / "model"), tmp_path, reporter=watcher)
    assert re.fullmatch(r"activations in RAM: \d+\.\d\d KiB", *watcher.messages)
    assert [kind for kind, _ in watcher.events] == ["block", "block"]
    assert [fields["index"] for _, fields in watcher.events] == [0, 1]
    assert watcher.events[1][1]["val_loss"] == report.blocks[1].val_losses[-1]
    assert json.dumps(watcher.events)
    assert report.peak_memory > 0 and report.seconds > 0


def test_a_diverged_loss_names_block_step_and_rates_and_keeps_finished_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny_model(tmp_path / "model")
    with pytest.raises(TrainingDivergedError, match=r"block 0 .*step \d+ .*weight 1e\+30, .*no block was finished"):
        _train(source, tmp_path, lr_weight=1e30, lr_scale=1e30, lr_zero=1e30)
    assert not (tmp_path / "out").exists()

    train_block = block_ap_run.train_block

    def diverge_in_the_second(block: Any, call: Any, *rest: Any) -> Any:
        if (tmp_path / "work" / "blocks" / "000.safetensors").exists():
            raise TrainingDivergedError("loss became nan")
        return train_block(block, call, *rest)

    monkeypatch.setattr(block_ap_run, "train_block", diverge_in_the_second)
    with pytest.raises(TrainingDivergedError, match=r"block 1 .*1 finished block is kept in .*blocks") as caught:
        _train(source, tmp_path)
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
        _train(source, tmp_path, activations="disk", reporter=_Watcher(interrupt))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "work"}
    assert not list((tmp_path / "work").iterdir())
    _train(source, tmp_path)  # what an earlier run left there is no obstacle


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
        _train(source, tmp_path, **options)
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
    _train(source, tmp_path)
    shutil.rmtree(tmp_path / "work")  # a run that is not finished would go on
    watcher = _Watcher(lambda: steps.append(None))
    with pytest.raises(OutputExistsError):
        _train(source, tmp_path, reporter=watcher)
    with pytest.raises(InputError, match=r"already quantized \(eqat\)"):
        _train(tmp_path / "out", tmp_path, out="again", reporter=watcher)
    assert not steps


def test_a_block_tensor_that_the_checkpoint_lacks_is_named_before_training(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        _train(source, tmp_path)


@pytest.mark.parametrize("frozen", ["lr_weight", "lr_scale", "lr_zero"])
def test_a_learning_rate_of_zero_freezes_its_parameters(
    frozen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[list[torch.Tensor]] = []
    after: list[list[torch.Tensor]] = []
    finish = TrainableBlock.finish_

    def values(block: TrainableBlock) -> list[torch.Tensor]:
        part = {"lr_weight": block.weights, "lr_scale": block.scales, "lr_zero": block.zeros}[frozen]
        return [parameter.detach().clone() for parameter in part()]

    train_block = block_ap_run.train_block
    monkeypatch.setattr(
        block_ap_run, "train_block", lambda block, *rest: before.append(values(block)) or train_block(block, *rest)
    )
    monkeypatch.setattr(TrainableBlock, "finish_", lambda block: after.append(values(block)) or finish(block))
    _train(save_tiny_model(tmp_path / "model"), tmp_path, **{frozen: 0.0})
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_the_schedule_is_torchs_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.3 / 20)
    for step in range(8):
        assert cosine(step, 7, 0.3, 20) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_subclasses_of_linear_with_a_forward_of_their_own_are_not_quantized() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    class Same(nn.Linear):
        pass

    assert is_quantizable(nn.Linear(2, 2)) and is_quantizable(Same(2, 2)) and not is_quantizable(Own(2, 2))
