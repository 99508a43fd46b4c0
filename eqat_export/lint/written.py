"""What a format looks like to an engine when eqat has written it, as facts.

The way out of a broken rule is another format, and whether that helps is answered by the rules for these facts. A test
holds them against real exports.
"""

from __future__ import annotations

from collections.abc import Mapping

from .rules import Value
from .stored import FITS

__all__ = ["BITS", "WRITTEN", "as_written", "split_route"]

_ALWAYS: Mapping[str, Value] = {
    "configured": "config.json",
    "desc_act": False,
    "act_order": False,
    "g_idx": False,
    "scale_dtype": "float16",
    "model_dtype": "float16",
    "model_files": True,
    "stray_files": False,
}

WRITTEN: Mapping[str, Mapping[str, Value]] = {
    "native": {"quant_method": "eqat", "g_idx": True},
    "gptq": {
        "quant_method": "gptq",
        "g_idx": True,
        "gptqmodel_quantizer": True,
        "zeros_label": "less one",
        "zeros": "less one",
        "zeros_as_labelled": True,
        "wrapped": "none",
    },
    "gptq_v2": {
        "quant_method": "gptq",
        "g_idx": True,
        "zeros_label": "raw",
        "zeros": "raw",
        "zeros_as_labelled": True,
        "wrapped": "none",
    },
    "bitblas": {"quant_method": "gptq", "sym": False},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "weight_packed": FITS,
        "weight_scale": FITS,
        "weight_zero_point": FITS,
        "weight_shape": FITS,
    },
    "gguf": {"quant_method": "gguf"},
    "mlx": {"quant_method": "none"},
    "onnx": {"quant_method": "onnx"},
    "auto-round": {
        "quant_method": "auto-round",
        "packing_format": "auto_round:gptqmodel",
        "zeros_label": "raw",
        "zeros": "raw",
        "zeros_as_labelled": True,
        "wrapped": "none",
    },
    "awq": {"quant_method": "awq"},
}

# Bits that a format holds, where not all that engines are asked about.
BITS: Mapping[str, tuple[int, ...]] = {"bitblas": (2, 4, 8), "onnx": (2, 4, 8), "awq": (4,)}

# ggml type -> bits of a layer with any zero-points that it holds exactly.
_GGML_BITS = {"Q4_0": (2, 3), "Q5_0": (2, 3, 4), "Q8_0": (2, 3, 4, 5, 6, 7)}

# What says something about a layer whatever it is stored as.
_OF_THE_LAYER = (
    "tokenizer",
    "kept",
    "bits",
    "group_size",
    "sym",
    "symmetric",
    "in_features",
    "out_features",
    "in_bits",
    "out_bits",
    "grouped",
    "whole_groups",
    "fused",
    "fused_out",
    "fused_bits",
    "override",
    "fused_override",
    "fused_alike",
    "head",
    "expert",
    "experts_alike",
    "expert_names",
    "lowest_zero",
    "highest_zero",
)


def split_route(route: str) -> tuple[str, dict[str, str]]:
    """Format id and options of a route such as ``gguf --gguf-type Q4_0``."""
    target, *words = route.split()
    names = (word.removeprefix("--").replace("-", "_") for word in words[::2])
    return target, dict(zip(names, words[1::2], strict=True))


def as_written(facts: Mapping[str, Mapping[str, Value]], route: str) -> dict[str, dict[str, Value]]:
    """The facts of the same model after ``eqat export --to route``."""
    target, options = split_route(route)
    if target == "dense":
        first = next(iter(facts.values()))
        dense: dict[str, Value] = {"format": "dense", "quant_method": "none", "model_files": True, "stray_files": False}
        return {"": dense | {key: first[key] for key in ("tokenizer",) if key in first}}
    return {
        name: {
            **{key: layer[key] for key in _OF_THE_LAYER if key in layer},
            **_ALWAYS,
            **WRITTEN[target],
            **({"ggml_type": _ggml_type(layer, options.get("gguf_type"))} if target == "gguf" else {}),
            **({"bits": int(options["container_bits"])} if "container_bits" in options else {}),
            "format": target,
        }
        for name, layer in facts.items()
    }


def _ggml_type(layer: Mapping[str, Value], forced: str | None) -> str:
    """The block type of a layer; ``rounded`` where the forced one does not hold it."""
    bits = int(layer["bits"])
    if forced is not None:
        return forced if bits in _GGML_BITS[forced] else "rounded"
    zeros = layer.get("lowest_zero", 0), layer.get("highest_zero", 2**bits - 1)
    width = layer["group_size"] if layer["group_size"] != -1 else layer.get("in_features", 1)
    if bits == 2 and zeros in ((1, 1), (1, 2), (2, 2)) and int(width) % 64 == 0:
        return "Q2_0"
    return next((name for name, held in _GGML_BITS.items() if bits in held), "Q8_0")
