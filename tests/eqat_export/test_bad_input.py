"""Bad input and interrupted work: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from eqat_export import convert as convert_module
from eqat_export.convert import convert
from formats.checkpoint import CheckpointWriter

ROOT = Path(__file__).resolve().parents[2]


def missing_shard(folder: Path) -> str:
    next(folder.glob("model-00002-*")).unlink()
    return "model-00002"


def truncated(folder: Path) -> str:
    shard = next(folder.glob("model-00001-*"))
    os.truncate(shard, shard.stat().st_size - 100)
    return "model-00001"


def header_larger_than_file(folder: Path) -> str:
    shard = next(folder.glob("model-00001-*"))
    with shard.open("r+b") as file:
        file.write(struct.pack("<Q", 2**40))
    return "model-00001"


def wrong_shape(folder: Path) -> str:
    """Swaps the shape of one qweight in the header; the number of bytes stays right."""
    for shard in sorted(folder.glob("*.safetensors")):
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        name = "model.layers.1.mlp.up_proj.qweight"
        if name in header:
            header[name]["shape"] = header[name]["shape"][::-1]
            text = json.dumps(header).encode().ljust(length)
            shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return "model.layers.1.mlp.up_proj"


def unknown_format(folder: Path) -> str:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    path.write_text(json.dumps(config))
    return "awq"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return "config.json"


def nothing_there(folder: Path) -> str:
    shutil.rmtree(folder)
    return str(folder)


DAMAGES = (
    missing_shard,
    truncated,
    header_larger_than_file,
    wrong_shape,
    unknown_format,
    no_config,
    broken_config,
    nothing_there,
)


@pytest.fixture
def sharded(native: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    convert(native(), folder, "native", shard_size=100_000)
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(
    eqat: Callable, sharded: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    named = damage(sharded)
    before = sorted(tmp_path.iterdir())
    outcome = eqat("export", sharded, "--to", "gptq", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1
    assert named in outcome.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", [missing_shard, truncated, unknown_format], ids=lambda damage: damage.__name__)
def test_verify_and_inspect_of_an_unreadable_checkpoint_are_bad_input(
    eqat: Callable, sharded: Path, damage: Callable[[Path], str]
) -> None:
    named = damage(sharded)
    for command in ("verify", "inspect"):
        outcome = eqat(command, sharded)
        assert outcome.code == 2
        assert named in outcome.err and len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left"),
        (ZeroDivisionError("surprise"), 70, "unexpected ZeroDivisionError: surprise"),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing(
    eqat: Callable,
    native: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    source = native()
    count = 0
    real = convert_module.write_layer

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 5:
            assert any(path.name.startswith(".out") for path in tmp_path.iterdir())
            raise error
        return real(*arguments)

    monkeypatch.setattr(convert_module, "write_layer", failing)
    before = sorted(tmp_path.iterdir())
    outcome = eqat("export", source, "--to", "gptq", "--out", tmp_path / "out")
    assert outcome.code == code
    assert said in outcome.err and len(outcome.err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert not Path(".eqat").exists()


def test_a_forced_export_that_fails_keeps_the_old_output(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = native()
    assert eqat("export", source, "--to", "gptq", "--out", tmp_path / "out").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "copy_companions", interrupted)
    assert eqat("export", source, "--to", "gptq_v2", "--out", tmp_path / "out", "--force").code == 130
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_full_disk_is_one_line_and_leaves_nothing(native: Callable[..., Path], tmp_path: Path) -> None:
    """The operating system itself refuses the write: no file may grow beyond 60 kB in the child."""
    source = native()
    before = sorted(tmp_path.iterdir())
    child = start(
        """
        import resource, sys
        from eqat_export.cli import run
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        sys.exit(run(sys.argv[1:]))
        """,
        *("export", source, "--to", "gptq", "--out", tmp_path / "deep" / "out"),
    )
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (2, "")
    assert "no space left" in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_nothing(
    native: Callable[..., Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    source = native()
    before = sorted(tmp_path.iterdir())
    child = start(
        """
        import sys, time
        from eqat_export import cli, convert
        convert.write_layer = lambda *arguments: time.sleep(100)
        cli.main()
        """,
        *("export", source, "--to", "gptq", "--out", tmp_path / "out"),
    )
    deadline = time.monotonic() + 60
    while not any(path.name.startswith(".out") for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
