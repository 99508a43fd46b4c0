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
import torch

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
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4, "group_size": 128}
    path.write_text(json.dumps(config))
    return "hqq"


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
    real = convert_module.write_part

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count == 5:
            assert any(path.name.startswith(".out") for path in tmp_path.iterdir())
            raise error
        return real(*arguments)

    monkeypatch.setattr(convert_module, "write_part", failing)
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


WHERE = {  # what the main thread does when the signal comes, and what the workers do
    "while a layer is written": "convert.write_part = lambda *arguments: time.sleep(100)",
    "while layers are encoded": "convert.encode_part = lambda *arguments: time.sleep(2)",
}


@pytest.mark.parametrize("replaced", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_leaves_nothing(
    native: Callable[..., Path], tmp_path: Path, number: signal.Signals, code: int, replaced: str
) -> None:
    source = native()
    before = sorted(tmp_path.iterdir())
    child = start(
        f"""
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests' own parent ignored
        from eqat_export import cli, convert
        {replaced}
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


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("local", "change", "said"),
    [
        ("g_idx", lambda tensor: tensor + 100, "g_idx spans 100.."),
        ("g_idx", lambda tensor: tensor.float(), "g_idx is float32; expected integers"),
        ("g_idx", lambda tensor: tensor[None], "g_idx has shape [1, "),
        ("scales", lambda tensor: tensor * float("nan"), "scales hold NaN"),
        ("scales", lambda tensor: tensor.double(), "scales is float64; allowed are float16"),
        ("qweight", lambda tensor: tensor.long(), "qweight is int64; allowed are int32"),
        ("qzeros", lambda tensor: tensor[:, :-1].contiguous(), "qzeros has shape"),
        ("bias", lambda tensor: torch.zeros(3), "bias ha"),
    ],
)
def test_tensors_that_contradict_the_scheme_are_refused_even_where_packed_integers_are_copied(
    eqat: Callable, native: Callable[..., Path], edited: Callable[..., Path], local: str, change: Callable, said: str
) -> None:
    name = f"{LAYER}.{local}"
    folder = edited(native(), lambda tensors: tensors.update({name: change(tensors.get(name))}))
    for target in ("native", "gptq_v2", "gptq"):
        outcome = eqat("export", folder, "--to", target, "--out", "out")
        assert outcome.code == 2, target
        assert LAYER in outcome.err and said in outcome.err and len(outcome.err.splitlines()) == 1
        assert not Path("out").exists()
    outcome = eqat("verify", folder)
    assert outcome.code == 1
    assert outcome.out.count(LAYER) == 1  # named once, not once by each part that passes it on


@pytest.mark.parametrize(
    ("format_id", "fields", "said"),
    [
        ("gptq", {"dynamic": {"+:(": {}}}, "no regular expression"),
        ("gptq", {"dynamic": [1]}, "dynamic is [1]"),
        ("gptq", {"dynamic": {"+:x": 7}}, "dynamic is"),
        ("native", {"layers": {LAYER: 5}}, "layers is"),
        ("native", {"layers": [5]}, "layers is [5]"),
        ("native", {"bits": "2"}, "bits = '2'; expected an integer"),
        ("native", {"group_size": 0}, "group_size is 0"),
    ],
)
def test_a_malformed_quantization_configuration_is_one_line(
    eqat: Callable, native: Callable[..., Path], format_id: str, fields: dict[str, object], said: str
) -> None:
    folder = native(format_id=format_id)
    for name in ("config.json", "quantize_config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            config.get("quantization_config", config).update(fields)
            (folder / name).write_text(json.dumps(config))
    for arguments in (("export", folder, "--to", "gptq_v2", "--out", "out"), ("inspect", folder)):
        outcome = eqat(*arguments)
        assert outcome.code == 2
        assert said in outcome.err and folder.name in outcome.err and len(outcome.err.splitlines()) == 1
    assert eqat("verify", folder).code in (1, 2)
    assert not Path("out").exists()


@pytest.mark.parametrize("fields", [{"meta": {"quantizer": 7}}, {"meta": 5}, {"meta": {"quantizer": [7]}}])
def test_an_odd_producer_entry_stops_nothing(
    eqat: Callable, native: Callable[..., Path], fields: dict[str, object]
) -> None:
    folder = native(format_id="gptq_v2")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    config["architectures"] = [5]
    (folder / "config.json").write_text(json.dumps(config))
    assert eqat("inspect", folder, "--json").code == 0
    assert eqat("export", folder, "--to", "gptq", "--out", "out").code == 0


def test_modules_to_not_convert_that_is_no_list_is_a_finding(eqat: Callable, native: Callable[..., Path]) -> None:
    folder = native()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    outcome = eqat("verify", folder)
    assert outcome.code == 1
    assert "modules_to_not_convert is 5; expected a list" in outcome.out


def test_the_current_directory_can_be_exported(
    eqat: Callable, native: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = native()
    monkeypatch.chdir(folder)
    assert eqat("export", ".", "--to", "gptq").code == 0
    assert (folder.parent / "native-gptq" / "config.json").exists()
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")
    assert eqat("export", "..", "--to", "gptq_v2").code == 0
    assert (folder.parent / "native-gptq_v2" / "config.json").exists()


def test_an_unreadable_companion_is_named(eqat: Callable, native: Callable[..., Path], tmp_path: Path) -> None:
    folder = native()
    (folder / "extra.json").symlink_to(tmp_path / "gone")
    outcome = eqat("export", folder, "--to", "gptq", "--out", "out")
    assert outcome.code == 2
    assert outcome.err == f"error: cannot read {folder / 'extra.json'}: No such file or directory\n"
    assert not Path("out").exists()
