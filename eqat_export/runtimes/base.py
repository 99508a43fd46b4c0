"""What a runtime check needs from a real reader."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from formats.errors import InputError, MissingExtraError

__all__ = ["Runtime"]


class Runtime(ABC):
    """A library that loads a checkpoint folder by itself.

    Class attributes:
        id: the name users type.
        package: distribution whose version is reported.
        requires: modules that must be importable to read quantized checkpoints.
        extra: eqat's extra that brings them.
        formats: format ids it reads; None stands for full precision.
    """

    id: ClassVar[str]
    package: ClassVar[str]
    requires: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    formats: ClassVar[tuple[str | None, ...]]

    def check(self, format_id: str | None) -> None:
        """Raises when the runtime cannot be used.

        Raises:
            InputError: it does not read this format.
            MissingExtraError: a package it needs is not installed.
        """
        if format_id not in self.formats:
            reads = ", ".join(name or "dense" for name in self.formats)
            raise InputError(
                f"runtime {self.id} does not read format {format_id or 'dense'}; it reads {reads} "
                "(convert with eqat export first)"
            )
        needed = self.requires if format_id is not None else ()
        for module in needed:
            if importlib.util.find_spec(module) is None:
                raise MissingExtraError(module, self.extra, f"the runtime check with {self.id}")

    @property
    def version(self) -> str:
        """Version of the installed package."""
        return version(self.package)

    @abstractmethod
    def load(self, folder: Path, bits: int | None, device: torch.device) -> nn.Module:
        """The model in fp16 as the library builds it; its modules carry the checkpoint's module paths.

        Args:
            folder: a checkpoint whose format passed :meth:`check`.
            bits: bits of its scheme; None for full precision.
            device: where to run.
        """

    def logits(self, model: nn.Module, ids: Tensor) -> Tensor:
        """fp32 logits ``[batch, length, vocabulary]`` of int64 ids ``[batch, length]``, on CPU."""
        with torch.inference_mode(), no_compile():
            return model(input_ids=ids).logits.float().cpu()

    def layer_rows(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Outputs ``[rows, out]`` of one linear module for inputs ``[rows, in]``, on CPU."""
        with torch.inference_mode(), no_compile():
            return module(inputs).cpu()


@contextmanager
def no_compile() -> Iterator[None]:
    """Runs eagerly: compiling the dequantization costs minutes on a CPU and gives identical logits."""
    import torch._dynamo  # noqa: PLC0415

    with torch._dynamo.config.patch(disable=True):
        yield
