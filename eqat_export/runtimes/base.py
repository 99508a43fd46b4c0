"""What a runtime check needs from a real reader."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import ClassVar

import torch
from torch import Tensor, nn

from formats.errors import InputError, MissingExtraError
from formats.model import Checkpoint

__all__ = ["ModuleSession", "Runtime", "Session", "no_compile"]


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
        modules, extra = self.needs(format_id)
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise MissingExtraError(module, extra, f"the runtime check with {self.id}")

    def needs(self, format_id: str | None) -> tuple[tuple[str, ...], str]:
        """Modules that must be importable to read a format, and eqat's extra that brings them."""
        return (() if format_id is None else self.requires), self.extra

    @property
    def version(self) -> str:
        """Version of the installed package."""
        return version(self.package)

    @abstractmethod
    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """The checkpoint as the library loads it by itself, from ``checkpoint.reader.folder``.

        Args:
            checkpoint: one whose format passed :meth:`check`.
            device: where to run.
        """


class Session(ABC):
    """A checkpoint loaded in a runtime.

    Attributes:
        dtype: in which the engine computes: its weights must equal those of the checkpoint rounded to it.
        logits_dtype: the dtype whose rounding logits may show, where that is not ``dtype``.
        device: where it runs, when that is not the device it was offered.
        yardstick_name: whose logits ``yardstick`` returns.
    """

    dtype: torch.dtype = torch.float16
    logits_dtype: torch.dtype | None = None
    device: str = ""
    yardstick_name: str = "the engine's own on dense weights"

    def logits(self, ids: Tensor) -> Tensor | None:
        """Logits ``[batch, length, vocabulary]`` of int64 ids ``[batch, length]``, on CPU; None from single layers."""
        return None

    def yardstick(self, ids: Tensor) -> Tensor | None:
        """Logits to judge the engine's by where its arithmetic is coarser than its dtype, e.g. int8 activations.

        Its own on the same weights stored densely, or ours with the same rounding. None where our forward pass in
        ``dtype`` is the fair comparison.
        """
        return None

    @abstractmethod
    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """The linear at a module path, inputs ``[rows, in]`` in ``dtype`` to outputs ``[rows, out]``; None if there is
        none.
        """


class ModuleSession(Session):
    """A torch model whose modules carry the checkpoint's module paths."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._modules = dict(model.named_modules())

    def logits(self, ids: Tensor) -> Tensor:
        """See Session."""
        with torch.inference_mode(), no_compile():
            return self.model(input_ids=ids).logits.cpu()

    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """See Session."""
        module = self._modules.get(name)
        return None if module is None else partial(_run, module)


def _run(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.inference_mode(), no_compile():
        return module(inputs)


@contextmanager
def no_compile() -> Iterator[None]:
    """Runs eagerly: compiling the dequantization costs minutes on a CPU and gives identical logits."""
    import torch._dynamo  # noqa: PLC0415

    with torch._dynamo.config.patch(disable=True):
        yield
