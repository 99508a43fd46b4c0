"""A model that is run token by token: a prompt at once, then steps of one token on a cache of fixed size.

On CUDA the step is captured in a CUDA graph, because at batch 1 launching a model's kernels takes longer than running
them. A captured step may neither wait for the device nor change a shape, hence the cache of fixed size, whose length is
a tensor. Architectures with another state than attention (recurrent layers) keep transformers' growing cache and run
uncaptured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..ops.launches import overlapping_launches

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

__all__ = ["Decoder", "GraphedDecoder", "ModelDecoder"]

WARMUP_STEPS = 2  # they compile and tune kernels and create the libraries' handles


class Decoder(ABC):
    """What the generating loop needs of a model.

    Attributes:
        device: where ids go and logits come from.
        max_length: tokens that fit, prompt and generated together.
    """

    device: torch.device
    max_length: int

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """Forgets what was and reads a prompt, int64 ``[1, length]``.

        Returns:
            Logits ``[vocabulary]`` of the token after it.
        """

    @abstractmethod
    def step(self, token: Tensor) -> Tensor:
        """Reads one more token, int64 ``[1, 1]``: logits ``[vocabulary]`` of the token after it."""

    @abstractmethod
    def counters(self) -> Sequence[Tensor] | None:
        """Tensors that say how much was read: putting them back undoes a step. None where steps cannot be captured."""


class ModelDecoder(Decoder):
    """Any causal language model of transformers, through its own forward pass.

    Args:
        model: in evaluation mode, on one device.
        max_length: tokens that fit.
    """

    def __init__(self, model: PreTrainedModel, max_length: int) -> None:
        self.model, self.max_length, self.device = model, max_length, model.device
        self._cache: Cache | None = None

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """See Decoder."""
        if self._cache is None or self.counters() is None:
            self._cache = _new_cache(self.model, self.max_length)
        else:  # a captured step knows these very tensors
            self._cache.reset()
        return self.step(ids)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        """See Decoder."""
        model = cast(Any, self.model)
        return model(input_ids=token, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def counters(self) -> Sequence[Tensor] | None:
        """See Decoder."""
        lengths = [getattr(layer, "cumulative_length", None) for layer in self._cache.layers] if self._cache else []
        tensors = [length for length in lengths if isinstance(length, Tensor)]
        return tensors if tensors and len(tensors) == len(lengths) else None


class GraphedDecoder(Decoder):
    """A decoder whose step is replayed from a CUDA graph, captured at the first step after a prompt.

    The logits that ``step`` returns are overwritten by the next one.

    Args:
        decoder: on a CUDA device.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.device, self.max_length = decoder, decoder.device, decoder.max_length
        self._graph: torch.cuda.CUDAGraph | None = None
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self._logits = torch.empty(0, device=self.device)

    def prefill(self, ids: Tensor) -> Tensor:
        """See Decoder."""
        return self.decoder.prefill(ids)

    def step(self, token: Tensor) -> Tensor:
        """See Decoder."""
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._token.copy_(token)
        self._graph.replay()
        return self._logits

    def counters(self) -> Sequence[Tensor] | None:
        """See Decoder."""
        return self.decoder.counters()

    @torch.inference_mode()
    def _capture(self) -> None:
        counters = self.decoder.counters()
        assert counters is not None
        before = [counter.clone() for counter in counters]
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), overlapping_launches():
            for _ in range(WARMUP_STEPS):
                self.decoder.step(self._token)
                _restore_(counters, before)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), overlapping_launches():
            self._logits = self.decoder.step(self._token)
        _restore_(counters, before)  # capturing runs nothing, but a counter on the host would have moved
        self._graph = graph


def _restore_(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _new_cache(model: PreTrainedModel, max_length: int) -> Cache:
    """A cache of ``max_length`` tokens in every attention layer, or transformers' growing one for other layers.

    Sliding-window layers are given full length as well: transformers' short ones keep their position on the host, and
    the attention mask cuts the window in any case.
    """
    from transformers.cache_utils import (  # noqa: PLC0415
        Cache,
        DynamicCache,
        StaticCache,
        StaticLayer,
        StaticSlidingWindowLayer,
    )

    layers = StaticCache(config=model.config, max_cache_len=max_length).layers
    if all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in layers):
        return Cache(layers=[StaticLayer(max_cache_len=max_length) for _ in layers])
    return DynamicCache(config=model.config)
