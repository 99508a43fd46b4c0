"""Kills a training run at its file operations, one after another, and lets the same command go on each time.

    python kill_everywhere.py FOLDER CONFIG_JSON STRIDE

FOLDER holds the model and the texts that CONFIG_JSON names. Every file operation that Python audits (opening for
writing, renaming, removing, making a folder) is a place to be killed at with SIGKILL, just before it; STRIDE takes
every n-th of them. After each kill the run is started again and must end with the very bytes of a run that nothing
stopped. Each run is a fork of this process, which has imported everything and computed nothing. Prints the number of
kills.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eqat_train.config import build_config
from eqat_train.models.loading import build_skeleton, load_tokenizer
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter
from formats.errors import OutputExistsError

OUT = "made"
EXISTS = 3
WRITING = os.O_WRONLY | os.O_RDWR


def watch(folder: Path, act: Callable[[], None]) -> None:
    """Calls ``act`` before every change that this process makes to files in a folder."""
    prefix = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(path, str | os.PathLike) and bool(flags & WRITING)
        else:
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
            path = arguments[0] if changes else None
        if changes and os.path.abspath(os.fspath(path)).startswith(prefix):
            act()

    sys.addaudithook(hook)


def forked(work: Callable[[], None]) -> int:
    """Runs something in a fork; gives its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        work()
    except OutputExistsError:
        os._exit(EXISTS)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main(folder: Path, settings: dict[str, Any], stride: int) -> int:
    torch.set_num_threads(1)
    model = Path(settings["model"])
    build_skeleton(model, torch.float32)  # imports what transformers imports late, once for all forks
    load_tokenizer(model)

    def run() -> None:
        train(build_config({**settings, "out": OUT}), Reporter())

    def place(name: str) -> Path:
        made = folder / name
        made.mkdir()
        for file in folder.glob("*.txt"):
            shutil.copy(file, made)
        os.chdir(made)
        return made

    def counted() -> None:
        count = 0

        def add() -> None:
            nonlocal count
            count += 1

        watch(whole, add)
        run()
        (folder / "count").write_text(str(count))

    whole = place("whole")
    if forked(counted):
        sys.exit("the run that nothing stops failed")
    expected = (whole / OUT / "model.safetensors").read_bytes()
    kills = range(0, int((folder / "count").read_text()), stride)
    for number in kills:
        here = place(f"kill-{number}")

        def killed(here: Path = here, number: int = number) -> None:
            left = number

            def act() -> None:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            watch(here, act)
            run()

        if not os.WIFSIGNALED(status := forked(killed)):
            if status == 0 and number >= kills.stop - 2:  # clearing up takes an operation more or less
                continue
            sys.exit(f"kill {number}: the run ended with {status} before it was killed")
        complete = (here / OUT / "training_report.json").exists()
        status = os.waitstatus_to_exitcode(forked(run))
        if status and not (status == EXISTS and complete):  # killed when everything was done but the clearing up
            sys.exit(f"kill {number}: the same command ended with {status}")
        if (here / OUT / "model.safetensors").read_bytes() != expected:
            sys.exit(f"kill {number}: other weights than without it")
        if not complete and (left := sorted(file.name for file in here.glob(f"{OUT}.*"))):
            sys.exit(f"kill {number}: left {left}")
        shutil.rmtree(here)
    return len(kills)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])))
