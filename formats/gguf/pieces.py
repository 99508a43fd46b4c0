"""What becomes of a model's tensors in a GGUF file: ggml's names, types and order of rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ..container import SourceModel
from ..errors import CheckpointError, UnsupportedSchemeError
from ..pieces import Choice, Header, Piece, Pieces
from ..safetensors_header import TensorInfo
from .blocks import UNIT, block_type_of
from .families import NameMap, family_of_config, permutation

__all__ = ["DENSE_TYPES", "GgufPieces"]

DENSE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_IGNORED = ".rotary_emb.inv_freq"


class GgufPieces(Pieces):
    """Tensors under ggml's names.

    Attributes:
        family: the model's family.
        tied: the head is the embedding.
        to_ggml: ggml's name of a tensor.

    Raises:
        UnsupportedSchemeError: llama.cpp has no place for the model.
        MissingExtraError: the gguf package is not installed.
    """

    def __init__(self, source: SourceModel) -> None:
        self._config = source.reader.config
        self.family = family_of_config(self._config)
        self.tied = bool(self._config.get("tie_word_embeddings", False))
        self.to_ggml = cache(NameMap(self.family, self._config["num_hidden_layers"]).to_ggml)

    def leaves_out(self, name: str) -> bool:
        """Buffers that readers compute, and lm_head where it is another copy of the embedding."""
        return name.endswith(_IGNORED) or (self.tied and name == "lm_head.weight")

    def of_layer(self, name: str, tensors: Mapping[str, Tensor]) -> list[Piece]:
        """The blocks become ``{layer}.weight``."""
        blocks = tensors["blocks"]
        kind = block_type_of(blocks.shape[2])
        if kind is None:
            raise CheckpointError(f"layer {name} has blocks of {blocks.shape[2]} bytes, which are no ggml type's")
        why = getattr(tensors, "choice", None)
        reason = why.reason if why is not None else "as encoded"
        ggml_name, shape = self.to_ggml(f"{name}.weight"), (blocks.shape[0], blocks.shape[1] * UNIT)
        choice = Choice(ggml_name, kind.name, kind.bits_per_weight, reason)
        data = self._ordered(name, blocks)
        weight = Piece(Header(ggml_name, data.dtype, shape, data.nbytes, kind.name, choice), data)
        return [weight, *(self.of_tensor(f"{name}.bias", tensors["bias"]) if "bias" in tensors else [])]

    def of_tensor(self, name: str, tensor: Tensor) -> list[Piece]:
        """Matrices keep their dtype; llama.cpp computes with vectors in fp32 only."""
        if self.leaves_out(name):
            return []
        data = tensor.detach().cpu()
        if data.dim() == 1 and data.dtype in DENSE_TYPES:
            data = data.to(torch.float32)
        if data.dtype not in DENSE_TYPES:
            raise UnsupportedSchemeError(f"tensor {name} is {data.dtype}; GGUF takes float32, float16 and bfloat16")
        data = self._ordered(name, data)
        header = Header(self.to_ggml(name), data.dtype, tuple(data.shape), data.nbytes, DENSE_TYPES[data.dtype])
        return [Piece(header, data)]

    def unchanged(self, name: str, info: TensorInfo) -> Header | None:
        """A matrix whose rows keep their order."""
        if (
            self.leaves_out(name)
            or len(info.shape) != 2
            or info.dtype not in DENSE_TYPES
            or permutation(self.family, self._config, name, info.shape[0]) is not None
        ):
            return None
        return Header(self.to_ggml(name), info.dtype, info.shape, info.nbytes, DENSE_TYPES[info.dtype])

    def _ordered(self, name: str, tensor: Tensor) -> Tensor:
        order = permutation(self.family, self._config, name, tensor.shape[0])
        return tensor.contiguous() if order is None else tensor.index_select(0, order)
