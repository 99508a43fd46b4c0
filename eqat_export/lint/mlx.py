"""mlx-lm 0.32.2 on mlx 0.32.4."""

from .rules import Engine, Rule

_UTILS = "mlx_lm/utils.py"
_GPTQ = ("gptq", "gptq_v2")

ENGINE = Engine(
    "mlx",
    "0.32.2",
    "mlx-lm 0.32.2, mlx 0.32.4 (PyPI)",
    reads=("dense", "mlx", "awq"),
    routes=("mlx", "dense"),
    rules=(
        Rule(
            "gptq-order",
            _GPTQ,
            "refused",
            "refuses checkpoints with g_idx",
            f"{_UTILS} _transform_awq_weights",
            needs=({"g_idx": (False,)},),
        ),
        Rule(
            "gptq-bits",
            (*_GPTQ, "awq"),
            "refused",
            "takes GPTQ and AWQ at 4 bits only, not {bits}",
            f"{_UTILS} _transform_awq_weights",
            needs=({"bits": (4,)},),
        ),
        Rule(
            "gptq-as-awq",
            _GPTQ,
            "refused",
            "unpacks GPTQ as if it were AWQ, whose codes lie along the other axis, and then finds 0 bits",
            f"{_UTILS} load_model, _unpack_awq_weights, infer_quant_config",
        ),
        Rule(
            "own-layout",
            ("native", "auto-round", "bitblas"),
            "refused",
            "does nothing for the format {format} (quant_method {quant_method}) and then finds no weights",
            f"{_UTILS} load_model",
        ),
        Rule(
            "compressed-tensors",
            ("compressed-tensors",),
            "refused",
            "takes pack-quantized for 4 bits in groups of 32, and has no names for weight_packed and weight_scale in "
            "ordinary models",
            f"{_UTILS} _compressed_tensors_quantization",
        ),
        Rule(
            "bits",
            ("mlx",),
            "refused",
            "computes affine layers of 1, 2, 3, 4, 5, 6 and 8 bits, not {bits}",
            "mlx 0.32.4 quantized_matmul",
            needs=({"bits": (1, 2, 3, 4, 5, 6, 8)},),
        ),
        Rule(
            "group",
            ("mlx", "awq"),
            "refused",
            "computes groups of 32, 64 and 128, not {group_size}",
            "mlx 0.32.4 quantized_matmul",
            needs=({"group_size": (32, 64, 128)},),
        ),
        Rule(
            "files",
            ("dense", "mlx", "awq"),
            "refused",
            "looks for model*.safetensors",
            f"{_UTILS} load_model",
            needs=({"model_files": (True,)},),
        ),
        Rule(
            "stray-files",
            ("dense", "mlx", "awq"),
            "misread",
            "loads every model*.safetensors in the folder, and here are some that are no part of the checkpoint",
            f"{_UTILS} load_model",
            needs=({"stray_files": (False,)},),
        ),
        Rule(
            "scale-dtype",
            ("mlx",),
            "cost",
            "computes activations in the scales' dtype: float32 scales are exact and take float32 matmuls",
            "mlx 0.32.4 quantized_matmul",
            needs=({"scale_dtype": ("float16", "bfloat16")},),
        ),
        Rule(
            "awq-bias",
            ("awq",),
            "cost",
            "turns zero-points into biases -s * z of the scales' dtype, which rounds them",
            f"{_UTILS} _transform_awq_weights",
            needs=({"scale_dtype": ("float32",)},),
        ),
    ),
)
