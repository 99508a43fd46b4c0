"""transformers' ``AutoModelForCausalLM``: dense folders by itself, GPTQ through optimum and gptqmodel."""

from __future__ import annotations

import torch

from formats.model import Checkpoint

from .base import ModuleSession, Runtime, Session, no_compile

__all__ = ["TransformersRuntime"]


class TransformersRuntime(Runtime):
    """``AutoModelForCausalLM.from_pretrained(folder)``."""

    id = "transformers"
    package = "transformers"
    requires = ("optimum", "gptqmodel")
    extra = "gptq"
    formats = ("gptq", "gptq_v2", None)

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`."""
        from transformers import AutoModelForCausalLM, GPTQConfig  # noqa: PLC0415

        scheme = checkpoint.scheme
        options = {} if scheme is None else {"quantization_config": GPTQConfig(bits=scheme.bits, backend="gptq_torch")}
        with no_compile():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.reader.folder, dtype=torch.float16, device_map=str(device), **options
            )
        return ModuleSession(model.eval())
