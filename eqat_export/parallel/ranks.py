"""An export shared by the ranks that torchrun started, on one machine.

Rank 0 plans, tells places and publishes; every rank encodes and writes, rank 0 by a process of its own. Ranks find rank
0 through torchrun's own store and talk to it over TCP, JSON messages alone, after a key that only the store knows.
What a rank wrote is on disk before rank 0 publishes.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from eqat_export.parallel.channel import Channel, ChannelClosedError, error_of, ready
from eqat_export.parallel.processes import Processes
from eqat_export.parallel.worker import serve
from formats.errors import CheckpointError, InputError

__all__ = ["Group", "Ranks", "find_group", "serve_rank"]

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOOPBACK = "127.0.0.1"
_PATIENCE = timedelta(minutes=30)  # for rank 0 to open a large checkpoint on a slow disk


@dataclass(frozen=True)
class Group:
    """The ranks that this process is one of.

    Attributes:
        rank: this one's number.
        size: how many there are.
        key: what rank 0's address is called in the store; another one after a restart.
    """

    rank: int
    size: int
    key: str


def find_group(environment: Mapping[str, str] = os.environ) -> Group | None:
    """The ranks that torchrun's variables tell of; None where there are none, or this is the only one.

    Raises:
        InputError: a variable is no number, or the ranks are on several machines: they meet on the loopback alone.
    """
    if not all(name in environment for name in _VARIABLES):
        return None
    try:
        rank, size, local = (int(environment[name]) for name in _VARIABLES[:3])
    except ValueError as exc:
        raise InputError(f"torchrun's variables {', '.join(_VARIABLES[:3])} are numbers: {exc}") from exc
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if size > local:
        raise InputError(f"{size} ranks with {local} here are on several machines; export with ranks of one machine")
    return None if size == 1 else Group(rank, size, f"eqat/export/{attempt}")


class Ranks(Processes):
    """Every rank as a worker, for rank 0; a context manager.

    Args:
        group: the ranks.
        settings: what they open (``worker.py``).
    """

    def __init__(self, group: Group, settings: dict[str, Any]) -> None:
        super().__init__(1, settings | {"durable": True})
        self._group = group

    def loss(self, channel: Channel) -> Exception:
        """See ``Team``."""
        if channel is self.channels[0]:
            return super().loss(channel)
        return CheckpointError(f"{channel.name} is gone; nothing was written; start all ranks again")

    def finish(self) -> None:
        """Returns when everything that any rank wrote is on disk, and lets the ranks go.

        Raises:
            Exception: one of them could not write; or what ``loss`` says.
        """
        left = list(self.channels)
        for channel in left:
            channel.send({"end": True})
        while left:
            for channel in ready(left):
                try:
                    answer = channel.receive()
                except ChannelClosedError as exc:
                    raise self.loss(channel) from exc
                if "error" in answer:
                    raise error_of(answer["error"])
                left.remove(channel)

    def __enter__(self) -> Ranks:
        key = secrets.token_hex(32)
        with socket.create_server((_LOOPBACK, 0)) as server:
            self._store = _store(self._group)  # kept: where torchrun has none, it is this process that serves it
            self._store.set(self._group.key, json.dumps([server.getsockname()[1], key]))
            super().__enter__()
            try:
                while len(self.channels) < self._group.size:
                    self._admit(server, key)
            except BaseException:
                self._end()
                raise
        return self

    def _admit(self, server: socket.socket, key: str) -> None:
        """Lets a rank in that knows the key; anybody else is not answered."""
        connection = Connection(server.accept()[0].detach())
        channel = Channel(connection, "a rank")
        try:
            hello = channel.receive() if connection.poll(_PATIENCE.total_seconds()) else {}
        except (ChannelClosedError, ValueError):
            hello = {}
        if not hmac.compare_digest(str(hello.get("key")), key):
            channel.close()
            return
        channel.name = f"rank {int(hello['rank'])} of {self._group.size}"
        self.channels.append(channel)
        channel.send({"open": self._settings})


def serve_rank(group: Group) -> None:
    """What ranks other than 0 do.

    Raises:
        CheckpointError: rank 0 gave up.
    """
    port, key = _address(group)
    with socket.create_connection((_LOOPBACK, port)) as link:
        channel = Channel(Connection(link.detach()), "rank 0")
    try:
        channel.send({"key": key, "rank": group.rank})
        done = serve(channel)
    except ChannelClosedError:
        done = False
    finally:
        channel.close()
    if not done:
        raise CheckpointError(f"rank 0 gave up, and so does rank {group.rank}; rank 0 says why")


def _address(group: Group) -> tuple[int, str]:
    """Rank 0's port and the key, once it has said so."""
    store, deadline = _store(group), time.monotonic() + _PATIENCE.total_seconds()
    while not store.check([group.key]):  # waiting for it inside the store would let no signal through
        if time.monotonic() > deadline:
            raise CheckpointError(f"rank 0 said nothing for {_PATIENCE}; see what it says, or whether it runs")
        time.sleep(0.05)
    port, key = json.loads(store.get(group.key))
    return port, key


def _store(group: Group) -> dist.Store:
    store, *_ = next(iter(dist.rendezvous("env://", group.rank, group.size, timeout=_PATIENCE)))
    return store
