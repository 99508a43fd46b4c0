"""Outputs that appear whole or not at all, and what killed processes leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from formats.atomic_output import AtomicOutput
from formats.errors import OutputExistsError

ROOT = Path(__file__).resolve().parents[2]


def output(path: Path, *, force: bool = False) -> AtomicOutput:
    return AtomicOutput(path, force=force, replaceable=lambda path: path.suffix == ".ours", unlike="is not ours")


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture(params=["folder", "file"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(at: AtomicOutput, kind: str, text: str = "new") -> None:
    if kind == "file":
        with at.begin_file() as file:
            file.write(text.encode())
    else:
        at.begin_folder()
        (at.working / "inside").write_text(text)


def read(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


def test_it_appears_when_it_is_published(tmp_path: Path, kind: str) -> None:
    at = output(tmp_path / "deep" / "out")
    make(at, kind)
    assert not at.path.exists() and len(hidden(tmp_path / "deep")) == 1
    at.publish()
    at.discard()
    assert read(at.path) == "new" and not hidden(tmp_path / "deep")


def test_discarding_takes_new_folders_away_as_well(tmp_path: Path, kind: str) -> None:
    at = output(tmp_path / "deep" / "deeper" / "out")
    make(at, kind)
    at.discard()
    at.discard()
    assert not list(tmp_path.iterdir())


def test_force_replaces_only_what_is_like_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.ours"
    first = output(path)
    make(first, kind, "old")
    first.publish()
    first.discard()
    with pytest.raises(OutputExistsError, match="choose another --out or give --force"):
        output(path)
    at = output(path, force=True)
    make(at, kind)
    assert read(path) == "old"
    at.publish()
    at.discard()
    assert read(path) == "new" and not hidden(tmp_path)
    other = tmp_path / "other"
    other.write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is not ours, and --force replaces only those"):
        output(other, force=True)


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path, kind: str) -> None:
    at = output(tmp_path / "out")
    make(at, kind)
    at.path.write_text("mine")
    with pytest.raises(OutputExistsError, match="choose another --out"):
        at.publish()
    at.discard()
    assert at.path.read_text() == "mine" and not hidden(tmp_path)


def test_an_output_that_is_being_made_is_left_alone(tmp_path: Path, kind: str) -> None:
    first, second = output(tmp_path / "out"), output(tmp_path / "out")
    make(first, kind, "first")
    make(second, kind, "second")
    assert len(hidden(tmp_path)) == 2
    second.publish()
    second.discard()
    first.discard()
    assert read(tmp_path / "out") == "second" and not hidden(tmp_path)


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent("""
                import sys, time
                from pathlib import Path
                from formats.atomic_output import AtomicOutput
                at = AtomicOutput(Path(sys.argv[1]), force=False, replaceable=bool, unlike="")
                file = at.begin_file() if sys.argv[2] == "file" else at.begin_folder()
                print("made", flush=True)
                time.sleep(100)
            """),
            *(tmp_path / "out", kind),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "made\n"
    named_alike = [".out.partial-notours", ".outer.partial-01234567", ".out.partial-0123456789"]
    for name in named_alike:
        (tmp_path / name).mkdir()
    at = output(tmp_path / "out")
    make(at, kind)
    assert len(hidden(tmp_path)) == 5  # the child lives
    at.discard()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(hidden(tmp_path)) == 4
    make(output(tmp_path / "out"), kind)
    left = [name for name in hidden(tmp_path) if name not in named_alike]
    assert len(left) == 1 and left[0] != at.working.name


def test_a_link_that_is_named_like_a_stale_one_is_not_followed(tmp_path: Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("")
    (tmp_path / ".out.partial-00000000").symlink_to(elsewhere)
    at = output(tmp_path / "out")
    make(at, kind)
    at.publish()
    at.discard()
    assert (elsewhere / "mine").exists()
