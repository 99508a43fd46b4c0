"""gptqmodel, by its plain torch kernel.

``GPTQ_TORCH`` reads 2, 3, 4 and 8 bits on every device, ``AWQ_TORCH`` AWQ's 4. AUTO may build an extension for
minutes, and ``gptq_torch_fused`` zeroes the zero-points of asymmetric 4-bit layers, so the kernel is always named.
"""

from __future__ import annotations

import torch

from formats.model import Checkpoint

from .base import ModuleSession, Runtime, Session, no_compile

__all__ = ["GptqmodelRuntime"]


class GptqmodelRuntime(Runtime):
    """``GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH)``."""

    id = "gptqmodel"
    package = "gptqmodel"
    requires = ("gptqmodel",)
    extra = "gptq"
    formats = ("gptq", "gptq_v2", "awq")

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`."""
        from gptqmodel import BACKEND, GPTQModel  # noqa: PLC0415

        awq = checkpoint.format is not None and checkpoint.format.id == "awq"
        with no_compile():
            loaded = GPTQModel.load(
                str(checkpoint.reader.folder.resolve()),
                device=str(device),
                backend=BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH,
                dtype=torch.float16,
            )
        return ModuleSession(loaded.model.eval())
