"""This process among the ranks, and the reductions that training needs.

Ranks act together only inside ``together``, which every rank enters for a stage that they share. Outside of it, and in
a process that torchrun did not start as one of several, each value is its own mean and sum, so that what rank 0 does by
itself never waits for a rank that is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from formats.errors import InputError

__all__ = [
    "Ranks",
    "agreed",
    "count_of_ranks",
    "current",
    "join",
    "joined",
    "largest",
    "leave",
    "local_size",
    "mean",
    "own_part",
    "rank",
    "size",
    "suffixed",
    "together",
    "total",
]

# What torchrun tells each process; other launchers set some of these for purposes of their own.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A rank waits this long for the others in a reduction: as long as one may load a block, validate or save.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run.

    Attributes:
        rank: of this process, from 0.
        size: processes, at least 2.
        local_size: of them on this machine.
        device: where this rank computes.
        backend: nccl or gloo.
        store: short texts that ranks leave for each other.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    backend: str
    store: dist.Store


_joined: Ranks | None = None
_acting: Ranks | None = None


def joined() -> Ranks | None:
    """The ranks of this run, acting together or not; None for a process alone."""
    return _joined


@contextmanager
def together() -> Iterator[None]:
    """Inside, the ranks act together; nothing changes in a process alone."""
    global _acting  # noqa: PLW0603
    _acting = _joined
    try:
        yield
    finally:
        _acting = None


def current() -> Ranks | None:
    """The ranks that act together now; None for a process that acts alone."""
    return _acting


def rank() -> int:
    """Of this process, from 0."""
    return 0 if _acting is None else _acting.rank


def size() -> int:
    """Processes that act together now."""
    return 1 if _acting is None else _acting.size


def local_size() -> int:
    """Processes among them on this machine."""
    return 1 if _acting is None else _acting.local_size


def join(device: str, variables: Mapping[str, str] = os.environ) -> Ranks | None:
    """Makes this process one of several where torchrun started it as one of several.

    Args:
        device: auto, cpu or cuda, as the user says it; each rank takes the GPU of its LOCAL_RANK.
        variables: the environment.

    Raises:
        InputError: a device that ranks cannot have, or a machine with fewer GPUs than ranks.
    """
    global _joined  # noqa: PLW0603
    if not all(name in variables for name in VARIABLES) or int(variables["WORLD_SIZE"]) == 1:
        return None
    number, local = int(variables["RANK"]), int(variables["LOCAL_RANK"])
    count, local_count = int(variables["WORLD_SIZE"]), int(variables["LOCAL_WORLD_SIZE"])
    place = _own_device(device, local, local_count)
    backend = "nccl" if place.type == "cuda" else "gloo"
    store, *_ = next(iter(dist.rendezvous("env://", number, count, timeout=timedelta(minutes=10))))
    # torchrun --max-restarts begins anew with another count; what earlier ranks have left in the store is not ours
    attempt = f"eqat/{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"{attempt}/tensors", store),
        rank=number,
        world_size=count,
        timeout=PATIENCE,
        device_id=place if place.type == "cuda" else None,
    )
    _joined = Ranks(number, count, local_count, place, backend, dist.PrefixStore(attempt, store))
    return _joined


def _own_device(device: str, local: int, local_count: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if device not in ("auto", "cuda"):
        raise InputError(
            f"--device is {device!r}; under torchrun each rank takes a GPU of its own: use cuda, cpu or auto"
        )
    found = torch.cuda.device_count()
    if local_count > found:
        raise InputError(
            f"torchrun started {local_count} ranks on a machine where torch sees {found} CUDA devices; "
            f"use --nproc-per-node {found or 1} or --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def leave() -> None:
    """Ends what ``join`` began; the other ranks do so too."""
    global _joined  # noqa: PLW0603
    if _joined is not None:
        dist.destroy_process_group()
        _joined = None


def own_part(count: int) -> slice:
    """This rank's part of ``count`` consecutive things: parts differ by one at the most."""
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def total(tensor: Tensor) -> Tensor:
    """Sum over the ranks, the same bits on each."""
    if _acting is None:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """Mean over the ranks, the same bits on each."""
    return tensor if _acting is None else total(tensor) / _acting.size


def count_of_ranks(value: int) -> int:
    """Sum of the ranks' values."""
    return value if _acting is None else int(total(torch.tensor(value, dtype=torch.int64, device=_acting.device)))


def largest(value: int) -> int:
    """The largest of the ranks' values."""
    if _acting is None:
        return value
    values = torch.tensor(value, dtype=torch.int64, device=_acting.device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def agreed(value: bool) -> bool:
    """Whether it is true on every rank."""
    return not largest(int(not value))


def suffixed(name: str) -> str:
    """A file name of this rank's own: ``train.bin`` is ``train.rank3.bin`` on rank 3."""
    stem, dot, ending = name.rpartition(".")
    return name if _acting is None else f"{stem}.rank{_acting.rank}{dot}{ending}"
