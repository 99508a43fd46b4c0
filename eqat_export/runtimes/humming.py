"""humming-kernels, layer by layer on an NVIDIA GPU: what vLLM and SGLang run 2- and 3-bit weights with.

``HummingLayer.from_safetensors`` reads a layer of a folder by the folder's own configuration. It knows one config group
of compressed-tensors, the one that targets Linear; layers of others are built the way vLLM does, from their own scheme.
N and K are padded as in vLLM 0.33.0 (``quantization/utils/humming/linear.py``).

What it computes, from the kernels of 0.1.19 (``include/humming/{datatype/dequant_single,arith/mainloop_arith}.cuh``):
``q - z`` is exact in 16 bits and is multiplied by the group's scale in 16 bits before the tensor cores, so a weight is
``(q - z) * s`` rounded once; with one group a row the scale is applied to the sum. Products accumulate in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formats.errors import InputError
from formats.model import Checkpoint
from formats.types import QuantScheme

from .base import Runtime, Session

__all__ = ["HummingRuntime"]

_CAPABILITY = (7, 5)
_PADDING = {"pad_n_to_multiple": 256, "pad_k_to_multiple": 128}


class HummingRuntime(Runtime):
    """``HummingLayer.from_safetensors(folder, layer)``; single layers, no logits."""

    id = "humming"
    package = "humming-kernels"
    requires = ("humming",)
    extra = "humming"
    formats = ("compressed-tensors", "gptq_v2")

    def check(self, format_id: str | None) -> None:
        """See :class:`Runtime`; a GPU is asked for before the package.

        Raises:
            InputError: there is no GPU that its kernels run on.
        """
        if format_id in self.formats and not _has_gpu():
            raise InputError(
                "runtime humming needs an NVIDIA GPU of compute capability 7.5 or newer, and there is none here; "
                "transformers and gptqmodel check the same files on a CPU"
            )
        super().check(format_id)

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """Every layer on the GPU, run once, so that what it does not take is said on loading."""
        return HummingSession(checkpoint, device)


class HummingSession(Session):
    """The checkpoint's quantized layers as humming's."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        config = checkpoint.reader.config
        named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        self.dtype = torch.bfloat16 if named == "bfloat16" else torch.float16
        self._layers: dict[str, Any] = {}
        for name in checkpoint.layer_names:
            layer = _load(checkpoint, name, self.dtype).to(device)
            layer.transform()
            _run(layer, torch.zeros(1, checkpoint.layer_features(name)[1], dtype=self.dtype, device=device))
            self._layers[name] = layer

    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """See Session."""
        return partial(_run, self._layers[name]) if name in self._layers else None


def _load(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    from humming.layer import HummingLayer  # noqa: PLC0415

    scheme = checkpoint.layer_scheme(name)
    by_path = checkpoint.format is not None and checkpoint.format.id == "compressed-tensors"
    if not by_path or scheme == checkpoint.scheme:
        return HummingLayer.from_safetensors(str(checkpoint.reader.folder), name, torch_dtype=dtype, **_PADDING)
    out_features, in_features = checkpoint.layer_features(name)
    tensors = checkpoint.layer_tensors(name)
    layer = HummingLayer(
        shape_n=out_features,
        shape_k=in_features,
        weight_config=_weight_config(scheme),
        has_bias="bias" in tensors,
        torch_dtype=dtype,
        **_PADDING,
    )
    layer.load_from_tensors(tensors)
    return layer


def _weight_config(scheme: QuantScheme) -> dict[str, Any]:
    """What humming calls the weights of a compressed-tensors config group."""
    channel = scheme.group_size == -1
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "type": "int",
        "num_bits": scheme.bits,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "symmetric": scheme.sym,
    }


def _run(layer: Any, rows: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(rows)


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= _CAPABILITY
