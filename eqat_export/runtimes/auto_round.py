"""auto-round's own layers, through transformers, by its plain torch kernel."""

from __future__ import annotations

import torch

from formats.model import Checkpoint

from .base import ModuleSession, Runtime, Session, no_compile

__all__ = ["AutoRoundRuntime"]


class AutoRoundRuntime(Runtime):
    """``AutoModelForCausalLM.from_pretrained(folder)`` with auto-round's ``torch`` backend."""

    id = "auto-round"
    package = "auto-round"
    requires = ("auto_round",)
    extra = "auto-round"
    formats = ("auto-round",)

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`."""
        from transformers import AutoModelForCausalLM, AutoRoundConfig  # noqa: PLC0415

        with no_compile():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.reader.folder,
                dtype=torch.float16,
                device_map=str(device),
                quantization_config=AutoRoundConfig(backend="torch"),
            )
        return ModuleSession(model.eval())
