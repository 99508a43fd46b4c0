"""vLLM's demands on compressed-tensors: what its loader takes, and which of its kernels runs a layer.

Linears that vLLM fuses reach a kernel as one, so kernels go by ``fused_out`` and ``fused_bits``; the tensors are loaded
part by part, so rules about these go by the part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .rules import Condition, Multiple, Rule

__all__ = ["KERNELS", "RULES", "Kernel"]

_LOADER = "model_executor/layers/quantization/compressed_tensors"
_SCHEME = f"{_LOADER}/schemes/compressed_tensors_wNa16.py"
_KERNELS = "model_executor/kernels/linear/mixed_precision"
_HUMMING = "humming 0.1.19 transform.py check_and_pad_tensors, kernel/humming.py check_scale"
_UNKNOWN = "model_executor/models/utils.py AutoWeightsLoader; model_executor/layers/linear.py load_weights"
_FORMAT = ("compressed-tensors",)
_BITS = tuple(range(2, 9))


@dataclass(frozen=True)
class Kernel:
    """One CUDA kernel for weight-only layers.

    Attributes:
        name: as vLLM's log has it.
        source: its file.
        capability: least compute capability, times ten.
        takes: alternatives, of which a layer meets one, as in ``Rule.needs``.
        note: what it does to the numbers.
    """

    name: str
    source: str
    capability: int
    takes: tuple[Mapping[str, Condition], ...]
    note: str = "(q - z) * s in the model's dtype"


_MACHETE: dict[str, Condition] = {
    "bits": (4, 8),
    "group_size": (-1, 64, 128),
    "in_features": Multiple(64),
    "fused_out": Multiple(128),
}
_MARLIN_GROUPS = (-1, 32, 64, 128)
_WHOLE_WORDS: dict[str, Condition] = {
    "bits": _BITS,
    "in_bits": Multiple(32),
    "fused_bits": Multiple(32),
    "in_features": Multiple(8),
    "fused_out": Multiple(8),
}

# In the order in which vLLM asks them; Machete runs on Hopper (90) and nothing else.
KERNELS = (
    Kernel("Machete", f"{_KERNELS}/machete.py", 90, (_MACHETE,), "stores -s * z rounded to the model's dtype"),
    Kernel(
        "Marlin",
        f"{_KERNELS}/marlin.py",
        75,
        (
            {"bits": (4, 8), "sym": (True,), "group_size": _MARLIN_GROUPS},
            {"bits": (4,), "sym": (False,), "group_size": _MARLIN_GROUPS},
        ),
    ),
    Kernel(
        "Exllama",
        f"{_KERNELS}/exllama.py",
        60,
        ({"bits": (4, 8), "sym": (True,), "grouped": (True,), "fused_out": Multiple(8)},),
    ),
    Kernel(
        "Triton",
        f"{_KERNELS}/triton_w4a16.py",
        75,
        ({"bits": (4,), "group_size": (*_MARLIN_GROUPS, 256), "fused_out": Multiple(8)},),
    ),
    Kernel(
        "Humming",
        f"{_KERNELS}/humming.py; {_HUMMING}",
        75,
        ({**_WHOLE_WORDS, "group_size": (-1, 16)}, {**_WHOLE_WORDS, "group_size": Multiple(32)}),
    ),
)

RULES = (
    Rule(
        "ct-bits",
        _FORMAT,
        "refused",
        "takes 2 to 8 bits, not {bits}",
        f"{_SCHEME} WNA16_SUPPORTED_TYPES_MAP, WNA16_ZP_SUPPORTED_TYPES_MAP",
        needs=({"bits": _BITS},),
    ),
    Rule(
        "ct-act-order",
        _FORMAT,
        "refused",
        "refuses actorder group and dynamic",
        f"{_LOADER}/compressed_tensors.py _quantization_scheme_map_from_config",
        needs=({"act_order": (False,), "desc_act": (False,)},),
        routes=("dense",),
    ),
    Rule(
        "ct-g-idx",
        _FORMAT,
        "refused",
        "has no parameter for weight_g_idx, even where it reorders nothing",
        f"{_SCHEME} create_weights; {_UNKNOWN}",
        when={"act_order": (False,)},
        needs=({"g_idx": (False,)},),
    ),
    Rule(
        "ct-packed",
        _FORMAT,
        "refused",
        "wants weight_packed as int32 [out, ceil(in * bits / 32)], a dense stream; it is {weight_packed}",
        f"{_SCHEME} create_weights",
        needs=({"weight_packed": ("fits",)},),
    ),
    Rule(
        "ct-scale",
        _FORMAT,
        "refused",
        "wants weight_scale as floating [out, groups]; it is {weight_scale}",
        f"{_SCHEME} create_weights",
        needs=({"weight_scale": ("fits",)},),
    ),
    Rule(
        "ct-zero-point",
        _FORMAT,
        "refused",
        "wants weight_zero_point as int32 [ceil(out * bits / 32), groups] where symmetric is false; it is "
        "{weight_zero_point}",
        f"{_SCHEME} create_weights",
        when={"sym": (False,)},
        needs=({"weight_zero_point": ("fits",)},),
    ),
    Rule(
        "ct-no-zero-point",
        _FORMAT,
        "refused",
        "has no parameter for weight_zero_point where symmetric is true; it is {weight_zero_point}",
        f"{_SCHEME} create_weights; {_UNKNOWN}",
        when={"sym": (True,)},
        needs=({"weight_zero_point": ("fits",)},),
    ),
    Rule(
        "ct-shape",
        _FORMAT,
        "refused",
        "wants weight_shape, where there is one, as [2]; it is {weight_shape}",
        f"{_SCHEME} create_weights; model_executor/parameter.py BasevLLMParameter",
        needs=({"weight_shape": ("fits",)},),
    ),
    Rule(
        "ct-groups",
        _FORMAT,
        "refused",
        "wants a group size that divides in_features; here {group_size} and {in_features}",
        f"{_SCHEME} create_weights",
        needs=({"whole_groups": (True,)},),
        routes=("dense",),
    ),
    Rule(
        "ct-fused",
        _FORMAT,
        "refused",
        "fuses q/k/v and gate/up, whose parts must have one scheme",
        f"{_LOADER}/utils.py should_ignore_layer, find_matched_target",
        needs=({"fused_alike": (True,)},),
        routes=("dense",),
    ),
    Rule(
        "ct-ignore",
        _FORMAT,
        "refused",
        "fuses q/k/v and gate/up, of which ignore must name all parts or none; here it names {ignored_apart} and not "
        "the others",
        f"{_LOADER}/utils.py should_ignore_layer",
        needs=({"ignored_apart": ("none",)},),
    ),
    Rule(
        "ct-experts",
        _FORMAT,
        "refused",
        "builds all experts of a layer with the scheme of the first one, and here they differ",
        f"{_LOADER}/compressed_tensors_moe/compressed_tensors_moe.py get_moe_method",
        when={"expert": (True,)},
        needs=({"experts_alike": (True,)},),
        routes=("dense",),
    ),
    Rule(
        "ct-words",
        _FORMAT,
        "refused",
        "cuts packed zero-points at the seams of fused linears: out_features times bits must be a multiple of 32, "
        "and here {out_features} x {bits}",
        "model_executor/parameter.py _adjust_shard_indexes_for_packing",
        when={"sym": (False,), "fused": (True,)},
        needs=({"out_bits": Multiple(32)},),
        routes=("dense",),
    ),
    Rule(
        "ct-kernel",
        _FORMAT,
        "refused",
        "has no CUDA kernel for {bits} bits in groups of {group_size} at {fused_out} x {in_features}",
        f"{_KERNELS}/; {_HUMMING}",
        when={"bits": _BITS, "expert": (False,)},  # other bits are ct-bits' affair; experts have kernels of their own
        needs=tuple(taken for kernel in KERNELS for taken in kernel.takes),
        routes=("dense",),
    ),
    Rule(
        "ct-machete",
        _FORMAT,
        "cost",
        "runs it in Machete on Hopper, which stores -s * z rounded to the model's dtype; elsewhere zero-points stay "
        "integers",
        f"{_KERNELS}/machete.py",
        when={"sym": (False,), **_MACHETE},
    ),
)
