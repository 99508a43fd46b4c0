"""gptqmodel 7.6.0."""

from .rules import Engine, Multiple, Rule
from .shared import GPTQ, awq_bits, fp16_scales, gptq_kernel_group, labelled_zeros, own_layout, wrapped_by_word

_LOADER = "models/loader.py"
_KERNEL = "nn_modules/qlinear/torch.py"
_METHODS = "quantization/config.py METHOD"

ENGINE = Engine(
    "gptqmodel",
    "7.6.0",
    "gptqmodel 7.6.0 (PyPI), paths below gptqmodel/",
    reads=("dense", *GPTQ, "bitblas", "awq"),
    routes=("gptq_v2", "gptq"),
    rules=(
        own_layout(_METHODS),
        Rule(
            "method",
            ("compressed-tensors", "auto-round", "mlx"),
            "refused",
            "does not know the format {format}",
            _METHODS,
        ),
        Rule(
            "gguf",
            ("gguf",),
            "refused",
            "reads GGUF files of Qwen3 models with one type throughout, and no others as they are",
            "utils/internal_gguf.py inspect_quantized_checkpoint",
        ),
        Rule(
            "tokenizer",
            (*GPTQ, "bitblas", "awq"),
            "refused",
            "loads the tokenizer with the model, and there is none",
            f"{_LOADER} from_quantized, load_hf_tokenizer",
            needs=({"tokenizer": (True,)},),
        ),
        Rule(
            "v1-producer",
            ("gptq",),
            "refused",
            "refuses asymmetric v1 unless meta.quantizer lists a gptqmodel of 0.9.0 or later",
            f"{_LOADER} from_quantized, is_quantized_by_gptaq",
            when={"sym": (False,), "zeros_label": ("less one",)},
            needs=({"gptqmodel_quantizer": (True,)},),
        ),
        Rule(
            "mixtral",
            (*GPTQ, "bitblas", "awq"),
            "refused",
            "looks for Mixtral's experts under mlp.experts.N.gate_proj, not under the names of the model's own files",
            "models/definitions/mixtral.py module_tree",
            needs=({"expert": (False,)}, {"expert_names": ("usual",)}),
        ),
        Rule(
            "bits",
            GPTQ,
            "refused",
            "computes 2 to 8 bits, not {bits}",
            f"{_KERNEL} SUPPORTS_BITS",
            needs=({"bits": tuple(range(2, 9))},),
        ),
        gptq_kernel_group("group", f"{_KERNEL} SUPPORTS_GROUP_SIZE"),
        labelled_zeros("zeros", f"{_LOADER} convert_gptq_v1_to_v2_format"),
        wrapped_by_word("wrap", "utils/model.py convert_gptq_v1_to_v2_format_module"),
        Rule(
            "cpu",
            GPTQ,
            "cost",
            "on a CPU name BACKEND.GPTQ_TORCH: gptq_torch_fused computes asymmetric 4 bits wrong",
            "nn_modules/qlinear/torch_fused.py",
            when={"bits": (4,)},
            needs=({"symmetric": (True,)},),
        ),
        fp16_scales((*GPTQ, "awq"), f"{_KERNEL} register_buffers"),
        Rule(
            "bitblas-bits",
            ("bitblas",),
            "refused",
            "runs BitBLAS at 1, 2, 4 and 8 bits, not {bits}",
            "nn_modules/qlinear/bitblas.py BITBLAS_SUPPORTED_BITS",
            needs=({"bits": (1, 2, 4, 8)},),
        ),
        Rule(
            "bitblas-shape",
            ("bitblas",),
            "refused",
            "runs BitBLAS where both features are multiples of 16; here {out_features} x {in_features}",
            "nn_modules/qlinear/bitblas.py SUPPORTS_IN_FEATURES_DIVISIBLE_BY",
            needs=({"in_features": Multiple(16), "out_features": Multiple(16)},),
        ),
        Rule(
            "bitblas-device",
            ("bitblas",),
            "argument",
            "needs CUDA and the package bitblas for this layout",
            f"{_LOADER} FORMAT.BITBLAS",
        ),
        awq_bits("nn_modules/qlinear/gemm_awq.py SUPPORTS_BITS"),
        Rule(
            "awq-zero",
            ("awq",),
            "cost",
            "read a zero-point of 0 as 15 in its ExLlamaV2 kernel up to 5.6.12",
            "issue 2350, fixed by pull request 2351; quantization/awq/utils/packing_utils.py unpack_reorder_pack",
            when={"lowest_zero": (0,)},
        ),
    ),
)
