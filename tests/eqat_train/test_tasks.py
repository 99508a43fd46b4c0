"""``eqat eval --tasks`` through the real lm-eval harness, on local task files, against scores counted by hand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import quantize_folder, rewrite
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from eqat_train.cli import app
from eqat_train.evaluation.tasks import TaskSettings, check_harness, check_names, run_tasks
from eqat_train.models.loading import load_dense_model
from formats import QuantScheme
from formats.errors import InputError, MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS: list[dict[str, Any]] = [
    {"start": "the cat sat on", "choices": [" a mat", " and ran far away", " it"], "answer": 0},
    {"start": "then it ran", "choices": [" home", " xyzzy", " from a cat"], "answer": 1},
    {"start": "a mat far away", "choices": [" from", " then", " cat sat on a mat"], "answer": 2},
    {"start": "it sat", "choices": [" on", " the", " zebra"], "answer": 0},
    {"start": "home and then", "choices": [" away", " ran the cat home", " q"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
fewshot_split: train
"""
CHOICES = (
    TASK
    + """
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 3}}
"""
)
ROLLING = (
    TASK
    + """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}"
metric_list: [{{metric: byte_perplexity}}]
metadata: {{version: 1}}
"""
)
UNTIL = (
    TASK
    + """
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{start}}}}"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
)

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'eqat[eval]'"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three task files on one local data file, and one whose data is not there."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS), encoding="utf-8")
    for name, text in (("eqat_choices", CHOICES), ("eqat_rolling", ROLLING), ("eqat_until", UNTIL)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data), encoding="utf-8")
    lost = CHOICES.format(name="eqat_lost", data=folder / "lost.jsonl")
    (folder / "eqat_lost.yaml").write_text(lost, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def native(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(tiny_folder, tmp_path_factory.mktemp("native") / "w2g32", QuantScheme(2, 32))


def log_probability(model: Any, tokenizer: Any, start: str, text: str) -> float:
    """Of a continuation, a token at a time in float64."""
    context, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (start, text))
    total = 0.0
    for position, token in enumerate(ids):
        seen = torch.tensor([context + ids[:position]])
        with torch.no_grad():
            total += model(input_ids=seen).logits[0, -1].double().log_softmax(0)[token].item()
    return total


def accuracies(folder: Path, *, load: Any = load_dense_model) -> tuple[float, float]:
    """Share of documents whose right answer is likeliest: in all, and for each of its bytes."""
    model, tokenizer = load(folder).double(), AutoTokenizer.from_pretrained(folder)
    right = right_norm = 0
    for document in DOCUMENTS:
        scores = [log_probability(model, tokenizer, document["start"], choice) for choice in document["choices"]]
        each = [score / len(choice) for score, choice in zip(scores, document["choices"], strict=True)]
        right += scores.index(max(scores)) == document["answer"]
        right_norm += each.index(max(each)) == document["answer"]
    return right / len(DOCUMENTS), right_norm / len(DOCUMENTS)


def invoke(*words: object) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@needs_harness
def test_scores_of_full_precision_native_and_gptq_are_those_counted_by_hand(
    tasks: Path, tiny_folder: Path, native: Path, tmp_path: Path
) -> None:
    gptq = rewrite(native, tmp_path / "gptq", "gptq")
    for folder in (tiny_folder, native, gptq):
        words = ("--tasks", "eqat_choices", "--include-path", tasks, "--batch", 4, "--json")
        record = json.loads(invoke(folder, *words).splitlines()[-1])
        assert record["event"] == "tasks" and record["harness"].startswith("lm-eval ")
        found = {row["metric"]: row for row in record["results"]}
        expected = accuracies(folder)
        assert (found["acc"]["value"], found["acc_norm"]["value"]) == expected
        assert found["acc"]["documents"] == len(DOCUMENTS) and found["acc"]["version"] == "3"
        assert found["acc"]["few_shot"] == 0 and found["acc"]["filter"] == "none"


@needs_harness
def test_a_model_that_transformers_loaded_is_scored_too(tasks: Path, native: Path) -> None:
    """A native checkpoint through eqat's quantizer for transformers, its layers packed."""
    model = AutoModelForCausalLM.from_pretrained(native).eval()
    settings = TaskSettings(("eqat_choices",), include_path=tasks)
    found = {row.metric: row.value for row in run_tasks(model, AutoTokenizer.from_pretrained(native), settings)}
    assert (found["acc"], found["acc_norm"]) == accuracies(native)


@needs_harness
def test_other_kinds_of_tasks_limits_and_few_shot(tasks: Path, tiny_folder: Path) -> None:
    names = "eqat_rolling,eqat_until,eqat_choices"
    words = ("--tasks", names, "--include-path", tasks, "--limit", 2, "--few-shot", 1, "--json", "--packed")
    events = [json.loads(line) for line in invoke(tiny_folder, *words).splitlines()]
    rows = {(row["task"], row["metric"]): row for row in events[-1]["results"]}
    assert events[-1]["limit"] == 2
    assert all(row["documents"] == 2 for row in rows.values())
    assert rows["eqat_choices", "acc"]["few_shot"] == 1
    assert rows["eqat_until", "exact_match"]["value"] == 0.0
    model, tokenizer = load_dense_model(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    texts = [document["start"] for document in DOCUMENTS[:2]]
    nats = sum(log_probability(model, tokenizer, tokenizer.eos_token, text) for text in texts)
    expected = 2.718281828459045 ** (-nats / sum(map(len, texts)))
    assert rows["eqat_rolling", "byte_perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    ended = [(event["done"], event["total"]) for event in events if event["event"] == "task_end"]
    assert len(ended) == 3 and all(done == total for done, total in ended)


@needs_harness
def test_perplexity_and_tasks_in_one_run_fit_sixty_columns(
    tasks: Path, tiny_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    words = ("--data", "test.txt", "--seq-len", 40, "--tasks", "eqat_choices", "--include-path", tasks)
    shown = invoke(tiny_folder, *words)
    assert all(len(line) <= 60 for line in shown.splitlines())
    assert "perplexity" in shown and "acc_norm" in shown and "eqat_choices" in shown
    quiet = invoke(tiny_folder, *words, "--quiet").splitlines()
    assert len(quiet) == 3 and float(quiet[0]) > 1 and quiet[1].startswith("eqat_choices acc ")


@needs_harness
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("eqat_lost", r"tasks eqat_lost cannot be loaded: .*dataset_path: json"),
        ("eqat_choices,arc_easy", "tasks eqat_choices, arc_easy cannot be loaded: "),  # one of the harness, no network
    ],
)
def test_tasks_without_data_are_refused_in_one_line(tasks: Path, tiny_folder: Path, names: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        invoke(tiny_folder, "--tasks", names, "--include-path", tasks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["colours"], "no task, group or tag is called colours; did you mean colour or colors"),
        (["zq"], "no task, group or tag is called zq; give --include-path"),
        (["colors", "absent.yaml"], r"task file absent\.yaml does not exist"),
        ([], "no task is named"),
    ],
)
def test_wrong_names_are_refused(names: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check_names(names, ["arc_easy", "colour", "colors"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "nothing to evaluate: give --data"),
        (("--data", "test.txt", "--limit", "3"), "--limit says how to run tasks; give --tasks too"),
        (("--data", "test.txt", "--few-shot", "0"), "--few-shot says how"),
    ],
)
def test_options_that_say_nothing_are_refused(
    here: Path, tiny_folder: Path, words: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        invoke(tiny_folder, *words)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name))
    with pytest.raises(
        MissingExtraError, match=r"--tasks needs lm-eval, which is not installed: pip install '.*\[eval]'"
    ):
        check_harness()


@needs_harness
def test_no_bar_and_no_remark_of_the_harness_reaches_the_terminal(tasks: Path, tiny_folder: Path) -> None:
    words = ["eval", str(tiny_folder), "--tasks", "eqat_choices", "--include-path", str(tasks), "--quiet"]
    command = [sys.executable, "-m", "eqat_export", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert [line.rsplit(" ", 1)[0] for line in done.stdout.splitlines()] == [
        "eqat_choices acc",
        "eqat_choices acc_norm",
    ]
