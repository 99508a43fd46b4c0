"""Kills an export that is spread over processes, at one place after another, and looks at what is left each time.

    python kill_export.py CHECKPOINT FOLDER TARGET STRIDE

The exporting process is killed (SIGKILL) before every file operation that Python audits (opening for writing, renaming,
removing, making a folder) and before every fsync; a worker before every message that it gets. Whatever happens, the
output is absent or complete, and the same command then makes the bytes of an export that nothing stopped, leaving
nothing hidden. Processes are forks of this
one, which has imported everything and computed nothing. Prints the number of kills of both kinds.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import torch

from eqat_export import convert as convert_module
from eqat_export.convert import convert
from eqat_export.parallel import worker as worker_module
from eqat_export.parallel.channel import Channel
from eqat_export.parallel.processes import Processes
from formats import get_format, get_format_class
from formats.errors import CheckpointError
from formats.model import open_checkpoint
from formats.model_writer import create_model

WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
KILLED, REFUSED = -signal.SIGKILL, 2


class Child:
    """A fork, with the few methods of ``subprocess.Popen`` that are used."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            work()
        except CheckpointError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(REFUSED)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class Forks(Processes):
    """Workers as forks; ``dies_at`` is the message before which the first one is killed."""

    dies_at: int | None = None

    def _start(self, name: str) -> None:
        ours, theirs = Pipe()
        left = self.dies_at if not self.channels else None

        def work() -> None:
            for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, theirs.fileno()}:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(descriptor)
            channel = Channel(theirs, "the export")
            if left is not None:
                watch_messages(channel, left)
            worker_module.serve(channel)

        self._children.append(Child(work))  # type: ignore[arg-type]
        theirs.close()
        self.channels.append(Channel(ours, name))


def watch_messages(channel: Channel, left: int) -> None:
    receive = channel.receive

    def counting() -> dict[str, Any]:
        nonlocal left
        message = receive()
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return message

    channel.receive = counting  # type: ignore[method-assign]


def watch_files(folder: Path, act: Callable[[], None]) -> None:
    """Calls ``act`` before every change that this process makes to files in a folder, and before it syncs one."""
    mine, prefix = os.getpid(), str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(path, str | os.PathLike) and bool(flags & WRITING)
        else:
            changes = event in CHANGES
            path = arguments[0] if changes else None
        if changes and os.getpid() == mine and os.path.abspath(os.fspath(path)).startswith(prefix):
            act()

    sys.addaudithook(hook)
    os.fsync = lambda descriptor: act()


def contents(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def main(source: Path, folder: Path, target: str, stride: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written, and disks take their time
    convert_module.Processes = Forks  # type: ignore[misc]
    with open_checkpoint(source) as checkpoint:  # imports what is imported late, once for all forks
        create_model(get_format(target), folder / "none", checkpoint)
    out = folder / f"out{get_format_class(target).suffix}"

    def export(workers: int = 2) -> None:
        convert(source, out, target, workers=workers, shard_size=100_000)

    def check(expected: dict[str, bytes], what: str) -> None:
        if out.exists() and contents(out) != expected:
            sys.exit(f"{what}: something else than the whole model is there")
        if not out.exists() and Child(partial(export, 1)).wait():
            sys.exit(f"{what}: the same command failed")
        if contents(out) != expected:
            sys.exit(f"{what}: other bytes than without it")
        left = [path.name for path in folder.iterdir() if path != out and "replaced" not in path.name]
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        if left:
            sys.exit(f"{what}: left {left}")

    if Child(export).wait():
        sys.exit("the export that nothing stops failed")
    expected = contents(out)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    places = 0
    while Child(partial(killed_export, folder, places, export)).wait() == KILLED:
        check(expected, f"killed before file operation {places}")
        places += 1
    check(expected, f"killed before file operation {places}, which there is not")
    messages, status = 0, REFUSED
    while status:
        Forks.dies_at = messages
        status = Child(export).wait()
        Forks.dies_at = None
        left = list(folder.iterdir())
        if status not in (0, REFUSED) or left != ([] if status else [out]):
            sys.exit(f"worker killed before message {messages}: ended with {status}, left {left}")
        check(expected, f"worker killed before message {messages}")
        messages += stride
    return places, messages // stride - 1


def killed_export(folder: Path, number: int, export: Callable[[], None]) -> None:
    """Is killed before the file operation of this number, if there is one."""
    left = number

    def act() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    watch_files(folder, act)
    export()


if __name__ == "__main__":
    print(*main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
