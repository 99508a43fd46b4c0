"""The recipes' benchmark: what a plan's rows train, and what a line of its file holds."""

import argparse
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

from benchmarks.recipes import ablation
from benchmarks.recipes.ablation import Text, main, measure, read_variants, token_passes
from formats.errors import InputError

PLAN = """
recipe: best
settings:
  {bits: 2, group: 32, e2e_seq_len: 16, e2e_samples: 4, e2e_epochs: 2, e2e_batch: 2, val_samples: 2, device: cpu}
tables:
  main:
    best: {}
    paper: {recipe: paper, e2e_epochs: 1}
  leads:
    next-token loss: {distill: 0, e2e_epochs: 1}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN)
    return file


def test_a_rows_settings_go_before_the_files(plan: Path) -> None:
    best, paper, lead = read_variants(plan)
    assert (best.table, best.name, best.recipe, best.changes, best.settings["e2e_epochs"]) == (
        ("main", "best", "best", {}, 2)
    )
    assert (paper.recipe, paper.settings["e2e_epochs"]) == ("paper", 1)
    assert lead.keys("models/tiny", 3) == {
        "table": "leads",
        "model": "tiny",
        "variant": "next-token loss",
        "setting": "best, distill 0, e2e_epochs 1",
        "seed": "3",
    }


def test_a_misspelled_setting_is_refused_before_any_run(plan: Path) -> None:
    plan.write_text(PLAN.replace("distill", "destill"))
    with pytest.raises(InputError, match="destill"):
        read_variants(plan)


def test_the_shipped_plan_is_readable() -> None:
    shipped = Path(ablation.__file__).with_name("ablation.yaml")
    assert {variant.table for variant in read_variants(shipped)} >= {"main", "leads"}


@pytest.mark.parametrize(("stage", "expected"), [("all", 128), ("block-ap", 80), ("e2e-qp", 48), ("e2e-qat", 48)])
def test_tokens_count_once_for_every_pass(stage: str, expected: int) -> None:
    settings = {"samples": 5, "seq_len": 8, "epochs": 2, "e2e_samples": 1, "e2e_seq_len": 16, "e2e_epochs": 3}
    assert token_passes(settings | {"stage": stage}) == expected


def test_texts_are_named_files() -> None:
    assert Text.parse("held-out=a/b.txt:600") == Text("held-out", "a/b.txt", 600)
    assert Text.parse("a=b.txt") == Text("a", "b.txt", None)
    for wrong in ("b.txt", "a=", "=b.txt", "a=b.txt:many"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=FILE"):
            Text.parse(wrong)


def test_a_line_is_measured_once(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"the cat sat on mat {number}" for number in range(60)))
    lead = read_variants(plan)[2]
    row = measure(lead, 0, str(model), str(text), [Text("heldout", str(text), 200)], 16, tmp_path)
    assert (row["bits"], row["group_size"], row["tokens"]) == (2, 32, 64)
    assert 1 < row["heldout"] < 1000
    assert row["seconds"] > 0
    assert not list(tmp_path.glob("*/out"))

    file = tmp_path / "rows.csv"
    columns = ("table", "model", "variant", "setting", "seed")
    file.write_text(",".join(columns) + "\n" + ",".join(f'"{row[name]}"' for name in columns) + "\n")
    before = file.read_text()
    given = f"ablation {plan} --model {model} --data {text} --evaluate heldout={text} --seeds 0 --only leads"
    monkeypatch.setattr(sys, "argv", [*given.split(), "--csv", str(file)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert file.read_text() == before
    assert not capsys.readouterr().out
