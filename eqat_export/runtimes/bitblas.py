"""bitblas' own kernels, layer by layer, on an NVIDIA GPU.

Every layer runs through ``bitblas.Matmul`` with the operator that gptqmodel builds for it (fp16 activations, fp32 sums,
a list of batch sizes) and gets the checkpoint's tensors as they are stored: bitblas transforms nothing. Kernels are not
tuned, which takes minutes a shape and changes no number.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats.errors import InputError
from formats.model import Checkpoint
from formats.types import QuantScheme

from .base import Runtime, Session
from .bitblas_build import HOPPER_TARGET, hopper_templates, load_libraries

__all__ = ["BitblasRuntime", "Kernel", "build_kernels", "kernel_of"]

HOPPER_VARIABLE = "EQAT_BITBLAS_HOPPER"
BATCHES = (1, 16, 32, 64, 128, 256, 512, 1024)
_HOPPER = (9, 0)


@dataclass(frozen=True)
class Kernel:
    """What bitblas builds an operator for.

    Attributes:
        weight: bitblas' name for a code's type: ``uint4``, or ``int4`` where a layer has no zeros.
        zeros: zeros mode, ``quantized`` or ``original``; None without zeros.
        batches: batch sizes that one operator serves, or a fixed one.
    """

    out_features: int
    in_features: int
    weight: str
    group_size: int
    zeros: str | None
    batches: tuple[int, ...] | int = BATCHES


class BitblasRuntime(Runtime):
    """``bitblas.Matmul`` on the stored tensors of each layer.

    Args:
        hopper: apply the workaround for Hopper GPUs (``bitblas_build``); by default when ``EQAT_BITBLAS_HOPPER`` is 1.
    """

    id = "bitblas"
    package = "bitblas"
    requires = ("bitblas",)
    extra = "bitblas"
    formats = ("bitblas",)

    def __init__(self, *, hopper: bool | None = None) -> None:
        self.hopper = os.environ.get(HOPPER_VARIABLE) == "1" if hopper is None else hopper

    def check(self, format_id: str | None) -> None:
        """See Runtime.

        Raises:
            InputError: also without an NVIDIA GPU, and on a Hopper GPU without the workaround.
        """
        super().check(format_id)
        if not torch.cuda.is_available():
            raise InputError("runtime bitblas runs its kernels on an NVIDIA GPU, and none is visible")
        if torch.cuda.get_device_capability() == _HOPPER and not self.hopper:
            raise InputError(
                f"bitblas {self.version} cannot build its kernels for Hopper ({torch.cuda.get_device_name()}); "
                f"{HOPPER_VARIABLE}=1 builds them as sm_80's, from a patched copy of its templates"
            )

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """Builds one operator for each shape among the layers; see Runtime.

        Raises:
            NotImplementedError: 8-bit layers. bitblas builds no kernel for them on any GPU, and may crash trying: it
                writes the mask 255 as an int8 literal, and its conversion of whole bytes has a wrong signature.
        """
        if any(checkpoint.layer_scheme(name).bits == 8 for name in checkpoint.layer_names):
            raise NotImplementedError(f"bitblas {self.version} has no 8-bit kernel for fp16 activations")
        kernels = {name: kernel_of(checkpoint, name) for name in checkpoint.layer_names}
        return _BitblasSession(checkpoint, device, kernels, build_kernels(set(kernels.values()), hopper=self.hopper))


class _BitblasSession(Session):
    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        kernels: Mapping[str, Kernel],
        operators: Mapping[Kernel, Callable[..., Tensor]],
    ) -> None:
        self._checkpoint, self._device, self._kernels, self._operators = checkpoint, device, kernels, operators

    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """See Session."""
        if name not in self._kernels:
            return None
        stored = {local: tensor.to(self._device) for local, tensor in self._checkpoint.layer_tensors(name).items()}
        arguments = [stored["qweight"], stored["scales"]]
        if self._kernels[name].zeros is not None:
            arguments.append(_zeros(stored))
        return partial(_run, self._operators[self._kernels[name]], arguments, stored.get("bias"))


def kernel_of(checkpoint: Checkpoint, name: str) -> Kernel:
    """The kernel for one layer, as its readers choose it."""
    scheme, stored = checkpoint.layer_scheme(name), checkpoint.layer_tensors(name)
    held = "qzeros" in stored or "zeros" in stored
    zeros = None
    if held and _zeros(stored).numel():
        zeros = "original" if _zeros(stored).is_floating_point() else "quantized"
    return Kernel(
        *checkpoint.layer_features(name), _weight_type(scheme, signed=zeros is None), scheme.group_size, zeros
    )


def build_kernels(kernels: set[Kernel], *, hopper: bool) -> dict[Kernel, Callable[..., Tensor]]:
    """One operator for each kernel; some ten seconds of compiling each.

    Returns:
        kernel -> operator, called with ``(inputs, qweight, scales[, zeros])``.

    Raises:
        InputError: a library that bitblas links is missing.
        RuntimeError: bitblas could not build a kernel; it says why on stderr alone.
    """
    load_libraries()
    package = Path(str(importlib.util.find_spec("bitblas").origin)).parent  # type: ignore[union-attr]
    with hopper_templates(package) if hopper else nullcontext():
        bitblas = importlib.import_module("bitblas")
        major, minor = torch.cuda.get_device_capability()
        target = HOPPER_TARGET if hopper else f"cuda -arch=sm_{major}{minor}"
        return {kernel: _operator(bitblas, kernel, target) for kernel in kernels}


def _operator(bitblas: Any, kernel: Kernel, target: str) -> Callable[..., Tensor]:
    config = bitblas.MatmulConfig(
        M=kernel.batches,
        N=kernel.out_features,
        K=kernel.in_features,
        A_dtype="float16",
        W_dtype=kernel.weight,
        out_dtype="float16",
        accum_dtype="float32",
        layout="nt",
        with_scaling=True,
        with_zeros=kernel.zeros is not None,
        zeros_mode=kernel.zeros or "quantized",
        group_size=kernel.group_size,
        with_bias=False,
        propagate_a=False,
        propagate_b=False,
    )
    said = f"bitblas built no kernel for {kernel} and {target}"
    try:
        operator = bitblas.Matmul(config, target=target, enable_tuning=False)
    except (AttributeError, OSError) as exc:  # it loads what nvcc has not written
        raise RuntimeError(said) from exc
    if operator.lib is None:
        raise RuntimeError(said)
    return operator


def _run(operator: Callable[..., Tensor], arguments: list[Tensor], bias: Tensor | None, inputs: Tensor) -> Tensor:
    found = operator(inputs.contiguous(), *arguments)
    return found if bias is None else found + bias.to(found.dtype)


def _zeros(stored: Mapping[str, Tensor]) -> Tensor:
    return stored["qzeros"] if "qzeros" in stored else stored["zeros"]


def _weight_type(scheme: QuantScheme, *, signed: bool) -> str:
    return f"{'int' if signed else 'uint'}{scheme.bits}"
