"""The commands: every option is there and does something, output for people and for scripts, evaluation."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import quantize_folder, rewrite
from tiny_models import save_tiny_model
from typer.testing import CliRunner

from eqat_train.cli import app
from eqat_train.config import TrainConfig, build_config
from eqat_train.data import evaluation_windows, open_source, token_stream
from eqat_train.evaluation.perplexity import perplexity
from eqat_train.models.loading import load_dense_model, load_tokenizer
from eqat_train.pipeline.results import Measurement, ModelResult
from eqat_train.pipeline.train import train
from eqat_train.pipeline.work_folder import MARKER
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FIELDS = [item.name for item in fields(TrainConfig)]


def option(name: str) -> str:
    if name == "overrides":
        return "--override"
    return f"--{name.replace('_', '-')}"


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    words = [str(settings["model"])]
    for name, value in settings.items():
        if name == "overrides":
            words += [word for pair in (value or {}).items() for word in ("--override", "=".join(pair))]
        elif name != "model":
            words += [option(name)] if value is True else [option(name), str(value)]
    return words


def invoke(*words: str) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_importing_the_commands_loads_nothing_heavy() -> None:
    script = (
        "import sys, eqat_train.cli; print(sorted({'torch', 'transformers', 'datasets', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_setting_is_an_option_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = invoke("train", "--help")
    for name in FIELDS:
        assert ("MODEL" if name == "model" else f"{option(name)} ") in shown
    assert "name[:config[:split]]" in shown  # brackets are not markup


def test_the_help_of_every_command_fits_sixty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for command in ("train", "eval", "generate"):
        assert all(len(line) <= 60 for line in invoke(command, "--help").splitlines())


class Recorder:
    """Stands in for the two stages and the measurements, and notes what reaches them."""

    def __init__(self, made: Path) -> None:
        self.made = made
        self.seen: list[Any] = []

    def block_ap(
        self, model: Path, train: torch.Tensor, val: torch.Tensor, settings: Any, out: Path, **more: Any
    ) -> None:
        more.pop("reporter")
        left = (more["work_dir"] / "blocks").exists()  # by an unfinished run
        self.seen.append(
            ["block_ap", model.name, train.tolist(), val.tolist(), repr(settings), str(out), str(more), left]
        )
        self._make(out)

    def e2e_qp(self, checkpoint: Path, data: Any, settings: Any, out: Path, **more: Any) -> None:
        val = more.pop("val")
        more.pop("reporter")
        windows = [part.input_ids.tolist() for part in (data, val) if part is not None]
        self.seen.append(["e2e_qp", checkpoint.name, windows, repr(settings), str(out), str(more)])
        self._make(out)

    def measure(self, measurement: Measurement, title: str, folder: Path) -> ModelResult:
        seen = {name: value for name, value in vars(measurement).items() if name not in ("tokenizer", "windows")}
        windows = None if measurement.windows is None else measurement.windows.input_ids.tolist()
        self.seen.append(["measure", title, folder.name, windows, repr(seen)])
        return ModelResult(title, None, 1, 1.0, None)

    def _make(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        for file in self.made.iterdir():
            (out / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def observe(
    here: Path, tiny_folder: Path, cheap_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Everything that reaches the stages in the cheap run with some settings changed, as text."""
    made = quantize_folder(tiny_folder, here / "quantized", QuantScheme(2, 32))
    (here / "other.txt").write_text("other words entirely " * 60, encoding="utf-8")
    save_tiny_model(here / "other-model", seed=1)

    def observed(**changed: Any) -> str:
        recorder = Recorder(made)
        monkeypatch.setattr("eqat_train.pipeline.train.run_block_ap", recorder.block_ap)
        monkeypatch.setattr("eqat_train.pipeline.train.run_e2e_qp", recorder.e2e_qp)
        monkeypatch.setattr("eqat_train.pipeline.train.run_e2e_qat", recorder.e2e_qp)

        def measure(measurement: Measurement, title: str, folder: Path, reporter: Reporter) -> ModelResult:
            return recorder.measure(measurement, title, folder)

        monkeypatch.setattr(Measurement, "measure", measure)
        settings = {**cheap_run, "eval_data": "test.txt", "force": False, **changed}
        unfinished = here / "eqat-out" / "tiny-w2g32.work"
        (unfinished / "blocks").mkdir(parents=True)
        (unfinished / "blocks" / "000.json").touch()
        (unfinished / MARKER).touch()
        try:
            train(build_config(settings), Reporter())
        except InputError as error:
            recorder.seen.append(str(error))
        shutil.rmtree(here / "eqat-out", ignore_errors=True)
        return repr(recorder.seen)

    return observed


