"""transformers' ``AutoModelForCausalLM``: dense folders by itself, others through the library of their format.

- GPTQ through optimum and gptqmodel, AWQ through gptqmodel alone.
- compressed-tensors through the package of that name, with ``dequantize=True``: left compressed, asymmetric layers do
  not load (transformers 5.23 allocates unpacked zero-points). It computes ``(q - z) * s`` in the dtype of the scales
  and casts to the model's, so that is the dtype to load and to compare in.
- GGUF through the gguf package, dequantized in fp32.
"""

from __future__ import annotations

from functools import reduce
from importlib.metadata import version
from typing import Any, ClassVar

import torch

from formats.model import Checkpoint

from .base import ModuleSession, Runtime, Session, no_compile

__all__ = ["TransformersRuntime"]

_GPTQ = (("optimum", "gptqmodel"), "gptq")


class TransformersRuntime(Runtime):
    """``AutoModelForCausalLM.from_pretrained(folder)``."""

    id = "transformers"
    package = "transformers"
    readers: ClassVar[dict[str | None, tuple[tuple[str, ...], str]]] = {
        "gptq": _GPTQ,
        "gptq_v2": _GPTQ,
        "awq": (("gptqmodel",), "gptq"),
        "compressed-tensors": (("compressed_tensors",), "compressed-tensors"),
        "gguf": (("gguf",), "gguf"),
        None: ((), ""),
    }
    formats = tuple(readers)

    def needs(self, format_id: str | None) -> tuple[tuple[str, ...], str]:
        """The library that reads the format for transformers."""
        return self.readers[format_id]

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`."""
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        _check_types(checkpoint)
        options, dtype = _options(checkpoint)
        path = checkpoint.reader.folder
        with no_compile():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent if "gguf_file" in options else path, dtype=dtype, device_map=str(device), **options
            )
        session = ModuleSession(model.eval())
        session.dtype = dtype
        return session


def _check_types(checkpoint: Checkpoint) -> None:
    """Raises NotImplementedError for a GGUF type that the installed gguf package has no name for."""
    if checkpoint.format is None or checkpoint.format.id != "gguf":
        return
    from gguf import GGMLQuantizationType  # noqa: PLC0415

    known = {member.name for member in GGMLQuantizationType}
    used = {str(name) for name in checkpoint.config["types"].values()}
    if used - known:
        raise NotImplementedError(
            f"transformers reads through the gguf package, and gguf {version('gguf')} does not know "
            f"{', '.join(sorted(used - known))}; use --runtime llama.cpp, or export with --gguf-type Q4_0"
        )


def _options(checkpoint: Checkpoint) -> tuple[dict[str, Any], torch.dtype]:
    """What ``from_pretrained`` needs to be told about a checkpoint, and the dtype to load it in."""
    from transformers import AwqConfig, CompressedTensorsConfig, GPTQConfig  # noqa: PLC0415
    from transformers.utils.quantization_config import AwqBackend  # noqa: PLC0415

    if checkpoint.format is None or checkpoint.scheme is None:
        return {}, torch.float16
    if checkpoint.format.id == "gguf":
        return {"gguf_file": checkpoint.reader.folder.name}, torch.float32
    if checkpoint.format.id == "compressed-tensors":
        tensors = checkpoint.reader.tensors
        scales = [tensors[f"{name}.weight_scale"].dtype for name in checkpoint.layer_names]
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}, reduce(torch.promote_types, scales)
    if checkpoint.format.id == "awq":
        return {"quantization_config": AwqConfig(bits=4, backend=AwqBackend.TORCH_AWQ)}, torch.float16
    return {"quantization_config": GPTQConfig(bits=checkpoint.scheme.bits, backend="gptq_torch")}, torch.float16
