"""What vLLM requires of a compressed-tensors checkpoint, as data.

Read off vLLM 0.33.0 and humming-kernels 0.1.19; every rule names its file. ``broken_rules`` applies them to an opened
checkpoint from its metadata. vLLM itself needs a GPU and is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from formats.compressed_tensors_config import config_groups, matches
from formats.errors import CheckpointError
from formats.model import Checkpoint
from formats.types import QuantScheme

__all__ = ["FUSED", "KERNELS", "LAYER_RULES", "MODEL_RULES", "VERSION", "Kernel", "LayerFacts", "Rule", "broken_rules"]

VERSION = "vLLM 0.33.0"
_LOADER = "model_executor/layers/quantization/compressed_tensors"
_SCHEME = f"{_LOADER}/schemes/compressed_tensors_wNa16.py"
_KERNELS = "model_executor/kernels/linear/mixed_precision"
_HUMMING = "humming-kernels 0.1.19 humming"

# Linears that vLLM computes as one (models/llama.py, packed_modules_mapping; most other models name them alike).
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Kernel:
    """One CUDA kernel for weight-only layers, in the order in which vLLM asks them.

    Attributes:
        capability: compute capability times ten; None for Hopper alone.
        symmetric, asymmetric: bits it takes without and with zero-points.
        groups: group sizes it takes, -1 for a whole row.
        step_in, step_out: in_features and out_features are multiples of these.
        whole_words: codes of a row and of a column fill 32-bit words.
        note: what it does to the numbers.
    """

    name: str
    source: str
    capability: int | None
    symmetric: tuple[int, ...]
    asymmetric: tuple[int, ...]
    groups: Container[int]
    step_in: int = 1
    step_out: int = 1
    whole_words: bool = False
    note: str = "(q - z) * s in the model's dtype"

    def takes(self, scheme: QuantScheme, out_features: int, in_features: int) -> bool:
        """True when it runs a layer."""
        if scheme.bits not in (self.symmetric if scheme.sym else self.asymmetric):
            return False
        if self.whole_words and (in_features * scheme.bits % 32 or out_features * scheme.bits % 32):
            return False
        return scheme.group_size in self.groups and not in_features % self.step_in and not out_features % self.step_out


KERNELS = (
    Kernel(
        "Machete",
        f"{_KERNELS}/machete.py",
        None,
        (4, 8),
        (4, 8),
        (-1, 64, 128),
        64,
        128,
        note="stores -s * z rounded to the model's dtype",
    ),
    Kernel("Marlin", f"{_KERNELS}/marlin.py", 75, (4, 8), (4,), (-1, 32, 64, 128)),
    Kernel("Exllama", f"{_KERNELS}/exllama.py", 60, (4, 8), (), range(1, 2**20), step_out=8),
    Kernel("Triton", f"{_KERNELS}/triton_w4a16.py", 75, (4,), (4,), (-1, 32, 64, 128, 256), step_out=8),
    Kernel(
        "Humming",
        f"{_KERNELS}/humming.py",
        75,
        tuple(range(2, 9)),
        tuple(range(2, 9)),
        (-1, 16, *range(32, 8193, 32)),
        step_in=8,
        step_out=8,
        whole_words=True,
    ),
)


@dataclass(frozen=True)
class LayerFacts:
    """What a rule sees of one layer: its scheme, features, and local tensors as dtype and shape."""

    name: str
    scheme: QuantScheme
    out_features: int
    in_features: int
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def groups(self) -> int:
        """Groups a row."""
        return self.scheme.groups(self.in_features)

    def words(self, count: int) -> int:
        """Words of a dense stream of ``count`` values."""
        return math.ceil(count * self.scheme.bits / 32)

    def is_(self, local: str, dtype: torch.dtype, *shape: int) -> bool:
        """True when a tensor is there with this dtype and shape."""
        return self.tensors.get(local) == (dtype, shape)


@dataclass(frozen=True)
class Rule:
    """One requirement.

    Attributes:
        id: short name.
        says: the requirement, in one line.
        source: file of vLLM (below ``vllm/``) or of humming that has it.
        holds: True when a LayerFacts, or for a model rule a Checkpoint, meets it.
        fix: what to do about it.
    """

    id: str
    says: str
    source: str
    holds: Callable[[Any], bool]
    fix: str


LAYER_RULES = (
    Rule(
        "bits",
        "2 to 8 bits",
        _SCHEME,
        lambda layer: 2 <= layer.scheme.bits <= 8,
        "quantize to 2 bits or more",
    ),
    Rule(
        "packed",
        "weight_packed is int32 [out, ceil(in * bits / 32)], a dense stream",
        _SCHEME,
        lambda layer: layer.is_("weight_packed", torch.int32, layer.out_features, layer.words(layer.in_features)),
        "eqat export FOLDER --to compressed-tensors",
    ),
    Rule(
        "scale",
        "weight_scale is a floating [out, groups]; it is cast to the model's dtype",
        _SCHEME,
        lambda layer: (
            layer.tensors["weight_scale"][0].is_floating_point
            and layer.tensors["weight_scale"][1] == (layer.out_features, layer.groups)
        ),
        "eqat export FOLDER --to compressed-tensors",
    ),
    Rule(
        "zero-point",
        "weight_zero_point is int32 [ceil(out * bits / 32), groups] where symmetric is false",
        _SCHEME,
        lambda layer: (
            layer.scheme.sym
            or layer.is_("weight_zero_point", torch.int32, layer.words(layer.out_features), layer.groups)
        ),
        "eqat export FOLDER --to compressed-tensors",
    ),
    Rule(
        "no-zero-point",
        "weight_zero_point is absent where symmetric is true",
        _SCHEME,
        lambda layer: not layer.scheme.sym or "weight_zero_point" not in layer.tensors,
        "eqat export FOLDER --to compressed-tensors",
    ),
    Rule(
        "shape",
        "weight_shape is an integer [2]",
        _SCHEME,
        lambda layer: (
            "weight_shape" not in layer.tensors
            or (layer.tensors["weight_shape"][1] == (2,) and not layer.tensors["weight_shape"][0].is_floating_point)
        ),
        "eqat export FOLDER --to compressed-tensors",
    ),
    Rule(
        "act-order",
        "no weight_g_idx: actorder group and dynamic are refused",
        f"{_LOADER}/compressed_tensors.py",
        lambda layer: "weight_g_idx" not in layer.tensors,
        "quantize without act-order",
    ),
    Rule(
        "groups",
        "group_size divides in_features",
        _SCHEME,
        lambda layer: layer.scheme.group_size == -1 or layer.in_features % layer.scheme.group_size == 0,
        "quantize with a group that divides in_features",
    ),
    Rule(
        "kernel",
        "one of its CUDA kernels takes bits, group and features (Humming: whole words along both axes)",
        f"{_KERNELS}/, {_HUMMING}/transform.py check_and_pad_tensors, {_HUMMING}/kernel/humming.py check_scale",
        lambda layer: any(kernel.takes(layer.scheme, layer.out_features, layer.in_features) for kernel in KERNELS),
        "quantize with group 32, 64 or 128 and leave layers of odd sizes in full precision",
    ),
)


def _groups_are_read(checkpoint: Checkpoint) -> bool:
    try:
        config_groups(checkpoint.config)
    except CheckpointError:
        return False
    return True


def _fused_alike(checkpoint: Checkpoint) -> bool:
    schemes = {name: checkpoint.layer_scheme(name) for name in checkpoint.layer_names}
    return all(len({schemes.get(part) for part in parts}) == 1 for parts in _fused_parts(checkpoint))


def _fused_ignored_alike(checkpoint: Checkpoint) -> bool:
    ignore = checkpoint.config.get("ignore") or ()
    ignored = {
        part: any(matches(target, part) for target in ignore) for parts in _fused_parts(checkpoint) for part in parts
    }
    return all(len({ignored[part] for part in parts}) == 1 for parts in _fused_parts(checkpoint))


def _fused_whole_words(checkpoint: Checkpoint) -> bool:
    parts = [part for parts in _fused_parts(checkpoint) for part in parts if part in checkpoint.layer_names]
    return all(
        checkpoint.layer_scheme(part).sym
        or checkpoint.layer_features(part)[0] * checkpoint.layer_scheme(part).bits % 32 == 0
        for part in parts
    )


def _fused_parts(checkpoint: Checkpoint) -> Iterator[list[str]]:
    """Paths of the linears that become one, quantized or not."""
    linears = {name.removesuffix(".weight") for name in checkpoint.passthrough_names} | set(checkpoint.layer_names)
    for first in sorted(linears):
        parent, _, leaf = first.rpartition(".")
        for parts in FUSED.values():
            paths = [f"{parent}.{part}" for part in parts]
            if leaf == parts[0] and linears.issuperset(paths):
                yield paths


def _keeps_scales(checkpoint: Checkpoint) -> bool:
    config = checkpoint.reader.config
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    model = torch.float16 if named == "float16" else torch.bfloat16  # float32 and nothing become bf16
    found = {checkpoint.reader.tensors[f"{name}.weight_scale"].dtype for name in checkpoint.layer_names}
    return found == {model}


MODEL_RULES = (
    Rule(
        "config",
        "quant_method compressed-tensors, format pack-quantized, weights only, group or channel",
        f"{_LOADER}/compressed_tensors.py",
        _groups_are_read,
        "make a full-precision model of it with transformers",
    ),
    Rule(
        "fused-scheme",
        "linears that are fused (q/k/v, gate/up) have one scheme, or are all unquantized",
        f"{_LOADER}/utils.py find_matched_target",
        _fused_alike,
        "quantize them alike",
    ),
    Rule(
        "fused-ignore",
        "ignore has all of the fused linears or none",
        f"{_LOADER}/utils.py should_ignore_layer",
        _fused_ignored_alike,
        "quantize them alike",
    ),
    Rule(
        "fused-words",
        "zero-points of each fused linear fill whole words: out * bits is a multiple of 32",
        "model_executor/parameter.py _adjust_shard_indexes_for_packing",
        _fused_whole_words,
        "leave these layers in full precision",
    ),
    Rule(
        "scale-dtype",
        "scales keep their digits: they have the model's dtype, and float32 models run in bf16 unless --dtype says so",
        f"{_SCHEME} params_dtype, config/model.py _resolve_auto_dtype",
        _keeps_scales,
        "eqat export FOLDER --to compressed-tensors --scale-dtype float16",
    ),
)


def broken_rules(checkpoint: Checkpoint) -> Iterator[tuple[Rule, str]]:
    """Rules that a compressed-tensors checkpoint breaks, with the first layer that does ("" for the model's)."""
    for rule in MODEL_RULES:
        if not rule.holds(checkpoint):
            yield rule, ""
    layers = [_facts(checkpoint, name) for name in checkpoint.layer_names]
    for rule in LAYER_RULES:
        broken = next((layer for layer in layers if not rule.holds(layer)), None)
        if broken is not None:
            yield rule, broken.name


def _facts(checkpoint: Checkpoint, name: str) -> LayerFacts:
    locals_ = checkpoint.layer_shapes(name)
    tensors = {local: checkpoint.reader.tensors[f"{name}.{local}"] for local in locals_}
    return LayerFacts(
        name,
        checkpoint.layer_scheme(name),
        *checkpoint.layer_features(name),
        {local: (info.dtype, info.shape) for local, info in tensors.items()},
    )
