"""llama.cpp, through llama-cpp-python on the CPU.

Weights are those of ggml's own ``to_float``, from the bytes that ggml's own parser finds: fp32 and exact. For a product
with blocks llama.cpp rounds the activations to int8, 32 at a time (Q8_0), whatever the type of the weights; with fp16
and bf16 matrices it rounds them to that type. Our own forward pass with the same rounding is therefore the yardstick.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from eqat_export.runtimes.reference import reference_model
from formats.gguf.families import NameMap, family_of_config, permutation
from formats.model import Checkpoint

from .base import Runtime, Session
from .ggml import GgmlFile

__all__ = ["LlamaCppRuntime"]

_BLOCK = 32
_INT8 = 127


class LlamaCppRuntime(Runtime):
    """``llama_cpp.Llama(path)``."""

    id = "llama.cpp"
    package = "llama-cpp-python"
    requires = ("llama_cpp",)
    extra = "llama-cpp"
    formats = ("gguf",)

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`."""
        return LlamaCppSession(checkpoint)


class LlamaCppSession(Session):
    """One GGUF file in llama.cpp."""

    dtype = torch.float32
    device = "cpu"
    yardstick_name = "our own with int8 activations"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        config = checkpoint.reader.config
        self._family = family_of_config(config)
        self._names = NameMap(self._family, config["num_hidden_layers"])

    def logits(self, ids: Tensor) -> Tensor:
        """One sequence after the other, all positions in one batch."""
        from llama_cpp import Llama  # noqa: PLC0415

        length = ids.shape[1]
        model = Llama(str(self._checkpoint.reader.folder), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
        rows = []
        for sequence in ids.tolist():
            model.reset()
            model.eval(sequence)
            rows.append(torch.from_numpy(np.array(model.scores[:length])))
        model.close()
        del model
        gc.collect()
        return torch.stack(rows)

    def yardstick(self, ids: Tensor) -> Tensor:
        """Our own forward pass in fp32, every linear's inputs rounded as llama.cpp rounds them."""
        model = reference_model(self._checkpoint, torch.float32, torch.device("cpu"))
        for name in self._checkpoint.layer_names:
            model.get_submodule(name).register_forward_pre_hook(_rounding(_to_int8_blocks))
        tied = self._checkpoint.reader.config["tie_word_embeddings"]
        head = self._checkpoint.reader.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].dtype
        model.get_submodule("lm_head").register_forward_pre_hook(_rounding(lambda inputs: inputs.to(head).float()))
        with torch.inference_mode():
            return model(input_ids=ids.cpu()).logits

    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """The product with ggml's fp32 weights, rows back in transformers' order."""
        _, columns = self._checkpoint.layer_features(name)
        with GgmlFile(self._checkpoint.reader.folder) as file:
            weight = file.weights(self._names.to_ggml(f"{name}.weight"), columns)
            if weight is None:
                return None
            bias = file.weights(self._names.to_ggml(f"{name}.bias"), 1)
        order = permutation(self._family, self._checkpoint.reader.config, name, weight.shape[0])
        back = slice(None) if order is None else torch.argsort(order)
        added = None if bias is None else bias.flatten()[back]
        return lambda inputs: nn.functional.linear(inputs, weight[back], added)


def _rounding(
    round_inputs: Callable[[Tensor], Tensor],
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, inputs: (round_inputs(inputs[0]), *inputs[1:])


def _to_int8_blocks(inputs: Tensor) -> Tensor:
    """Rounded to Q8_0: a scale of fp16 and int8 for every 32 features (``quantize_row_q8_0`` of ggml)."""
    blocks = inputs.unflatten(-1, (-1, _BLOCK))
    scales = blocks.abs().amax(dim=-1, keepdim=True) / _INT8
    steps = torch.where(scales == 0, 0.0, blocks / scales).round()
    return (steps * scales.half().float()).flatten(-2)
