"""Exports shared by ranks: the bytes of a single process, and an end for everybody when one is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest

from eqat_export.convert import convert
from eqat_export.parallel import ranks
from eqat_export.parallel.channel import Channel
from eqat_export.parallel.ranks import Group, Ranks, find_group, serve_rank
from eqat_export.parallel.worker import serve
from formats.errors import CheckpointError, InputError

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = {
    "RANK": "1",
    "WORLD_SIZE": "6",
    "LOCAL_WORLD_SIZE": "6",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_ranks_under_torchrun_write_what_one_process_writes(native: Callable[..., Path], tmp_path: Path) -> None:
    source = native()
    convert(source, tmp_path / "alone", "gptq", workers=1, shard_size=60_000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    export = [
        "-m",
        "eqat_export",
        "export",
        source,
        "--to",
        "gptq",
        "--out",
        tmp_path / "ranks",
        "--shard-size",
        "60kB",
    ]
    outcome = subprocess.run(
        [*launch, *export, "--shard-size", "60kB", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["layers"] == 14
    assert contents(tmp_path / "ranks") == contents(tmp_path / "alone")
    assert len(list((tmp_path / "ranks").glob("*.safetensors"))) > 2


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """Rank 0 of two in this process, whose own worker is a thread."""

    def start(self: Ranks, name: str) -> None:
        ours, theirs = Pipe()
        threading.Thread(target=serve, args=(Channel(theirs, "rank 0"),), daemon=True).start()
        self.channels.append(Channel(ours, name))

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for name, value in (VARIABLES | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Ranks, "_start", start)
    found = find_group()
    assert found == Group(0, 2, "eqat/export/0")
    return found


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def test_a_rank_that_is_gone_ends_the_export(native: Callable[..., Path], tmp_path: Path, group: Group) -> None:
    """It comes in, after somebody without the key, and leaves when it is given something to do."""
    source = native()
    before = sorted(tmp_path.iterdir())

    def leave() -> None:
        port, key = ranks._address(Group(1, 2, group.key))
        for hello in ({"key": "guessed", "rank": 1}, {"key": key, "rank": 1}):
            channel = Channel(Connection(socket.create_connection(("127.0.0.1", port)).detach()), "rank 0")
            channel.send(hello)
            if hello["key"] == key:
                channel.receive()
            else:
                assert channel.connection.poll(20)
                with pytest.raises(EOFError):
                    channel.connection.recv_bytes()
            channel.close()

    thread, raised = in_thread(leave)
    with pytest.raises(CheckpointError, match="rank 1 of 2 is gone; nothing was written; start all ranks again"):
        convert(source, tmp_path / "out", "gptq", group=group)
    thread.join(20)
    assert not raised
    assert sorted(tmp_path.iterdir()) == before


def test_when_rank_0_gives_up_the_others_do(
    native: Callable[..., Path], edited: Callable[..., Path], tmp_path: Path, group: Group
) -> None:
    source = edited(native(), lambda tensors: tensors["model.layers.1.mlp.up_proj.scales"].fill_(float("nan")))
    thread, raised = in_thread(lambda: serve_rank(Group(1, 2, group.key)))
    with pytest.raises(CheckpointError, match="scales hold NaN"):
        convert(source, tmp_path / "out", "gptq", group=group)
    thread.join(20)
    assert "rank 0 gave up, and so does rank 1; rank 0 says why" in str(raised)


def test_everything_is_on_disk_before_it_is_published(
    native: Callable[..., Path], tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank syncs each of its files; rank 0 learns of a failure to."""
    source = native()
    fsync, threads = os.fsync, []

    def noted(descriptor: int) -> None:
        threads.append(threading.current_thread().name)
        fsync(descriptor)

    def refused(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", noted)
    thread, raised = in_thread(lambda: serve_rank(Group(1, 2, group.key)))
    convert(source, tmp_path / "out", "gptq", group=group, shard_size=60_000)
    thread.join(20)
    assert not raised
    assert len(set(threads)) == 3  # the publisher's, and those of both ranks
    last_of_ranks = max(i for i, name in enumerate(threads) if name != threading.current_thread().name)
    assert all(name == threading.current_thread().name for name in threads[last_of_ranks + 1 :])
    assert len(threads) - last_of_ranks > 4
    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = find_group()
    assert again is not None and again.key != group.key
    thread, raised = in_thread(lambda: serve_rank(Group(1, 2, again.key)))
    with pytest.raises(CheckpointError, match="no space left"):
        convert(source, tmp_path / "second", "gptq", group=again)
    thread.join(20)
    assert not (tmp_path / "second").exists()


def test_the_group_is_read_from_torchruns_variables() -> None:
    assert find_group(VARIABLES) == Group(1, 6, "eqat/export/0")
    assert find_group(VARIABLES | {"TORCHELASTIC_RESTART_COUNT": "2"}) == Group(1, 6, "eqat/export/2")
    assert find_group(VARIABLES | {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}) is None
    with pytest.raises(InputError, match="6 ranks with 2 here are on several machines"):
        find_group(VARIABLES | {"LOCAL_WORLD_SIZE": "2"})
    for name in VARIABLES:
        assert find_group({key: value for key, value in VARIABLES.items() if key != name}) is None
    with pytest.raises(InputError, match="RANK, WORLD_SIZE, LOCAL_WORLD_SIZE are numbers"):
        find_group(VARIABLES | {"RANK": "first"})


def test_a_rank_waits_for_rank_0_only_so_long(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_PATIENCE", ranks.timedelta(seconds=0.2))

    class Silent:
        def check(self, keys: list[str]) -> bool:
            return False

    monkeypatch.setattr(ranks, "_store", lambda group: Silent())
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="rank 0 said nothing for"):
        serve_rank(group)
    assert time.monotonic() - started < 10


def test_workers_and_ranks_are_one_too_many(native: Callable[..., Path], tmp_path: Path, group: Group) -> None:
    with pytest.raises(InputError, match="--workers is for one process, and torchrun started several"):
        convert(native(), tmp_path / "out", "gptq", workers=2, group=group)
