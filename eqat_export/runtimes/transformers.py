"""transformers' ``AutoModelForCausalLM``: dense folders by itself, GPTQ through optimum and gptqmodel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .base import Runtime, no_compile

__all__ = ["TransformersRuntime"]


class TransformersRuntime(Runtime):
    """``AutoModelForCausalLM.from_pretrained(folder)``."""

    id = "transformers"
    package = "transformers"
    requires = ("optimum", "gptqmodel")
    extra = "gptq"
    formats = ("gptq", "gptq_v2", None)

    def load(self, folder: Path, bits: int | None, device: torch.device) -> nn.Module:
        """See :class:`Runtime`."""
        from transformers import AutoModelForCausalLM, GPTQConfig  # noqa: PLC0415

        options = {} if bits is None else {"quantization_config": GPTQConfig(bits=bits, backend="gptq_torch")}
        with no_compile():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map=str(device), **options)
        return model.eval()
