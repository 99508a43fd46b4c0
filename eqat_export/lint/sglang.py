"""SGLang 0.5.23 on CUDA: every packed layer runs in Marlin, so 4 and 8 bits only."""

from .rules import Condition, Engine, Multiple, Rule
from .shared import (
    GPTQ,
    GPTQ_LABEL,
    MARLIN_GROUPS,
    awq_bits,
    gptq_fused,
    gptq_scheme,
    in_config_json,
    model_dtype_scales,
    own_layout,
    packing_format,
)

_LAYERS = "srt/layers/quantization"
_MARLIN = f"{_LAYERS}/marlin_utils.py"
_SHAPES: tuple[dict[str, Condition], ...] = (
    {"fused_out": Multiple(64), "in_features": Multiple(128)},
    {"fused_out": Multiple(128), "in_features": Multiple(64)},
)
_GGUF = ("gguf", "gguf --gguf-type Q4_0")  # the second holds 2 and 3 bits where the first would choose Q2_0
_FILES = "gguf 0.19.0, which it reads files with, knows no type 42"

ENGINE = Engine(
    "sglang",
    "0.5.23",
    "sglang 0.5.23 (PyPI), paths below sglang/",
    reads=("dense", *GPTQ, "compressed-tensors", "auto-round", "awq", "gguf"),
    routes=("compressed-tensors", *_GGUF, "dense"),
    rules=(
        own_layout(f"{_LAYERS}/__init__.py BASE_QUANTIZATION_METHODS"),
        Rule(
            "bitblas",
            ("bitblas",),
            "refused",
            "has no BitBLAS loader",
            f"{_LAYERS}/__init__.py BASE_QUANTIZATION_METHODS",
        ),
        Rule(
            "mlx",
            ("mlx",),
            "refused",
            "reads MLX's layout on Apple silicon only (SGLANG_USE_MLX=1)",
            f"{_LAYERS}/mlx.py MlxQuantizationConfig",
        ),
        gptq_scheme(f"{_LAYERS}/gptq/gptq.py GPTQMarlinConfig.TYPE_MAP; gptq/schemes/gptq_linear.py _init_kernel"),
        Rule(
            "gptq-zeros",
            (*GPTQ, "auto-round"),
            "misread",
            "never reads qzeros: every zero-point counts as the middle of the range, and here others are stored",
            f"{_LAYERS}/gptq/schemes/gptq_marlin.py create_weights, zero_points=False",
            when={"sym": (True,)},
            needs=({"symmetric": (True,)},),
        ),
        Rule(
            "g-idx",
            GPTQ,
            "misread",
            "ignores g_idx unless desc_act is true, and here it reorders the groups",
            f"{_LAYERS}/gptq/schemes/gptq_marlin.py create_weights, has_g_idx=desc_act",
            when={"desc_act": (False,)},
            needs=({"act_order": (False,)},),
        ),
        Rule(
            "group",
            (*GPTQ, "compressed-tensors"),
            "refused",
            "takes groups of -1, 32, 64 and 128, not {group_size}",
            f"{_MARLIN} MARLIN_SUPPORTED_GROUP_SIZES",
            needs=({"group_size": MARLIN_GROUPS},),
        ),
        gptq_fused(f"{_LAYERS}/utils.py get_linear_quant_method"),
        Rule(
            "shape",
            (*GPTQ, "compressed-tensors", "awq"),
            "refused",
            "runs Marlin, which takes fused out_features in 64s with in_features in 128s, or 128s with 64s; here "
            "{fused_out} x {in_features}",
            f"{_MARLIN} verify_marlin_supports_shape; vllm 0.33.0 marlin_utils.py marlin_padded_nk, which pads",
            needs=_SHAPES,
            routes=(*_GGUF, "dense"),
        ),
        Rule(
            "ct-bits",
            ("compressed-tensors",),
            "refused",
            "takes 4 and 8 bits, not {bits}",
            f"{_LAYERS}/compressed_tensors/schemes/compressed_tensors_wNa16.py WNA16_SUPPORTED_TYPES_MAP",
            needs=({"bits": (4, 8)},),
            routes=(*_GGUF, "dense"),
        ),
        Rule(
            "ct-fused",
            ("compressed-tensors",),
            "refused",
            "fuses q/k/v and gate/up, whose parts must have one scheme",
            f"{_LAYERS}/compressed_tensors/utils.py should_ignore_layer, find_matched_target",
            needs=({"fused_alike": (True,)},),
            routes=(*_GGUF, "dense"),
        ),
        Rule(
            "ct-experts",
            ("compressed-tensors",),
            "refused",
            "builds all experts of a layer with the scheme of the first one, and here they differ",
            f"{_LAYERS}/compressed_tensors/compressed_tensors.py get_moe_scheme",
            when={"expert": (True,)},
            needs=({"experts_alike": (True,)},),
            routes=(*_GGUF, "dense"),
        ),
        in_config_json("srt/configs/model_config.py _verify_quantization"),
        model_dtype_scales(f"{_LAYERS}/gptq/schemes/gptq_marlin.py create_weights, params_dtype"),
        packing_format(f"{_LAYERS}/auto_round.py SUPPORTED_FORMATS"),
        Rule(
            "ar-scheme",
            ("auto-round",),
            "refused",
            "takes this packing symmetric at 4 or 8 bits only; here {bits} bits, sym {sym}",
            f"{_LAYERS}/auto_round.py apply_gptq_quant_layer; gptq/schemes/gptq_linear.py _init_kernel",
            when={"packing_format": (GPTQ_LABEL,)},
            needs=({"bits": (4, 8), "sym": (True,), "group_size": MARLIN_GROUPS},),
        ),
        awq_bits(f"{_LAYERS}/awq/awq.py"),
        Rule(
            "gguf-type",
            ("gguf",),
            "refused",
            "has no kernel for {ggml_type}",
            f"{_LAYERS}/gguf.py STANDARD_QUANT_TYPES; {_FILES}",
            needs=({"ggml_type": ("Q4_0", "Q5_0", "Q8_0")},),
            routes=("gguf --gguf-type Q4_0", "dense"),
        ),
    ),
)
