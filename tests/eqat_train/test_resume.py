"""Runs that stop anywhere go on with the same command, to the same bytes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eqat_train.block_ap import run as block_ap_run
from eqat_train.config import TrainConfig
from eqat_train.e2e_qp import trainer as e2e_trainer
from eqat_train.pipeline.results import Measurement
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter
from formats.errors import CheckpointError, InputError

Config = Callable[..., TrainConfig]
OUT = Path("eqat-out") / "tiny-w2g32"
WORK = Path("eqat-out") / "tiny-w2g32.work"
ROOT = Path(__file__).resolve().parents[2]


class Recorder(Reporter):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[int] = []
        self.blocks: list[int] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "e2e_step":
            self.steps.append(fields["step"])
        if kind == "block":
            self.blocks.append(fields["index"])


class StopAt(Recorder):
    """Interrupts after a block or an E2E-QP step, as Ctrl-C would."""

    def __init__(self, kind: str, number: int) -> None:
        super().__init__()
        self._kind, self._number = kind, number

    def event(self, kind: str, **fields: Any) -> None:
        super().event(kind, **fields)
        if kind == self._kind and fields.get("step", fields.get("index")) == self._number:
            os.kill(os.getpid(), 2)  # a real SIGINT


def run(config: TrainConfig, reporter: Reporter | None = None) -> Recorder:
    chosen = reporter if isinstance(reporter, Recorder) else Recorder()
    train(config, chosen)
    return chosen


@pytest.fixture
def expected(here: Path, config: Config) -> bytes:
    """Weights of the run that nothing stops."""
    train(config(out="whole"), Reporter())
    return Path("whole", "model.safetensors").read_bytes()


def test_after_an_interruption_in_block_ap_the_finished_blocks_are_not_trained_again(
    config: Config, expected: bytes
) -> None:
    stopped = StopAt("block", 0)
    with pytest.raises(KeyboardInterrupt):
        run(config(), stopped)
    assert "the same command goes on" in stopped.messages[-1] and not OUT.exists()
    second = run(config())
    assert second.blocks == [1] and any("1 of 2 blocks are finished" in text for text in second.messages)
    assert (OUT / "model.safetensors").read_bytes() == expected and not WORK.exists()


def test_an_interruption_in_e2e_qp_finishes_the_step_and_the_next_run_goes_on_after_it(
    config: Config, expected: bytes
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config(), stopped := StopAt("e2e_step", 1))
    assert stopped.steps == [1]
    second = run(config())
    assert second.blocks == [] and second.steps[0] == 2
    assert (OUT / "model.safetensors").read_bytes() == expected
    report = json.loads((OUT / "training_report.json").read_text(encoding="utf-8"))
    steps = [event["step"] for event in report["events"] if event["event"] == "e2e_step"]
    assert steps == list(range(1, len(steps) + 1))  # those before the interruption too


def test_state_is_saved_while_training_goes_on(
    config: Config, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(e2e_trainer, "SAVE_SECONDS", 0)
    step = e2e_trainer.Trainer._step

    def fail_in_the_second(self: Any, *args: Any) -> Any:
        if self.losses:
            raise MemoryError
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(e2e_trainer.Trainer, "_step", fail_in_the_second)
        with pytest.raises(MemoryError):
            run(config())
    assert run(config()).steps[0] == 2
    assert (OUT / "model.safetensors").read_bytes() == expected


def stop_after_the_first_block(config: TrainConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config, StopAt("block", 0))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr_weight": 2e-3}, r"lr_weight was 0\.001 and is 0\.002"),
        ({"samples": 6}, "the training windows differ"),
        ({"batch": 1}, "batch_size was 2 and is 1"),
    ],
)
def test_other_settings_are_refused_with_the_difference_and_nothing_is_lost(
    config: Config, expected: bytes, changed: dict[str, Any], said: str
) -> None:
    stop_after_the_first_block(config())
    with pytest.raises(InputError, match=rf"{said}.*--restart") as caught:
        run(config(**changed))
    assert "\n" not in str(caught.value)
    assert run(config()).blocks == [1]
    assert (OUT / "model.safetensors").read_bytes() == expected


def test_other_weights_are_refused(here: Path, tiny_folder: Path, config: Config) -> None:
    model = shutil.copytree(tiny_folder, here / "model")
    mine = config(model="model")
    with pytest.raises(KeyboardInterrupt):
        run(mine, StopAt("block", 0))
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (model / "model.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="the model's weights differ"):
        run(mine)


def test_restart_begins_again(config: Config, expected: bytes) -> None:
    stop_after_the_first_block(config(lr_weight=2e-3))
    assert run(config(restart=True)).blocks == [0, 1]
    assert (OUT / "model.safetensors").read_bytes() == expected


def test_settings_of_the_next_stage_may_change(here: Path, config: Config) -> None:
    stop_after_the_first_block(config())
    assert run(config(lr_e2e=1e-3)).blocks == [1]


def test_a_damaged_block_is_noticed_and_trained_again(config: Config, expected: bytes) -> None:
    stop_after_the_first_block(config())
    file = WORK / "blocks" / "000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 8
    file.write_bytes(raw)
    second = run(config())
    assert second.blocks == [0, 1] and any("block 0 is damaged" in text for text in second.messages)
    assert (OUT / "model.safetensors").read_bytes() == expected


def test_a_damaged_state_of_e2e_qp_is_noticed_and_the_stage_begins_again(config: Config, expected: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config(), StopAt("e2e_step", 1))
    (file,) = (WORK / "e2e-qp").glob("step-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    second = run(config())
    assert second.blocks == [] and second.steps[0] == 1 and any("damaged" in text for text in second.messages)
    assert (OUT / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("name", ["blocks/started_with.json", "blocks/000.json", "measured.json"])
def test_a_damaged_record_is_refused_in_one_line(here: Path, config: Config, name: str) -> None:
    mine = config(eval_data="test.txt")
    stop_after_the_first_block(mine)
    (WORK / name).write_text('{"cut', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"damaged.*--restart") as caught:
        run(mine)
    assert "\n" not in str(caught.value)
    run(config(eval_data="test.txt", restart=True))


def test_what_was_measured_is_not_measured_again(here: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = config(eval_data="test.txt")
    stop_after_the_first_block(mine)
    measured: list[str] = []
    original = Measurement.measure

    def note(self: Any, title: str, *args: Any) -> Any:
        measured.append(title)
        return original(self, title, *args)

    monkeypatch.setattr(Measurement, "measure", note)
    result = train(mine, Reporter())
    assert measured == ["Block-AP", "E2E-QP"]
    assert [row.model for row in result.results] == ["full precision", "round-to-nearest", "Block-AP", "E2E-QP"]


def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_when_there_is_room(
    config: Config, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_block = block_ap_run.train_block
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls: list[int] = []

    def then_full(*args: Any) -> Any:
        calls.append(1)
        losses = train_block(*args)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(block_ap_run, "train_block", then_full)
        try:
            with pytest.raises(CheckpointError, match=r"cannot write .*001\.safetensors.*free space"):
                run(config())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(WORK.glob("blocks/*.partial"))
    assert run(config()).blocks == [1]
    assert (OUT / "model.safetensors").read_bytes() == expected


def kill_everywhere(here: Path, tiny_folder: Path, cheap_run: dict[str, Any], stride: int) -> int:
    settings = {**cheap_run, "model": str(tiny_folder)}
    script = ROOT / "tests" / "eqat_train" / "kill_everywhere.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(here), json.dumps(settings), str(stride)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


def test_a_kill_at_any_write_costs_nothing_that_was_finished(
    here: Path, tiny_folder: Path, cheap_run: dict[str, Any]
) -> None:
    assert kill_everywhere(here, tiny_folder, cheap_run, stride=9) >= 5


@pytest.mark.slow
def test_a_kill_at_every_write_costs_nothing_that_was_finished(
    here: Path, tiny_folder: Path, cheap_run: dict[str, Any]
) -> None:
    assert kill_everywhere(here, tiny_folder, cheap_run, stride=1) >= 40
