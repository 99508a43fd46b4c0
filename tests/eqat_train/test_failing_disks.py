"""A read-only disk stops a run before it begins; one that fails later, or a damaged file of any kind, in one line."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eqat_train.block_ap import trainer
from eqat_train.config import TrainConfig
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter
from eqat_train.resume import durable
from formats.errors import CheckpointError, InputError

pytestmark = pytest.mark.usefixtures("here")
Config = Callable[..., TrainConfig]
OUT = Path("eqat-out") / "tiny-w2g32"
WORK = Path("eqat-out") / "tiny-w2g32.work"
WHOLE = pytest.StashKey[dict[str, bytes]]()


class Stop(Reporter):
    """Interrupts, as Ctrl-C would, at an event."""

    def __init__(self, kind: str) -> None:
        self.kind, self.said = kind, list[str]()

    def message(self, text: str) -> None:
        self.said.append(text)

    def event(self, kind: str, **fields: Any) -> None:
        if kind == self.kind:
            os.kill(os.getpid(), 2)


@pytest.fixture
def expected(config: Config, request: pytest.FixtureRequest) -> bytes:
    """Weights of the run that nothing disturbs."""
    stash = request.session.stash.setdefault(WHOLE, {})
    if not stash:
        train(config(out="whole"), Reporter())
        stash["weights"] = Path("whole", "model.safetensors").read_bytes()
    return stash["weights"]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that is really read-only; where nothing can be mounted, one without permission."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        return
    words = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("root without the right to mount cannot make a folder read-only")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("option", ["out", "keep_block_ap", "work"])
def test_a_read_only_place_is_refused_before_anything_is_trained(
    here: Path, config: Config, read_only: Path, option: str
) -> None:
    before = sorted(here.rglob("*"))
    with pytest.raises(InputError, match=r"read-only is read-only here; choose another --") as caught:
        train(config(**{option: str(read_only / "made")}), Reporter())
    assert "\n" not in str(caught.value) and sorted(here.rglob("*")) == before


def test_a_read_only_working_directory_is_refused_before_anything_is_trained(
    here: Path, config: Config, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(data=str(here / "train.txt"), out=str(here / "made"))
    with monkeypatch.context() as patch:
        patch.chdir(read_only)
        with pytest.raises(InputError, match="read-only here; start it in another folder"):
            train(settings, Reporter())


def test_a_read_only_token_cache_is_refused_before_anything_is_trained(
    config: Config, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQAT_CACHE", str(read_only / "cache"))
    with pytest.raises(InputError, match=r"cannot write the token cache .*set EQAT_CACHE"):
        train(config(), Stop("block"))
    assert not WORK.exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_while_a_block_is_saved_keeps_what_is_finished(
    config: Config, expected: bytes, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "001.safetensors":
            raise OSError(code, os.strerror(code))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "replace", fail)
        with pytest.raises(CheckpointError, match=rf"cannot write .*001\.safetensors.*{os.strerror(code)}") as caught:
            train(config(), Reporter())
    assert "\n" not in str(caught.value)
    train(config(), said := Stop(""))
    assert any("1 of 2 blocks are finished" in text for text in said.said)
    assert (OUT / "model.safetensors").read_bytes() == expected


def test_a_run_killed_in_the_middle_of_a_block_trains_that_block_again_to_the_same_bytes(
    config: Config, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    batches = trainer.batches

    def stopped(*args: Any) -> Any:
        calls.append(1)
        for number, batch in enumerate(batches(*args)):
            if len(calls) == 2 and number == 2:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "batches", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config(), Reporter())
    train(config(), said := Stop(""))
    assert any("1 of 2 blocks are finished" in text for text in said.said)
    assert (OUT / "model.safetensors").read_bytes() == expected


# Kinds of state: what is noticed and made again, and what is refused with the way out.
DAMAGED = {
    "blocks/000.safetensors": None,
    "blocks/000.json": "damaged",
    "blocks/started_with.json": "damaged",
    "e2e-qp/state.json": "damaged",
    "e2e-qp/started_with.json": "damaged",
    "e2e-qp/step-*.safetensors": None,
    "block-ap.written.json": "damaged",
    "block-ap/model.safetensors": None,
    "events.jsonl": None,
    "measured.json": "damaged",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_every_kind_is_noticed(config: Config, expected: bytes, name: str) -> None:
    settings = config(eval_data="test.txt")
    with pytest.raises(KeyboardInterrupt):
        train(settings, Stop("block" if name.startswith("blocks") else "e2e_step"))
    (file,) = WORK.glob(name)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2] if file.suffix == ".json" else raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    said = Stop("")
    if DAMAGED[name] is None and name != "block-ap/model.safetensors":
        train(settings, said)
        assert (OUT / "model.safetensors").read_bytes() == expected
        return
    # a checkpoint that changed is another starting point for E2E-QP than the one its state was trained from
    with pytest.raises((InputError, CheckpointError), match=DAMAGED[name] or "weights differ") as caught:
        train(settings, said)
    assert "--restart" in str(caught.value) and "\n" not in str(caught.value)
