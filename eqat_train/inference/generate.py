"""The generating loop: one token after the other, each handed out while the next is being computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from formats.errors import InputError

from .decoder import Decoder
from .sampling import Sampler

__all__ = ["generate"]


def generate(
    decoder: Decoder, ids: Tensor, sampler: Sampler, max_new_tokens: int, stop: Collection[int] = ()
) -> Iterator[int]:
    """Continues a prompt.

    The host runs one token ahead of what it hands out, so that the device does not wait for it.

    Args:
        decoder: the model.
        ids: the prompt, int64 ``[1, length]``.
        sampler: chooses tokens.
        max_new_tokens: at most so many are yielded.
        stop: the text ends before any of these.

    Yields:
        Token ids.

    Raises:
        InputError: the prompt is empty, or prompt and new tokens do not fit the decoder.
    """
    length = ids.shape[1]
    if not length:
        raise InputError("the prompt has no tokens; give at least one")
    if length + max_new_tokens > decoder.max_length:
        raise InputError(f"{length} + {max_new_tokens} tokens; this decoder holds {decoder.max_length}")
    token = sampler(decoder.prefill(ids.to(decoder.device)))
    coming = deque([_Readback(token)])
    for _ in range(max_new_tokens - 1):
        token = sampler(decoder.step(token))
        coming.append(_Readback(token))
        value = coming.popleft().value()
        if value in stop:
            return
        yield value
    value = coming.popleft().value()
    if value not in stop:
        yield value


class _Readback:
    """A token on its way from the device."""

    def __init__(self, token: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._token = token
        if token.device.type == "cuda":
            self._token = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
            self._token.copy_(token, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._token)
