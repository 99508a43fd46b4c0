"""Batches of a split in order; those that are not on the computing device are fetched while the one before is used.

From pinned RAM a batch is copied on a stream of its own. From disk a thread reads it into pinned memory first. Two sets
of buffers take turns, so what is fetched never overwrites what is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .activations import ActivationStore
    from .passes import Streams

__all__ = ["batches"]

Batch = tuple[Tensor, Tensor]  # quantized stream, full-precision stream: fp32 [batch, seq, hidden]


def batches(streams: Streams, size: int) -> Iterator[Batch]:
    """Goes through a split once, ``size`` samples at a time; the last batch may be smaller.

    A batch is valid until the next one is asked for, on the current stream.
    """
    spans = [(start, min(start + size, len(streams.full))) for start in range(0, len(streams.full), size)]
    stores = (streams.quantized, streams.full)
    if streams.full.device.type != "cuda" or streams.full.is_on_device:
        for start, stop in spans:
            yield stores[0].read(start, stop), stores[1].read(start, stop)
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        slots = [_Slot(stores, size), _Slot(stores, size)]
        pending: list[Future[None]] = [
            thread.submit(slot.fetch, *span) for slot, span in zip(slots, spans, strict=False)
        ]
        for index, (start, stop) in enumerate(spans):
            slot = slots[index % 2]
            pending[index].result()
            yield slot.take(stop - start)
            slot.release()
            if index + 2 < len(spans):
                pending.append(thread.submit(slot.fetch, *spans[index + 2]))


class _Slot:
    """One set of buffers on the device, and of pinned ones where the stores are not pinned themselves."""

    def __init__(self, stores: tuple[ActivationStore, ActivationStore], size: int) -> None:
        self._stores, self._device = stores, stores[0].device
        shape = (size, *stores[0].shape[1:])
        self._buffers = [torch.empty(shape, dtype=store.dtype, device=self._device) for store in stores]
        self._staging = [
            None if store.is_pinned else torch.empty(shape, dtype=store.dtype, pin_memory=True) for store in stores
        ]
        self._stream = torch.cuda.Stream(self._device)
        # What was written to the stores and is still under way to pinned memory comes first.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._fetched, self._free = torch.cuda.Event(), torch.cuda.Event()

    def fetch(self, start: int, stop: int) -> None:
        """Begins to copy samples to the device; called in the thread."""
        count = stop - start
        with torch.cuda.stream(self._stream):
            self._fetched.synchronize()  # the staging buffer's last copy is done
            for store, staging in zip(self._stores, self._staging, strict=True):
                if staging is not None:
                    staging[:count].copy_(store.samples(start, stop))
            self._stream.wait_event(self._free)
            for store, buffer, staging in zip(self._stores, self._buffers, self._staging, strict=True):
                source = store.samples(start, stop) if staging is None else staging[:count]
                buffer[:count].copy_(source, non_blocking=True)
            self._fetched.record(self._stream)

    def take(self, count: int) -> Batch:
        """What was fetched, for the current stream."""
        torch.cuda.current_stream(self._device).wait_event(self._fetched)
        quantized, full = (buffer[:count].float() for buffer in self._buffers)
        return quantized, full

    def release(self) -> None:
        """The current stream has been given all work on the batch."""
        self._free.record(torch.cuda.current_stream(self._device))
