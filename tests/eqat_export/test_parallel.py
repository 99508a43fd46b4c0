"""Exports spread over processes: the same bytes, one error, and nothing left by whoever is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eqat_export import convert as convert_module
from eqat_export.convert import convert
from eqat_export.parallel import plan, processes
from eqat_export.parallel.channel import Channel
from eqat_export.parallel.worker import serve
from formats import available_formats, get_format_class
from formats.container import ModelWriter
from formats.errors import CheckpointError, InputError, UnsupportedSchemeError

ROOT = Path(__file__).resolve().parents[2]
UP = "model.layers.1.mlp.up_proj"


class Threads:
    """Workers that are threads of this process: what they do is the same, and they start at once."""

    started = 0

    def __init__(self, count: int, settings: dict[str, Any]) -> None:
        self.channels: list[Channel] = []
        Threads.started += count
        for i in range(count):
            ours, theirs = Pipe()
            threading.Thread(target=serve, args=(Channel(theirs, "the export"),), daemon=True).start()
            self.channels.append(Channel(ours, f"worker {i}"))
            self.channels[-1].send({"open": settings})

    def loss(self, channel: Channel) -> Exception:
        return AssertionError(channel.name)

    def finish(self) -> None:
        pass

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self.channels:
            channel.close()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> type[Threads]:
    monkeypatch.setattr(convert_module, "Processes", Threads)
    monkeypatch.setattr(Threads, "started", 0)
    return Threads


def contents(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def out_of(folder: Path, target: str) -> Path:
    return folder / f"out{get_format_class(target).suffix}"


@pytest.mark.parametrize("target", sorted(available_formats()))
def test_any_number_of_workers_writes_the_same_bytes(
    native: Callable[..., Path], tmp_path: Path, threads: type[Threads], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded, with biases, and with large tensors copied instead of encoded."""
    if target in ("gguf", "onnx"):
        pytest.importorskip(target)
    monkeypatch.setattr(plan, "_COPIED", 1000)
    source = native(bits=4, architecture="llama" if target == "onnx" else "qwen2")
    results = []
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        result = convert(source, out_of(folder, target), target, workers=count, shard_size=60_000)
        results.append((contents(out_of(folder, target)), result.as_json() | {"out": ""}, result.exact_option))
    assert threads.started == 5
    assert results[0] == results[1] == results[2]
    if target != "gguf":
        assert sum(name.endswith(".safetensors") or ".data" in name for name in results[0][0]) > 2


def test_processes_of_their_own_write_the_same_bytes(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path
) -> None:
    source = native(bits=2, scale_dtype=torch.float32)
    reports = []
    for count in (1, 2):
        out = tmp_path / str(count) / "out"
        outcome = eqat("export", source, "--to", "gptq", "--out", out, "--workers", count, "--json")
        assert (outcome.code, outcome.err) == (0, "")
        reports.append(json.loads(outcome.out) | {"out": ""})
    assert reports[0] == reports[1] and reports[0]["rounded"]["tensors"] == 14
    assert contents(tmp_path / "1" / "out") == contents(tmp_path / "2" / "out")


def test_an_error_is_the_one_that_a_single_process_meets_first(
    native: Callable[..., Path], edited: Callable[..., Path], tmp_path: Path, threads: type[Threads]
) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        for name in (f"{UP}.scales", "model.layers.1.mlp.down_proj.scales", "model.layers.0.mlp.up_proj.scales"):
            tensors[name][0, 0] = float("nan")

    source = edited(native(), damage)
    before = sorted(tmp_path.iterdir())
    said = []
    for count in (1, 3):
        with pytest.raises(CheckpointError, match="scales hold NaN") as caught:
            convert(source, tmp_path / "out", "gptq", workers=count)
        said.append(str(caught.value))
        assert sorted(tmp_path.iterdir()) == before
    assert said[0] == said[1]


