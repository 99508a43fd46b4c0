"""From logits to the next token, without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formats.errors import InputError

__all__ = ["Sampler"]


@dataclass
class Sampler:
    """Chooses tokens; the same seed gives the same choices.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: the smallest set of likeliest tokens whose probabilities reach it is kept; 1 keeps all.
        seed: of the choices.
        device: where the logits are.

    Raises:
        InputError: a value outside of its range.
    """

    temperature: float
    top_p: float
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; allowed are 0 (the likeliest token) and above")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; allowed are numbers above 0 up to 1")
        self._generator = torch.Generator(self.device).manual_seed(self.seed)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """The chosen token, int64 ``[1, 1]``, of logits ``[vocabulary]``."""
        if self.temperature == 0:
            return logits.argmax().view(1, 1)
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
        # argmax of p / e with e exponential draws from p: a draw that needs neither a sum nor the host
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator)
        return (probabilities / noise).argmax().view(1, 1)
