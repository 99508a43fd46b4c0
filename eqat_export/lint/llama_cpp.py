"""llama.cpp at 0c1e57098, as llama-cpp-python 0.3.36 vendors it (also in Ollama, LM Studio): it runs GGUF files.

What its converter, convert_hf_to_gguf.py, would make of another format stands with the format: a conversion through it
quantizes again, and eqat export does not.
"""

from .rules import Engine, Rule

_CONVERTER = "conversion/base.py dequant_model"
_GPTQ = ("gptq", "gptq_v2")
_RUNS = "runs GGUF files"

ENGINE = Engine(
    "llama.cpp",
    "0c1e57098",
    "ggml-org/llama.cpp at 0c1e57098 (llama-cpp-python 0.3.36)",
    reads=("gguf",),
    routes=("gguf",),
    rules=(
        Rule(
            "gptq",
            _GPTQ,
            "refused",
            f"{_RUNS}; its converter dequantizes GPTQ at 2, 4 and 8 bits, reads a wrapped v1 zero as 2^bits, and would "
            "quantize again",
            f"{_CONVERTER}, dequant_gptq",
        ),
        Rule(
            "compressed-tensors",
            ("compressed-tensors",),
            "refused",
            f"{_RUNS}; its converter unpacks whole codes a word, wrong at 3, 5, 6 and 7 bits, and would quantize again",
            f"{_CONVERTER}, dequant_packed",
        ),
        Rule(
            "other",
            ("native", "bitblas", "mlx", "auto-round", "awq", "onnx"),
            "refused",
            f"{_RUNS}, and its converter does not know the format {{format}}",
            _CONVERTER,
        ),
        Rule(
            "dense",
            ("dense",),
            "refused",
            f"{_RUNS}; its convert_hf_to_gguf.py makes one of a full-precision model",
            "convert_hf_to_gguf.py",
        ),
        Rule(
            "gguf-q2-0",
            ("gguf",),
            "cost",
            "knows Q2_0 (type 42) since 2026; older builds, and what vendors them, refuse the file",
            "ggml/include/ggml.h GGML_TYPE_Q2_0",
            when={"ggml_type": ("Q2_0",)},
        ),
    ),
)