def test_errors_of_workers_keep_their_kind_and_text(
    native: Callable[..., Path], edited: Callable[..., Path], tmp_path: Path, threads: type[Threads]
) -> None:
    source = native(bits=4, scale_dtype=torch.float32)
    source = edited(source, lambda tensors: tensors[f"{UP}.scales"][0, 0].fill_(1e6))
    said = []
    for count in (1, 2):
        with pytest.raises(UnsupportedSchemeError, match=r"a scale is 1e\+06; gptq stores fp16") as caught:
            convert(source, tmp_path / "out", "gptq", workers=count)
        said.append((str(caught.value), caught.value.reason, caught.value.instead))
    assert said[0] == said[1]


def test_a_bug_in_a_worker_is_told_as_one(
    native: Callable[..., Path], tmp_path: Path, threads: type[Threads], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eqat_export.parallel import worker  # noqa: PLC0415

    def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody thought of it")

    source = native()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(worker, "encode_part", broken)
    with pytest.raises(RuntimeError, match=r"Traceback[^$]*in broken[^$]*ZeroDivisionError: nobody thought of it"):
        convert(source, tmp_path / "out", "gptq", workers=2)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("target", "stride"), [("gptq", 5), ("gguf", 7)])
def test_killed_anywhere_nothing_is_left_that_loads(
    native: Callable[..., Path], tmp_path: Path, target: str, stride: int
) -> None:
    if target == "gguf":
        pytest.importorskip("gguf")
    source, folder = native(), tmp_path / "exports"
    folder.mkdir()
    outcome = subprocess.run(
        [sys.executable, Path(__file__).with_name("kill_export.py"), source, folder, target, str(stride)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    places, messages = map(int, outcome.stdout.split())
    assert places > (20 if target == "gptq" else 3) and messages > 2
    assert "worker 1 of 2 was killed" in outcome.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_process_and_leaves_nothing(
    native: Callable[..., Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """As a terminal does it: the whole group gets the signal."""
    source = native()
    before = sorted(tmp_path.iterdir())
    child = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            textwrap.dedent("""
                import signal
                signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests' own parent ignored
                from eqat_export import cli
                cli.main()
            """),
            *("export", str(source), "--to", "gptq", "--out", str(tmp_path / "out"), "--workers", "2"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(members(child.pid)) < 3:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    os.killpg(child.pid, number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
    assert not members(child.pid)


@pytest.mark.parametrize("started", [1, 2])
def test_a_signal_while_workers_start_leaves_none(monkeypatch: pytest.MonkeyPatch, started: int) -> None:
    """Ctrl-C as soon as a worker exists, before its parent has got hold of it."""
    children: list[subprocess.Popen[bytes]] = []

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen(*arguments, **options))
        if len(children) == started:
            os.kill(os.getpid(), signal.SIGINT)
        return children[-1]

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": popen}))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), processes.Processes(2, {}):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(children) == started
    assert [child.returncode for child in children] == [-signal.SIGKILL] * started


def members(group: int) -> list[int]:
    """Processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def crew(asked: int | None, memory: int, writer: object) -> plan.Crew:
    return plan.choose_crew(asked, [plan.Task("a", "layer", memory)], writer)  # type: ignore[arg-type]


def test_one_process_unless_more_are_asked_for_and_they_share_the_memory() -> None:
    from formats.model_writer import FolderWriter  # noqa: PLC0415

    writer = object.__new__(FolderWriter)
    assert crew(None, 10**8, writer).workers == 1
    for count in (1, 2, 6, 8):
        asked = crew(count, 7 * 10**8, writer)
        assert asked.workers == count
        assert asked.memory + plan._PARENT + count * plan._WORKER <= plan.LIMIT
    assert crew(2, 7 * 10**8, writer).keep_memory and not crew(8, 7 * 10**8, writer).keep_memory


def test_workers_that_cannot_be_had_are_refused(native: Callable[..., Path], tmp_path: Path, eqat: Callable) -> None:
    class Own(ModelWriter):
        pass

    with pytest.raises(InputError, match="--workers 2: this format's writer takes tensors from one process only"):
        crew(2, 1, Own)
    assert crew(None, 1, Own).workers == 1
    outcome = eqat("export", native(), "--to", "gptq", "--workers", "0")
    assert outcome.code == 2 and "--workers is 0; it is a positive number" in outcome.err