CHANGES: dict[str, Any] = {
    "model": "other-model",
    "bits": 3,
    "group": 64,
    "stage": "block-ap",
    "start": "mse",
    "scale_dtype": "bfloat16",
    "data": "other.txt",
    "overrides": {"*.down_proj": "w4", "*.q_proj": "skip"},
    "zeros_in": "2,2",
    "e2e_data": "other.txt",
    "eval_data": "other.txt",
    "eval_tokens": 100,
    "seed": 1,
    "samples": 9,
    "seq_len": 33,
    "val_samples": 1,
    "batch": 3,
    "epochs": 3,
    "lr_weight": 1.0,
    "lr_scale": 1.0,
    "lr_zero": 1.0,
    "min_lr_factor": 2.0,
    "min_expert_tokens": 7,
    "weight_decay": 0.5,
    "e2e_samples": 9,
    "e2e_seq_len": 33,
    "e2e_batch": 5,
    "e2e_micro_batch": 1,
    "e2e_epochs": 2,
    "lr_e2e": 1.0,
    "e2e_share": "on",
    "lr_norm": 0.5,
    "distill": 0.5,
    "warmup_ratio": 0.5,
    "max_grad_norm": 2.0,
    "out": "eqat-out/elsewhere",
    "keep_block_ap": "eqat-out/kept",
    "work": "eqat-out/working",
    "shard_size": "1MB",
    "prompt": "a cat",
    "sample_tokens": 9,
    "force": True,
    "restart": True,
    "device": "cuda:99",
    "dtype": "bfloat16",
    "activations": "disk",
    "activation_dtype": "bfloat16",
    "execution": "graph",
    "trust_remote_code": True,
}


ONLY_QAT = ("lr_norm", "distill")
BOTH_STAGES = (
    *("bits", "group", "start", "scale_dtype", "overrides", "zeros_in", "data", "seed"),
    *("lr_weight", "lr_scale", "lr_zero", "weight_decay", "e2e_samples", "e2e_seq_len", "e2e_batch"),
    *("e2e_micro_batch", "e2e_epochs", "warmup_ratio", "max_grad_norm", "dtype"),
)


def test_no_setting_is_read_and_then_ignored(observe: Callable[..., str]) -> None:
    assert CHANGES.keys() == set(FIELDS)
    plain, qat = observe(), observe(stage="e2e-qat")
    assert plain == observe()  # nothing random, so every difference below is the setting's
    for name, value in CHANGES.items():
        if name in ONLY_QAT:
            assert observe(stage="e2e-qat", **{name: value}) != qat, name
        else:
            assert observe(**{name: value}) != plain, name
    for name in BOTH_STAGES:
        assert observe(stage="e2e-qat", **{name: CHANGES[name]}) != qat, name


def test_command_line_and_file_reach_the_run_alike(
    here: Path, cheap_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[TrainConfig] = []

    def note(config: TrainConfig, reporter: Reporter) -> None:
        got.append(config)
        raise InputError("enough")

    monkeypatch.setattr("eqat_train.commands.train", note)
    settings = {**asdict(build_config(cheap_run)), **CHANGES}
    (here / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")
    for words in (arguments(settings), ["--config", "settings.yaml"]):
        with pytest.raises(InputError, match="enough"):
            invoke("train", *words)
    assert got[0] == got[1] == TrainConfig(**settings)


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "-1,2", "1,"])
def test_a_range_of_zeros_that_is_none_is_refused(here: Path, cheap_run: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=r"--zeros-in is .*expected two integers, e\.g\. --zeros-in 1,2"):
        invoke("train", *arguments(cheap_run), f"--zeros-in={text}")


def test_train_prints_the_table_and_the_next_commands(here: Path, cheap_run: dict[str, Any]) -> None:
    shown = invoke("train", *arguments({**cheap_run, "eval_data": "test.txt"}))
    for expected in ("full precision", "round-to-nearest", "Block-AP", "E2E-QP", "perplexity", "bits/weight"):
        assert expected in shown
    assert "native checkpoint: eqat-out/tiny-w2g32" in shown
    assert shown.endswith("next: eqat export --to gptq\n      eqat verify\n")


