"""onnxruntime 1.32.0, and onnxruntime-genai 0.18.0, whose model builder imports quantized folders."""

from .rules import Engine, Rule

_LOADERS = "onnxruntime-genai 0.18.0 models/loaders"
_RUNS = "runs ONNX models"

ENGINE = Engine(
    "onnxruntime",
    "1.32.0",
    "onnxruntime 1.32.0, onnxruntime-genai 0.18.0 (PyPI)",
    reads=("onnx",),
    routes=("onnx", "onnx --container-bits 4"),
    rules=(
        Rule(
            "gptq",
            ("gptq",),
            "refused",
            f"{_RUNS}; genai's builder makes one of GPTQ v1 with g_idx at 2, 4 and 8 bits, quantizing again",
            f"{_LOADERS}/gptq.py, base.py",
        ),
        Rule(
            "gptq-v2",
            ("gptq_v2",),
            "refused",
            f"{_RUNS}; genai's builder adds 1 to every zero-point whatever checkpoint_format says, which is wrong here",
            f"{_LOADERS}/gptq.py handle_qzeros",
        ),
        Rule(
            "awq",
            ("awq",),
            "refused",
            f"{_RUNS}; genai's builder makes one of AWQ at 4 bits, quantizing again",
            f"{_LOADERS}/awq.py, base.py",
        ),
        Rule(
            "other",
            ("native", "bitblas", "mlx", "auto-round", "compressed-tensors", "gguf"),
            "refused",
            f"{_RUNS}, and genai's builder imports no such layout",
            f"{_LOADERS}/quant_model.py",
        ),
        Rule(
            "dense",
            ("dense",),
            "refused",
            f"{_RUNS}; genai's builder makes one of a full-precision model",
            "onnxruntime-genai 0.18.0 models/builder.py",
        ),
    ),
)
