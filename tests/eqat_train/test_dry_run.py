"""``--dry-run``: a plan from real steps, and nothing written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoints import quantize_folder
from typer.testing import CliRunner

from eqat_train.cli import app
from eqat_train.config import TrainConfig
from eqat_train.pipeline import dry_run as module
from eqat_train.pipeline import stage_settings
from eqat_train.pipeline.dry_run import dry_run
from eqat_train.pipeline.plan import make_plan
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.errors import InputError

pytestmark = pytest.mark.usefixtures("here")
Config = Callable[..., TrainConfig]


class Recorder(Reporter):
    def __init__(self) -> None:
        self.plan: dict[str, Any] = {}

    def event(self, kind: str, **fields: Any) -> None:
        if kind == "plan":
            self.plan = fields


def planned(config: TrainConfig) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    dry_run(config, recorder := Recorder())
    return recorder.plan, {(row["part"], row["what"]): row for row in recorder.plan["rows"]}


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*"))


def test_the_plan_names_memory_disk_and_time_and_nothing_is_written(
    here: Path, tiny_folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQAT_CACHE", str(here / "cache"))
    before = files(here, tiny_folder)
    plan, rows = planned(config(activations="disk", device="cpu"))
    assert files(here, tiny_folder) == before
    assert plan["blocks"] == 2 and plan["problems"] == [] and plan["activations"] == "disk"
    assert rows["disk", "activations"]["bytes"] == 2 * (8 + 2) * 32 * 64 * 4
    assert rows["disk", "at the most"]["bytes"] == plan["disk_needed"] > rows["disk", "output"]["bytes"]
    assert rows["time", "Block-AP"]["seconds"] > 0 and rows["time", "E2E-QP"]["seconds"] > 0
    assert "2 blocks of 4 steps" in rows["time", "Block-AP"]["detail"]
    assert 2**28 < rows["memory", "Block-AP, CPU"]["bytes"] < 2**30  # libraries, for a model as small as this one


@pytest.mark.parametrize(("changed", "absent"), [({"stage": "block-ap"}, "E2E-QP"), ({"epochs": 0}, "Block-AP")])
def test_a_stage_that_does_not_run_takes_no_time(config: Config, changed: dict[str, Any], absent: str) -> None:
    _, rows = planned(config(**changed))
    assert ("time", absent) not in rows


def test_a_quantized_checkpoint_is_planned_without_block_ap(here: Path, tiny_folder: Path, config: Config) -> None:
    made = quantize_folder(tiny_folder, here / "quantized", QuantScheme(2, 32))
    _, rows = planned(config(model=str(made), stage="e2e-qp", group=None))
    assert ("memory", "Block-AP, CPU") not in rows and ("disk", "the state to go on from") in rows


def test_the_whole_models_training_is_planned_with_its_optimizer(config: Config) -> None:
    plan, rows = planned(config(stage="e2e-qat", device="cpu"))
    assert 6 * plan["parameters"] < rows["memory", "E2E-QAT, CPU"]["bytes"] < 18 * plan["parameters"]
    assert rows["time", "E2E-QAT"]["seconds"] is None


def test_a_model_too_large_for_the_gpu_is_planned_for_several(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for owner in (module, stage_settings):
        monkeypatch.setattr(owner, "compute_target", lambda config: (cuda, torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 2 * 10**6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "small")
    asked = config(stage="e2e-qat")
    plan, rows = planned(asked)
    alone, *shared = (rows["memory", what]["bytes"] for what in ("E2E-QAT, GPU", "each of 2 GPUs", "each of 8 GPUs"))
    assert shared[1] < shared[0] < alone < 2 * shared[0]  # the embeddings are on each
    (problem,) = plan["problems"]
    assert "on the GPU and 0.0 GiB are free; use torchrun with" in problem
    with pytest.raises(InputError, match="use torchrun with"):
        make_plan(asked)


def test_a_disk_without_room_is_a_problem_that_the_plan_shows(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    plan, _ = planned(config(activations="disk"))
    assert len(plan["problems"]) == 2 and "usable are disk" in plan["problems"][0]


def test_what_the_run_would_refuse_is_refused(config: Config) -> None:
    with pytest.raises(InputError, match="absent"):
        dry_run(config(data="absent.txt"), Reporter())


def test_the_command_prints_a_table_that_fits_sixty_columns(
    here: Path, cheap_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    words = ["train", cheap_run.pop("model")]
    words += [word for name, value in cheap_run.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = CliRunner().invoke(app, [*words, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0 and "nothing was written" in done.output
    table = done.output[done.output.index(" memory") : done.output.index("GiB free for")]
    assert all(len(line) <= 60 for line in table.splitlines()) and "finished blocks" in table
    done = CliRunner().invoke(app, [*words, "--dry-run", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "plan"
    assert sorted(os.listdir(here)) == ["test.txt", "train.txt"]
