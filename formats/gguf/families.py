"""Model families: their names in llama.cpp, what their tensors are called there, and the order of q and k rows.

transformers rotates the two halves of a head, llama.cpp's ``llama`` architecture neighbouring pairs, so that rows of
q_proj and k_proj change places: row ``h, half, i`` of a head goes to ``h, i, half``. Qwen's architectures rotate halves
in llama.cpp too. Names come from the gguf package. Source: ``conversion/llama.py`` (``LlamaModel.permute``) and
``llama_model_rope_type`` in ``src/llama-model.cpp``, llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedSchemeError
from .library import gguf_package

__all__ = ["FAMILIES", "Family", "NameMap", "family_of_architecture", "family_of_config", "permutation"]

_BLOCK_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_OUTER_MODULES = ("model.embed_tokens", "model.norm", "lm_head")
_PERMUTED = re.compile(r"\.self_attn\.([qk])_proj(\.|$)")


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: transformers' name.
        causal_lm: transformers' class.
        architecture: llama.cpp's name.
        permuted: whether llama.cpp wants q and k rows in its own order.
        block_modules: what a block has, relative to ``model.layers.N``.
    """

    model_type: str
    causal_lm: str
    architecture: str
    permuted: bool
    block_modules: tuple[str, ...] = _BLOCK_MODULES


# The first of an architecture is what a file of that architecture is read as.
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama", permuted=True),
        Family("mistral", "MistralForCausalLM", "llama", permuted=True),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", permuted=False),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", permuted=False, block_modules=(*_BLOCK_MODULES, *_QK_NORMS)),
    )
}


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a ``config.json``.

    Raises:
        UnsupportedSchemeError: it is none of the table.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    family = FAMILIES.get(str(model_type))
    if family is None or (architectures and family.causal_lm not in architectures):
        raise UnsupportedSchemeError(
            f"model_type {model_type!r} ({', '.join(map(str, architectures)) or 'no architecture'}) is not written as "
            f"GGUF; {', '.join(known.causal_lm for known in FAMILIES.values())} are; use another format, or "
            "llama.cpp's convert_hf_to_gguf.py on --to dense"
        )
    return family


def family_of_architecture(architecture: Any) -> Family:
    """The family that a file of one of llama.cpp's architectures is read as.

    Raises:
        CheckpointError: it is none of the table.
    """
    for family in FAMILIES.values():
        if family.architecture == architecture:
            return family
    known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES.values()))
    raise CheckpointError(f"architecture {architecture!r} is not read here; {known} are")


class NameMap:
    """Tensor names of one model in both worlds, by the gguf package's own table.

    Args:
        family: its family.
        blocks: how many blocks it has.
    """

    def __init__(self, family: Family, blocks: int) -> None:
        gguf = gguf_package()
        architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(architectures[family.architecture], blocks)
        self._family = family
        self._blocks = blocks

    def to_ggml(self, name: str) -> str:
        """ggml's name of a tensor that transformers calls ``name``.

        Raises:
            UnsupportedSchemeError: llama.cpp's architecture has no such tensor.
        """
        module, _, suffix = name.rpartition(".")
        found = self._map.get_name(module) if module in self.modules() and suffix in ("weight", "bias") else None
        if found is None:
            raise UnsupportedSchemeError(
                f"tensor {name!r} has no place in llama.cpp's architecture {self._family.architecture!r}"
            )
        return f"{found}.{suffix}"

    def to_transformers(self) -> dict[str, str]:
        """ggml's name of every module of the family -> transformers' module path."""
        return {self._map.get_name(module): module for module in self.modules()}

    def modules(self) -> dict[str, None]:
        """Module paths of the family, as an ordered set."""
        return dict.fromkeys(self._paths())

    def _paths(self) -> Iterator[str]:
        yield from _OUTER_MODULES
        for block in range(self._blocks):
            for module in self._family.block_modules:
                yield f"model.layers.{block}.{module}"


def permutation(family: Family, config: Mapping[str, Any], name: str, rows: int) -> Tensor | None:
    """Which row of transformers' tensor each row of llama.cpp's is; None where the order is the same.

    Args:
        family: the model's family.
        config: num_attention_heads and, where it differs, num_key_value_heads.
        name: transformers' name of the tensor or of its module.
        rows: rows of the tensor.

    Returns:
        int64 ``[rows]``: ``theirs = ours[permutation]``.
    """
    found = _PERMUTED.search(name)
    if not family.permuted or found is None:
        return None
    heads = config["num_attention_heads"]
    if found.group(1) == "k":
        heads = config.get("num_key_value_heads") or heads
    if rows % (2 * heads):
        raise CheckpointError(f"{name} has {rows} rows, which {heads} heads of an even width do not divide")
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)
