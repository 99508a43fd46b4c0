"""Mixtures of experts: taken apart, trained an expert at a time, and written under the names of their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import MIXTURES, SEQUENCE, save_tiny_model, tiny_config, tiny_tokens
from torch import nn
from transformers import AutoModelForCausalLM

from eqat_train.block_ap import BlockApSettings, check_block_ap, run_block_ap
from eqat_train.block_ap import run as block_ap_run
from eqat_train.block_ap.capture import BlockCall
from eqat_train.block_ap.steps import AutogradSteps, FusedSteps, block_steps
from eqat_train.block_ap.trainable_block import TrainableBlock
from eqat_train.config import TrainConfig
from eqat_train.e2e_qp.packed_model import load_packed_model
from eqat_train.models.decoder import find_decoder_layers
from eqat_train.models.experts import Experts, check_experts, count_tokens, features_per_token
from eqat_train.models.loading import build_skeleton, load_dense_model
from eqat_train.pipeline.train import train
from eqat_train.reporting.event_text import describe_event
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme, dequantize, round_to_nearest
from formats.checkpoint import CheckpointReader
from formats.errors import InputError
from formats.model import open_checkpoint

SCHEME = QuantScheme(2, 32)
FAST = {"lr_weight": 1e-3, "lr_scale": 1e-3, "lr_zero": 1e-2, "device": "cpu"}
EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1",
    "qwen2_moe": "model.layers.1.mlp.experts.2.gate_proj",
    "qwen3_moe": "model.layers.1.mlp.experts.2.gate_proj",
    "olmoe": "model.layers.1.mlp.experts.2.gate_proj",
}
KEPT = {
    "mixtral": {"model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate"},
    "qwen2_moe": {"model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate"},
    "qwen3_moe": {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"},
    "olmoe": {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate"},
}
LAYERS = {"mixtral": 32, "qwen2_moe": 26, "qwen3_moe": 32, "olmoe": 32}


class _Events(Reporter):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Full-precision tiny mixtures by architecture, each made once."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture) / "model", architecture)
        return made[architecture]

    return make


def trained(model: Path, root: Path, reporter: Reporter | None = None, samples: int = 16, **options: Any) -> Path:
    settings = BlockApSettings(SCHEME, **{**FAST, "min_expert_tokens": 1, **options})
    run_block_ap(
        model,
        tiny_tokens(samples),
        tiny_tokens(4, seed=1),
        settings,
        root / "out",
        work_dir=root / "work",
        reporter=reporter or Reporter(),
    )
    return root / "out"


@torch.no_grad()
def in_transformers(checkpoint: Path, architecture: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' own model, its fused parameters filled by hand with the dequantized weights."""
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32).eval()
    gate, up, down = ("w1", "w3", "w2") if architecture == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    with open_checkpoint(checkpoint) as source:
        dense = {f"{name}.weight": dequantize(source.layer(name)) for name in source.layer_names}
        dense |= {f"{name}.bias": source.layer(name).bias for name in source.layer_names}
        dense |= {name: source.get(name) for name in source.passthrough_names}
    for name, parameter in model.named_parameters():
        stored = name.replace(".mlp.", ".block_sparse_moe.") if architecture == "mixtral" else name
        outer, fused, last = stored.partition(".experts.")
        if fused and last == "gate_up_proj":
            halves = [[dense[f"{outer}.experts.{i}.{part}.weight"] for part in (gate, up)] for i in range(4)]
            parameter.copy_(torch.stack([torch.cat(half) for half in halves]))
        elif fused:
            parameter.copy_(torch.stack([dense[f"{outer}.experts.{i}.{down}.weight"] for i in range(4)]))
        else:
            parameter.copy_(dense[stored])
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_taken_apart_compute_what_transformers_computes(
    architecture: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model = saved(architecture)
    tokens = tiny_tokens(3)
    with torch.no_grad():
        ours = load_dense_model(model)(input_ids=tokens).logits
    torch.testing.assert_close(ours, in_transformers(model, architecture, tokens), rtol=0, atol=2e-6)
    names = {name for name, _ in build_skeleton(model, torch.float32).named_parameters()}
    assert names == set(load_file(model / "model.safetensors"))  # the file's own names


def test_every_tokens_experts_are_added_with_gradients() -> None:
    """Against float64, one token at a time; uneven loads, an expert without tokens."""
    skeleton = build_skeleton(tiny_config("mixtral"), torch.float64)
    experts = skeleton.model.layers[0].block_sparse_moe.experts.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in experts.parameters():
        parameter.requires_grad_(True).data.normal_()
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 0], [3, 0], [0, 3], [0, 1], [1, 3], [0, 1]])
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.stack(
        [sum(weights[t, k] * _expert(experts[int(index[t, k])], x[t]) for k in range(2)) for t in range(7)]
    )
    with count_tokens(nn.ModuleDict({"mixture": experts})) as seen:
        found = experts(x, index, weights)
    assert seen == {"mixture": (6, 5, 0, 3)} and experts.seen is None
    torch.testing.assert_close(found, expected)
    wanted = [x, weights, experts[0].w1.weight, experts[3].w2.weight]
    grad = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, wanted, grad, retain_graph=True),
        torch.autograd.grad(expected, wanted, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    found.backward(grad)
    assert experts[2].w1.weight.grad is None  # an optimizer leaves it alone


def _expert(expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return expert.w2.weight @ (nn.functional.silu(expert.w1.weight @ x) * (expert.w3.weight @ x))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_both_stages_ship_what_transformers_computes(
    architecture: str, saved: Callable[[str], Path], here: Path, config: Callable[..., TrainConfig]
) -> None:
    """The packed model's logits are those of the dequantized weights in transformers' own fused model."""
    result = train(config(model=str(saved(architecture)), min_expert_tokens=20, out="out"), Reporter())
    tokens = tiny_tokens(2, seed=5)
    with open_checkpoint(result.out) as checkpoint:
        assert len(checkpoint.layer_names) == LAYERS[architecture] and EXPERT[architecture] in checkpoint.layer_names
        assert set(checkpoint.reader.quantization_config["modules_to_not_convert"]) == KEPT[architecture] | {"lm_head"}
        assert set(checkpoint.ignore) == KEPT[architecture] | {"lm_head"}
        packed = load_packed_model(checkpoint)
        with CheckpointReader(saved(architecture)) as before:
            for name in KEPT[architecture]:
                assert torch.equal(checkpoint.get(f"{name}.weight"), before.get(f"{name}.weight"))
    with torch.no_grad():
        logits = packed.model(input_ids=tokens).logits
    expected = in_transformers(result.out, architecture, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_training_lowers_the_loss_and_trains_experts(
    architecture: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    events = _Events()
    out = trained(saved(architecture), tmp_path, events)
    blocks = [fields for kind, fields in events.events if kind == "block"]
    assert all(block["val_loss"] < block["start_val_loss"] for block in blocks)
    name = EXPERT[architecture]
    with open_checkpoint(out) as checkpoint, CheckpointReader(saved(architecture)) as before:
        rounded = round_to_nearest(before.get(f"{name}.weight"), SCHEME)
        assert not torch.equal(checkpoint.layer(name).scales, rounded.scales)


def test_an_expert_that_sees_too_few_tokens_stays_rounded_to_the_nearest_and_is_told(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    model, events = saved("mixtral"), _Events()
    out = trained(model, tmp_path, events, samples=4, min_expert_tokens=45)
    told = {fields["index"]: fields for kind, fields in events.events if kind == "experts"}
    assert set(told) == {0, 1} and told[0]["mixture"] == "block_sparse_moe.experts"
    starved = 0
    with open_checkpoint(out) as checkpoint, CheckpointReader(model) as before:
        for index, fields in told.items():
            assert sum(fields["tokens"]) == 4 * SEQUENCE * 2  # two experts a token, counted once
            few = [expert for expert, count in enumerate(fields["tokens"]) if count < 45]
            assert fields["rounded"] == few
            for expert in range(4):
                for part in ("w1", "w2", "w3"):
                    name = f"model.layers.{index}.block_sparse_moe.experts.{expert}.{part}"
                    layer, rounded = checkpoint.layer(name), round_to_nearest(before.get(f"{name}.weight"), SCHEME)
                    same = torch.equal(layer.codes, rounded.codes) and torch.equal(layer.scales, rounded.scales)
                    assert same == (expert in few)
            starved += len(few)
    assert 0 < starved < 8
    line = describe_event("experts", told[0])
    assert line is not None and line.startswith("block 1: 4 experts saw ")


def test_what_is_told_of_experts() -> None:
    fields = {"index": 2, "mixture": "mlp.experts", "tokens": [5, 4096, 0], "least": 256, "rounded": [0, 2]}
    assert describe_event("experts", fields) == (
        "block 3: 3 experts saw 0 to 4,096 tokens each; 2 below 256 stay rounded to the nearest: 0, 2"
    )
    assert describe_event("experts", fields | {"rounded": []}) == "block 3: 3 experts saw 0 to 4,096 tokens each"


def test_stored_blocks_compute_bit_for_bit_what_training_computed(
    saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(2, SEQUENCE, 64, generator=torch.Generator().manual_seed(3))
    calls: list[BlockCall] = []
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    validate, finish = block_ap_run.validate, TrainableBlock.finish_

    def remember(block: TrainableBlock, call: BlockCall, *rest: Any) -> Any:
        calls.append(call)
        return validate(block, call, *rest)

    def compare(block: TrainableBlock) -> Any:
        with torch.no_grad():
            before = block(calls[-1], hidden)
        finished = finish(block)
        with torch.no_grad():
            pairs.append((before, calls[-1].run(block.block, hidden)))
        return finished

    monkeypatch.setattr(block_ap_run, "validate", remember)
    monkeypatch.setattr(TrainableBlock, "finish_", compare)
    trained(saved("mixtral"), tmp_path, samples=4, min_expert_tokens=45)
    assert len(pairs) == 2 and all(torch.equal(one, other) for one, other in pairs)


def test_experts_of_an_unknown_kind_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import DeepseekV3Config  # noqa: PLC0415

    config = DeepseekV3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    )
    _, layers = find_decoder_layers(build_skeleton(config, torch.float32))
    check_experts(layers[0], "model.layers.0")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts .*gate_up_proj; eqat takes .*mixtral"):
        check_experts(layers[1], "model.layers.1")


def test_overrides_reach_single_experts(saved: Callable[[str], Path], tmp_path: Path) -> None:
    overrides = {"*.experts.*.down_proj": "w4", "*.experts.3.*": "skip"}
    out = trained(saved("qwen3_moe"), tmp_path, epochs=0, overrides=overrides)
    with open_checkpoint(out) as checkpoint, CheckpointReader(saved("qwen3_moe")) as before:
        wider = [f"model.layers.{i}.mlp.experts.{expert}.down_proj" for i in (0, 1) for expert in range(3)]
        assert checkpoint.overrides == dict.fromkeys(wider, QuantScheme(4, 32))
        kept = "model.layers.1.mlp.experts.3.up_proj"
        assert kept in checkpoint.ignore
        assert torch.equal(checkpoint.get(f"{kept}.weight"), before.get(f"{kept}.weight"))
    with pytest.raises(InputError, match="matches no layer"):  # the router is no linear
        check_block_ap(saved("qwen3_moe"), BlockApSettings(SCHEME, {"*.mlp.gate": "w4"}, device="cpu"))


def test_memory_is_reckoned_with_the_experts_that_a_token_meets() -> None:
    block = build_skeleton(tiny_config("olmoe"), torch.float32).model.layers[0]
    attention = (64 + 64) + 2 * (64 + 32) + (64 + 64)
    assert features_per_token(block) == attention + 2 * (2 * (64 + 128) + (128 + 64))
    assert isinstance(block.mlp.experts, Experts)


def _mixture(execution: str = "auto") -> tuple[TrainableBlock, BlockApSettings, torch.Tensor]:
    """Mixtral's mixture alone, quantized, expert 3 rounded; settings; tokens for experts 1, and 2 or 3, but not 0."""
    torch.manual_seed(0)
    mixture = build_skeleton(tiny_config("mixtral"), torch.float32).model.layers[0].block_sparse_moe
    mixture.to_empty(device="cpu")
    for parameter in mixture.parameters():
        parameter.data.normal_(0, 0.1)
    tilt = torch.randn(64)
    tilt -= tilt.mean()
    rows = [torch.zeros(64), torch.full((64,), 0.2), 0.1 + tilt / 50, 0.1 - tilt / 50]
    mixture.gate.weight.data = torch.stack(rows)
    names = [f"experts.{i}.{part}" for i in range(4) for part in ("w1", "w2", "w3")]
    stored = dict.fromkeys((name for name, _ in mixture.named_parameters()), torch.float32)
    rounded = frozenset(name for name in names if name.startswith("experts.3."))
    block = TrainableBlock(mixture, dict.fromkeys(names, SCHEME), torch.float16, stored, rounded=rounded)
    settings = BlockApSettings(SCHEME, **FAST, compute_dtype=torch.float32, execution=execution)
    return block, settings, torch.rand(2, 12, 64)


def test_fused_steps_train_a_mixture_as_plain_ones_do() -> None:
    found = []
    for kind in (AutogradSteps, FusedSteps):
        block, settings, tokens = _mixture()
        with count_tokens(block.block) as seen, torch.no_grad():
            block(BlockCall(), tokens)
        assert [count > 0 for count in seen["experts"]] == [False, True, True, True]
        before = {name: parameter.detach().clone() for name, parameter in block.block.named_parameters()}
        steps = kind(block, BlockCall(), settings, 4, torch.device("cpu"))
        losses = [float(steps(tokens, -tokens)) for _ in range(4)]
        steps.close()
        assert losses[-1] < losses[0]
        after = {name: parameter.detach() for name, parameter in block.block.named_parameters()}
        same = {name for name in after if torch.equal(before[name], after[name])}
        assert {name.partition(".w")[0] for name in same} == {"gate", "experts.0", "experts.3"}
        found.append(after)
    for name, plain in found[0].items():
        torch.testing.assert_close(found[1][name], plain, rtol=1e-4, atol=1e-6)


def test_a_mixture_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockApSettings, "fuses_steps", lambda settings: True)
    block, settings, tokens = _mixture()
    said: list[str] = []
    assert isinstance(block_steps(block, BlockCall(), settings, 4, tokens[0], said.append), FusedSteps)
    assert len(said) == 1 and "without a CUDA graph" in said[0]
    for execution in ("graph", "compile"):
        block, settings, tokens = _mixture(execution)
        with pytest.raises(InputError, match=f"execution is {execution}, but each expert of this mixture"):
            block_steps(block, BlockCall(), settings, 4, tokens[0], pytest.fail)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_native_mixtures_load_in_transformers(architecture: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    out = trained(saved(architecture), tmp_path, epochs=0)
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens = tiny_tokens(2, seed=5)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    torch.testing.assert_close(logits, in_transformers(out, architecture, tokens), rtol=0, atol=1e-5)
