"""vLLM 0.33.0, with humming-kernels 0.1.19 which it runs 2- and 3-bit layers with.

GPTQ is symmetric 4 and 8 bits here, whatever stands in qzeros: the Marlin path never reads them. The way in for
everything else is compressed-tensors.
"""

from .rules import Engine, Rule
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
from .vllm_compressed_tensors import RULES

_LAYERS = "model_executor/layers/quantization"
_HUMMING_BITS = (2, 3, 5, 6, 7)

ENGINE = Engine(
    "vllm",
    "0.33.0",
    "vllm 0.33.0 (PyPI), paths below vllm/",
    reads=("dense", *GPTQ, "compressed-tensors", "auto-round", "awq"),
    routes=("compressed-tensors", "dense"),
    rules=(
        own_layout(f"{_LAYERS}/__init__.py QUANTIZATION_METHODS; config/model.py _verify_quantization"),
        Rule(
            "bitblas",
            ("bitblas",),
            "refused",
            "has no BitBLAS loader any more (it went after 0.15) and takes the file for GPTQ",
            f"{_LAYERS}/__init__.py QUANTIZATION_METHODS",
        ),
        Rule(
            "gguf",
            ("gguf",),
            "refused",
            "reads GGUF only with the plugin vllm-gguf-plugin",
            f"{_LAYERS}/__init__.py QUANTIZATION_METHODS",
        ),
        Rule(
            "mlx",
            ("mlx",),
            "refused",
            "wants a quant_method in quantization_config, and MLX's has none",
            "config/model.py _verify_quantization",
        ),
        # GPTQ
        gptq_scheme(f"{_LAYERS}/auto_gptq.py AutoGPTQConfig.TYPE_MAP"),
        Rule(
            "gptq-zeros",
            GPTQ,
            "misread",
            "never reads qzeros: every zero-point counts as the middle of the range, and here others are stored",
            f"{_LAYERS}/auto_gptq.py AutoGPTQLinearMethod.create_weights, zero_points=False",
            when={"sym": (True,)},
            needs=({"symmetric": (True,)},),
        ),
        Rule(
            "gptq-desc-act",
            GPTQ,
            "refused",
            "refuses desc_act with groups",
            f"{_LAYERS}/utils/gptq_utils.py normalize_and_validate_gptq_desc_act",
            needs=({"desc_act": (False,)}, {"group_size": (-1,)}),
        ),
        Rule(
            "g-idx",
            (*GPTQ, "auto-round"),
            "misread",
            "drops g_idx, and here it reorders the groups",
            f"{_LAYERS}/base_config.py get_checkpoint_weight_mapper",
            needs=({"act_order": (False,)}, {"group_size": (-1,)}),
        ),
        Rule(
            "gptq-group",
            GPTQ,
            "refused",
            "takes groups of -1, 32, 64 and 128 in GPTQ, not {group_size}",
            f"{_LAYERS}/utils/marlin_utils.py MARLIN_SUPPORTED_GROUP_SIZES",
            needs=({"group_size": MARLIN_GROUPS},),
        ),
        gptq_fused(f"{_LAYERS}/utils/gptq_utils.py get_linear_quant_method"),
        in_config_json(
            "config/model.py _verify_quantization; model_executor/model_loader/weight_utils.py get_quant_config"
        ),
        *RULES,
        model_dtype_scales(
            f"{_LAYERS}/compressed_tensors/schemes/compressed_tensors_wNa16.py create_weights, params_dtype"
        ),
        Rule(
            "model-dtype",
            (*GPTQ, "compressed-tensors", "awq", "auto-round"),
            "cost",
            "runs a model of dtype {model_dtype} in bfloat16, which rounds float16 scales: pass --dtype float16",
            "config/model.py _resolve_auto_dtype",
            when={"scale_dtype": ("float16",)},
            needs=({"model_dtype": ("float16",)},),
        ),
        Rule(
            "model-float16",
            (*GPTQ, "compressed-tensors", "awq", "auto-round"),
            "cost",
            "runs a model of dtype {model_dtype} in float16, whose range is less than that of the bfloat16 scales here",
            "config/model.py _resolve_auto_dtype",
            when={"scale_dtype": ("bfloat16",), "model_dtype": ("float16",)},
        ),
        # auto-round
        packing_format(f"{_LAYERS}/inc/inc.py SUPPORTED_FORMATS"),
        Rule(
            "ar-method",
            ("auto-round",),
            "refused",
            "knows quant_method auto-round, not {quant_method!r}",
            f"{_LAYERS}/inc/inc.py override_quantization_method",
            needs=({"quant_method": ("auto-round",)},),
        ),
        Rule(
            "ar-scheme",
            ("auto-round",),
            "refused",
            "takes symmetric layers only at {bits} bits in this packing",
            f"{_LAYERS}/inc/schemes/inc_wna16_linear.py _build_gptq_method",
            when={"bits": (4, 8), "packing_format": (GPTQ_LABEL,)},
            needs=({"sym": (True,), "group_size": MARLIN_GROUPS},),
        ),
        Rule(
            "ar-zeros",
            ("auto-round",),
            "misread",
            "runs {bits} bits with humming, which takes qzeros as they are, and this packing stores zero - 1",
            "humming 0.1.19 schema/gptq.py _convert_humming; auto-round 0.16.1 inference/backend.py humming_zp",
            when={"bits": _HUMMING_BITS, "sym": (False,), "packing_format": (GPTQ_LABEL,)},
            needs=({"zeros": ("raw",)},),
        ),
        Rule(
            "ar-symmetric",
            ("auto-round",),
            "misread",
            "never reads qzeros of a symmetric layer, and here they are not the middle of the range",
            f"{_LAYERS}/auto_gptq.py; humming 0.1.19 schema/gptq.py",
            when={"sym": (True,)},
            needs=({"symmetric": (True,)},),
        ),
        awq_bits(f"{_LAYERS}/auto_awq.py AutoAWQConfig.TYPE_MAP"),
    ),
)
