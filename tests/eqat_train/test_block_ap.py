"""Block-AP: what is trained is what is shipped, one block at a time, repeatably."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eqat_train.block_ap import BlockApSettings, run_block_ap
from eqat_train.block_ap import run as block_ap_run
from eqat_train.block_ap.capture import BlockCall
from eqat_train.block_ap.fake_quant_linear import FakeQuantLinear
from eqat_train.block_ap.steps import cosine
from eqat_train.block_ap.trainable_block import TrainableBlock
from eqat_train.models.decoder import is_quantizable
from eqat_train.models.loading import load_dense_model, load_tokenizer
from eqat_train.ops.fake_quant import fake_quant
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme, dequantize, round_to_nearest
from formats.checkpoint import CheckpointReader
from formats.model import open_checkpoint
from tests.eqat_train.block_ap_runs import FAST, SCHEME, Watcher, fingerprint, train_block_ap
from tests.tiny_models import ARCHITECTURES, HIDDEN_SIZE, SEQUENCE, save_tiny_model, tiny_tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_loss_of_every_block_below_round_to_nearest(architecture: str, tmp_path: Path) -> None:
    report = train_block_ap(save_tiny_model(tmp_path / "model", architecture), tmp_path)
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
    train_block_ap(save_tiny_model(tmp_path / "model", architecture, dtype=dtype), tmp_path, scale_dtype=scale_dtype)
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
    train_block_ap(source, tmp_path, zero_range=zero_range, lr_zero=0.1)
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
    train_block_ap(source, tmp_path, lr_weight=1e-2)
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
    train_block_ap(source, tmp_path)
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
        train_block_ap(source, tmp_path, out=out, activations=place)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") == fingerprint(tmp_path / "c")


def test_a_ragged_last_batch_is_trained_on(tmp_path: Path) -> None:
    steps: list[None] = []
    source = save_tiny_model(tmp_path / "model")
    train_block_ap(source, tmp_path, samples=5, batch_size=2, reporter=Watcher(lambda: steps.append(None)))
    assert len(steps) == 2 * 2 * 3  # blocks, epochs, batches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_compute_trains_too(dtype: torch.dtype, tmp_path: Path) -> None:
    report = train_block_ap(save_tiny_model(tmp_path / "model"), tmp_path, compute_dtype=dtype)
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

    train_block_ap(save_tiny_model(tmp_path / "model"), tmp_path, reporter=Watcher(count))
    block = sum(p.numel() for p in models[0].model.layers[0].parameters())
    linears = sum(m.weight.numel() for m in models[0].model.layers[0].modules() if is_quantizable(m))
    scales_and_zeros = 2 * linears // SCHEME.group_size
    assert set(real_parameters) == {block + scales_and_zeros}
    assert all(p.is_meta for p in models[0].parameters())


def test_events_and_messages_tell_what_happened(tmp_path: Path) -> None:
    watcher = Watcher()
    report = train_block_ap(save_tiny_model(tmp_path / "model"), tmp_path, reporter=watcher)
    assert re.fullmatch(r"activations in RAM: \d+\.\d\d KiB", *watcher.messages)
    assert [kind for kind, _ in watcher.events] == ["block", "block"]
    assert [fields["index"] for _, fields in watcher.events] == [0, 1]
    assert watcher.events[1][1]["val_loss"] == report.blocks[1].val_losses[-1]
    assert json.dumps(watcher.events)
    assert report.peak_memory > 0 and report.seconds > 0


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
    train_block_ap(save_tiny_model(tmp_path / "model"), tmp_path, **{frozen: 0.0})
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
