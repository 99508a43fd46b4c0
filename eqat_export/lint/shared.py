"""Rules that engines have in common, because they run the same kernels or grew from the same code.

Each engine still names where it does so.
"""

from __future__ import annotations

from .rules import Rule

__all__ = [
    "GPTQ",
    "GPTQ_LABEL",
    "MARLIN_GROUPS",
    "awq_bits",
    "fp16_scales",
    "gptq_fused",
    "gptq_kernel_group",
    "gptq_scheme",
    "in_config_json",
    "labelled_zeros",
    "model_dtype_scales",
    "own_layout",
    "packing_format",
    "wrapped_by_word",
]

GPTQ = ("gptq", "gptq_v2")
GPTQ_LABEL = "auto_round:auto_gptq"
MARLIN_GROUPS = (-1, 32, 64, 128)
_PACKED = (*GPTQ, "compressed-tensors", "awq", "auto-round")


def own_layout(source: str) -> Rule:
    """No engine loads EfficientQAT's own layout."""
    text = "cannot load EfficientQAT's own layout (quant_method {quant_method})"
    return Rule("own-layout", ("native",), "refused", text, source)


def gptq_scheme(source: str) -> Rule:
    """vLLM and SGLang run GPTQ in Marlin."""
    return Rule(
        "gptq-scheme",
        GPTQ,
        "refused",
        "takes GPTQ with sym true at 4 or 8 bits only; here {bits} bits, sym {sym} (gptq_v2 also loads with "
        "--quantization humming, which reads raw zeros)",
        source,
        needs=({"bits": (4, 8), "sym": (True,)},),
    )


def gptq_fused(source: str) -> Rule:
    """vLLM and SGLang fuse linears before they look for a rule about them."""
    return Rule(
        "gptq-fused",
        GPTQ,
        "refused",
        "matches dynamic rules against fused linears (qkv_proj, gate_up_proj): no part can have a rule of its own",
        source,
        needs=({"fused_override": (False,), "fused_alike": (True,)},),
    )


def in_config_json(source: str) -> Rule:
    """vLLM and SGLang find out from config.json alone that a model is quantized."""
    return Rule(
        "configured",
        (*GPTQ, "awq", "auto-round"),
        "argument",
        "looks for quantization_config in config.json, and it stands in a file of its own: pass --quantization",
        source,
        needs=({"configured": ("config.json",)},),
    )


def model_dtype_scales(source: str) -> Rule:
    """vLLM and SGLang cast scales to the model's dtype."""
    return Rule(
        "scale-dtype",
        _PACKED,
        "cost",
        "casts scales to the model's dtype, float16 or bfloat16; these are {scale_dtype}",
        source,
        needs=({"scale_dtype": ("float16", "bfloat16")},),
    )


def packing_format(source: str) -> Rule:
    """vLLM and SGLang know two of auto-round's packings."""
    return Rule(
        "ar-packing",
        ("auto-round",),
        "refused",
        "takes packing_format auto_round:auto_gptq and auto_round:auto_awq, not {packing_format}",
        source,
        needs=({"packing_format": (GPTQ_LABEL, "auto_round:auto_awq")},),
    )


def awq_bits(source: str) -> Rule:
    """AWQ has 4-bit kernels everywhere."""
    text = "takes AWQ at 4 bits, not {bits}"
    return Rule("awq-bits", ("awq",), "refused", text, source, needs=({"bits": (4,)},))


def gptq_kernel_group(rule_id: str, source: str) -> Rule:
    """transformers runs GPTQ with gptqmodel's kernels."""
    return Rule(
        rule_id,
        GPTQ,
        "refused",
        "has a kernel for groups of -1 and the powers of two from 16 to 1024, not {group_size}",
        source,
        needs=({"group_size": (-1, 16, 32, 64, 128, 256, 512, 1024)},),
    )


def labelled_zeros(rule_id: str, source: str) -> Rule:
    """transformers reads GPTQ's zeros with gptqmodel's code."""
    return Rule(
        rule_id,
        GPTQ,
        "misread",
        "goes by checkpoint_format, which says zeros are {zeros_label}, and they are {zeros}",
        source,
        needs=({"zeros_as_labelled": (True,)},),
    )


def wrapped_by_word(rule_id: str, source: str) -> Rule:
    """See ``labelled_zeros``."""
    return Rule(
        rule_id,
        GPTQ,
        "misread",
        "adds 1 to whole packed words, and zeros of 0 were wrapped field by field: carries change their neighbours",
        source,
        when={"bits": (2, 4, 8), "zeros": ("less one",)},
        needs=({"wrapped": ("none", "word")},),
    )


def fp16_scales(formats: tuple[str, ...], source: str) -> Rule:
    """gptqmodel's kernels keep scales as fp16."""
    return Rule(
        "scale-dtype",
        formats,
        "cost",
        "keeps scales as float16; these are {scale_dtype}",
        source,
        needs=({"scale_dtype": ("float16",)},),
    )