def test_train_as_json_prints_objects_only_and_the_path_last(here: Path, cheap_run: dict[str, Any]) -> None:
    records = [json.loads(line) for line in invoke("train", *arguments(cheap_run), "--json").splitlines()]
    assert records[0]["event"] == "start" and records[0]["lr_weight"] == 1e-3
    assert {"data", "block", "e2e_step", "e2e_validation"} <= {record["event"] for record in records}
    assert records[-1]["event"] == "done" and records[-1]["out"] == "eqat-out/tiny-w2g32"


def test_train_quietly_prints_the_path_only(here: Path, cheap_run: dict[str, Any]) -> None:
    settings = {**cheap_run, "stage": "block-ap", "epochs": 0}
    assert invoke("train", *arguments(settings), "--quiet") == "eqat-out/tiny-w2g32-block-ap\n"


def test_a_value_of_a_wrong_type_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["train", "--bits", "two"])
    assert result.exit_code == 2 and "--bits" in result.output


def test_a_value_out_of_range_names_option_and_range(here: Path) -> None:
    with pytest.raises(InputError, match="--bits is 5; allowed are 2, 3, 4, 8"):
        invoke("train", "--bits", "5")


def own_perplexity(folder: Path, seq_len: int) -> float:
    windows = evaluation_windows(token_stream(open_source("test.txt"), load_tokenizer(folder)), seq_len)
    return perplexity(load_dense_model(folder), windows)


def test_eval_measures_full_precision_native_and_gptq_alike(here: Path, tiny_folder: Path) -> None:
    native = quantize_folder(tiny_folder, here / "native", QuantScheme(2, 32))
    gptq = rewrite(native, here / "gptq", "gptq")
    found = {}
    for folder in (tiny_folder, native, gptq):
        shown = invoke("eval", str(folder), "--data", "test.txt", "--seq-len", "40", "--json")
        record = json.loads(shown.splitlines()[-1])
        assert record["event"] == "eval" and record["tokens"] == record["windows"] * 39
        assert record["perplexity"] == own_perplexity(folder, 40)
        found[folder.name] = record["perplexity"]
    assert found["native"] == found["gptq"] != found["tiny"]


def test_eval_prints_a_small_table_and_a_sample(here: Path, tiny_folder: Path) -> None:
    words = ("--data", "test.txt", "--seq-len", "40", "--tokens", "200", "--batch", "2", "--prompt", "the cat")
    shown = invoke("eval", str(tiny_folder), *words, "--sample-tokens", "5")
    assert "perplexity" in shown and "5 x 40" in shown and "195" in shown
    assert "the cat" in shown


def test_eval_quietly_prints_the_number_only(here: Path, tiny_folder: Path) -> None:
    shown = invoke("eval", str(tiny_folder), "--data", "test.txt", "--seq-len", "40", "--quiet")
    assert float(shown) == own_perplexity(tiny_folder, 40)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--data", "absent.txt"), r"absent\.txt does not exist"),
        (("--data", "test.txt", "--seq-len", "500"), "--seq-len is 500; the model's context is 128"),
        (("--data", "test.txt", "--tokens", "20", "--seq-len", "40"), "less than one window of 40"),
        (("--data", "test.txt", "--device", "gpu"), "--device is 'gpu'"),
        (("--data", "test.txt", "--dtype", "half"), "--dtype is 'half'"),
    ],
)
def test_eval_refuses_bad_input_in_one_line(
    here: Path, tiny_folder: Path, words: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        invoke("eval", str(tiny_folder), *words)
    assert "\n" not in str(caught.value)


def test_ctrl_c_during_training_ends_with_130_and_leaves_nothing(here: Path, cheap_run: dict[str, Any]) -> None:
    before = {path.name for path in here.iterdir()}
    words = arguments({**cheap_run, "samples": 2000, "epochs": 50})
    command = [sys.executable, "-m", "eqat_export.cli", "train", *words, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "progress":
                break
        assert (here / "eqat-out" / "tiny-w2g32.work").is_dir()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert len(process.stderr.read().splitlines()) == 1
    assert {path.name for path in here.iterdir()} == before
