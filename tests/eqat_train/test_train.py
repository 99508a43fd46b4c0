"""A training run as a whole: what it leaves, what it refuses, and what happens when it stops."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import quantize_folder, rewrite
from tiny_models import save_tiny_model

from eqat_train.block_ap import run as block_ap_run
from eqat_train.config import TrainConfig, build_config
from eqat_train.pipeline.train import TrainResult, train
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme, history
from formats.errors import (
    CheckpointError,
    EqatError,
    InputError,
    OutputExistsError,
    TrainingDivergedError,
    UnsupportedSchemeError,
)
from formats.model import open_checkpoint

Config = Callable[..., TrainConfig]
OUT = Path("eqat-out") / "tiny-w2g32"


def run(config: TrainConfig) -> TrainResult:
    return train(config, Reporter())


def entries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def codes(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.layer(name).codes for name in checkpoint.layer_names}


def test_both_stages_leave_one_complete_checkpoint_and_nothing_else(here: Path, config: Config) -> None:
    before = entries(here)
    result = run(config(eval_data="test.txt"))
    assert result.out == OUT
    assert [row.model for row in result.results] == ["full precision", "round-to-nearest", "Block-AP", "E2E-QP"]
    assert entries(here) - before == {".eqat/history.json"} | {
        f"{OUT}/{name}"
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "eqat_config.yaml",
            "train.log",
            "training_report.json",
        )
    }
    with open_checkpoint(OUT) as checkpoint:
        assert checkpoint.scheme == QuantScheme(2, 32)
        assert checkpoint.format is not None and checkpoint.format.id == "native"
    assert history.last_native() == OUT


def test_the_report_holds_results_settings_versions_and_events(here: Path, config: Config) -> None:
    result = run(config(eval_data="test.txt"))
    report = json.loads((OUT / "training_report.json").read_text(encoding="utf-8"))
    assert [row["perplexity"] for row in report["results"]] == [row.perplexity for row in result.results]
    assert report["settings"]["lr_weight"] == 1e-3 and report["torch"] == torch.__version__
    assert {event["event"] for event in report["events"]} >= {
        "start",
        "data",
        "evaluation",
        "block",
        "e2e_step",
        "done",
    }
    assert report["demo"] is False


def test_saved_settings_repeat_the_run_bit_for_bit(here: Path, config: Config) -> None:
    run(config())
    run(build_config({"out": "again"}, OUT / "eqat_config.yaml"))
    assert (OUT / "model.safetensors").read_bytes() == Path("again", "model.safetensors").read_bytes()


def test_block_ap_alone_writes_its_result_and_e2e_qp_goes_on_from_it_changing_scales_only(
    here: Path, config: Config
) -> None:
    first = run(config(stage="block-ap"))
    assert first.out == Path("eqat-out/tiny-w2g32-block-ap")
    second = run(config(model=str(first.out), stage="e2e-qp", group=None))
    assert second.out == Path("eqat-out/tiny-w2g32-block-ap-e2e-qp")
    before, after = codes(first.out), codes(second.out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with open_checkpoint(first.out) as a, open_checkpoint(second.out) as b:
        assert any(not torch.equal(a.layer(name).scales, b.layer(name).scales) for name in a.layer_names)
        assert all(torch.equal(a.get(name), b.get(name)) for name in a.passthrough_names)


def test_e2e_qp_alone_keeps_the_dtype_of_the_scales_unless_told(here: Path, config: Config) -> None:
    first = run(config(stage="block-ap", scale_dtype="bfloat16")).out
    for asked, expected in ((None, torch.bfloat16), ("float16", torch.float16)):
        second = run(config(model=str(first), stage="e2e-qp", group=None, scale_dtype=asked, out=f"made-{asked}"))
        with open_checkpoint(second.out) as checkpoint:
            assert {checkpoint.layer(name).scales.dtype for name in checkpoint.layer_names} == {expected}


@pytest.mark.parametrize("format_id", ["gptq", "gptq_v2"])
def test_e2e_qp_starts_from_gptq_with_instructions(
    here: Path, tiny_folder: Path, config: Config, format_id: str
) -> None:
    native = quantize_folder(tiny_folder, here / "native", QuantScheme(4, 32))
    start = rewrite(native, here / "gptq-model", format_id)
    template = "{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}{% endif %}"
    (start / "chat_template.jinja").write_text(template, encoding="utf-8")
    rows = ({"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(2, 20))
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    changed = {"model": str(start), "stage": "e2e-qp", "data": None, "group": None, "e2e_seq_len": 128}
    result = run(config(**changed, e2e_data="rows.jsonl"))
    with open_checkpoint(result.out) as checkpoint:
        assert checkpoint.scheme == QuantScheme(4, 32)
    report = json.loads((result.out / "training_report.json").read_text(encoding="utf-8"))
    (data,) = (event for event in report["events"] if event["event"] == "data")
    assert 0 < data["loss_tokens"] < data["windows"] * data["seq_len"] / 2  # prompts are longer than answers


def test_block_aps_checkpoint_is_kept_where_asked(here: Path, config: Config) -> None:
    result = run(config(keep_block_ap="kept"))
    before, after = codes(Path("kept")), codes(result.out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_zero_epochs_are_round_to_nearest_and_need_no_text(here: Path, tiny_folder: Path, config: Config) -> None:
    result = run(config(stage="block-ap", epochs=0, data=None))
    expected = codes(quantize_folder(tiny_folder, here / "expected", QuantScheme(2, 32)))
    found = codes(result.out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_reader_of_the_output_that_goes_away_does_not_cost_log_and_report(here: Path, config: Config) -> None:
    class Gone(Reporter):
        def event(self, kind: str, **fields: Any) -> None:
            if kind in ("summary", "done"):
                raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        train(config(stage="block-ap", epochs=0, out="made"), Gone())
    assert {"train.log", "training_report.json", "eqat_config.yaml"} <= entries(here / "made")


def test_without_evaluation_text_nothing_is_measured(here: Path, config: Config) -> None:
    assert run(config()).results == ()


def test_a_prompt_alone_gives_samples_without_perplexities(here: Path, config: Config) -> None:
    rows = run(config(prompt="the cat")).results
    assert len(rows) == 4
    assert all(row.perplexity is None and row.sample for row in rows)


def test_an_existing_output_is_refused_unless_forced(here: Path, config: Config) -> None:
    run(config(stage="block-ap", epochs=0, out="made"))
    before = (here / "made" / "model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="--force"):
        run(config(out="made"))
    assert (here / "made" / "model.safetensors").read_bytes() == before
    run(config(out="made", force=True))
    assert (here / "made" / "model.safetensors").read_bytes() != before


REFUSED: dict[str, tuple[dict[str, Any], type[EqatError], str]] = {
    "no text": ({"data": None}, InputError, "--data"),
    "missing text": ({"data": "absent.txt"}, InputError, r"absent\.txt does not exist"),
    "text too short": ({"data": "short.txt"}, InputError, "--seq-len"),
    "instructions for Block-AP": ({"data": "rows.jsonl"}, InputError, "--e2e-data"),
    "missing model": ({"model": "./absent"}, InputError, r"\./absent"),
    "group that does not divide": ({"group": 48}, UnsupportedSchemeError, r"48 .*model\.layers\.0.*32"),
    "longer than the context": ({"seq_len": 4096}, InputError, "context is 128"),
    "full precision for E2E-QP": ({"stage": "e2e-qp"}, InputError, "full precision"),
    "no model for E2E-QP": ({"stage": "e2e-qp", "model": None}, InputError, "MODEL"),
    "size": ({"shard_size": "many"}, InputError, "'many'"),
    "device": ({"device": "tpu"}, InputError, "'tpu'"),
    "two outputs in one": ({"keep_block_ap": "made", "out": "made"}, InputError, "same folder"),
    "work folder of someone else": ({"work": "notes"}, InputError, "not eqat's"),
    "nothing to train": ({"lr_weight": 0.0, "lr_scale": 0.0, "lr_zero": 0.0}, InputError, "nothing would be trained"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("measured", [False, True])
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    here: Path, config: Config, case: str, measured: bool
) -> None:
    (here / "short.txt").write_text("too short", encoding="utf-8")
    (here / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}', encoding="utf-8")
    (here / "notes").touch()
    before = entries(here)
    changed, kind, expected = REFUSED[case]
    with pytest.raises(kind, match=expected) as caught:
        run(config(**changed, eval_data="test.txt" if measured else None))
    assert "\n" not in str(caught.value)
    assert entries(here) == before and {path.name for path in here.iterdir()} == before


def test_the_model_folder_is_never_the_output(here: Path) -> None:
    model = save_tiny_model(here / "model")
    before = entries(here)
    with pytest.raises(InputError, match="same folder"):
        run(build_config({"model": "model", "out": "./model", "force": True, "data": "train.txt"}))
    assert entries(here) == before and model.is_dir()


def test_a_quantized_model_is_refused_for_block_ap_with_the_way_on(here: Path, config: Config) -> None:
    made = run(config(stage="block-ap", epochs=0)).out
    with pytest.raises(InputError, match=r"already quantized \(native, w2g32\).*--stage e2e-qp"):
        run(config(model=str(made)))


def stop_in(monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(f"eqat_train.pipeline.train.{stage}", stop)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_before_anything_is_finished_leaves_nothing(
    here: Path, config: Config, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = entries(here)
    stop_in(monkeypatch, "run_block_ap", error)
    with pytest.raises(type(error)):
        run(config())
    assert entries(here) == before and not (here / "eqat-out").exists()


def test_divergence_of_e2e_qp_keeps_block_aps_checkpoint_and_the_next_run_goes_on_from_it(
    here: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, "run_e2e_qp", TrainingDivergedError("loss nan at step 3"))
        with pytest.raises(TrainingDivergedError, match=r"loss nan at step 3; .*tiny-w2g32\.work/block-ap.*--lr-e2e"):
            run(config())
    kept = here / "eqat-out" / "tiny-w2g32.work"
    assert codes(kept / "block-ap") and (kept / "train.log").is_file() and not OUT.exists()
    monkeypatch.setattr(block_ap_run, "train_block", None)  # is not called again
    run(config())
    assert OUT.is_dir() and not kept.exists()


def test_divergence_of_block_ap_keeps_the_finished_blocks(
    here: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_block = block_ap_run.train_block
    calls: list[int] = []

    def second_diverges(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise TrainingDivergedError("loss nan at step 1")
        return train_block(*args)

    monkeypatch.setattr(block_ap_run, "train_block", second_diverges)
    with pytest.raises(TrainingDivergedError, match="block 1"):
        run(config())
    assert (here / "eqat-out" / "tiny-w2g32.work" / "blocks" / "000.safetensors").is_file()
    assert not OUT.exists()


def test_a_failure_after_block_ap_keeps_its_checkpoint(
    here: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_in(monkeypatch, "run_e2e_qp", torch.OutOfMemoryError("out of memory"))
    with pytest.raises(
        InputError, match=r"GPU is out of memory.*--e2e-micro-batch 1.*checkpoint is kept.*block-ap --stage"
    ):
        run(config())
    assert codes(here / "eqat-out" / "tiny-w2g32.work" / "block-ap")


def test_memory_that_runs_out_in_block_ap_names_what_needs_less(
    here: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entries(here)
    stop_in(monkeypatch, "run_block_ap", torch.OutOfMemoryError("out of memory"))
    with pytest.raises(InputError, match=r"GPU is out of memory.*--batch"):
        run(config())
    assert entries(here) == before


@pytest.mark.parametrize(
    "places",
    [
        {"out": "a", "keep_block_ap": "a/b"},
        {"out": "a/b", "keep_block_ap": "a"},
        {"out": "a/b", "work": "a"},
        {"out": "a", "work": "a/b"},
        {"out": "a", "work": "a"},
        {"out": "b", "work": "a", "keep_block_ap": "a/kept"},
    ],
)
def test_a_folder_that_is_replaced_or_removed_holds_no_other(
    here: Path, config: Config, places: dict[str, str]
) -> None:
    before = entries(here)
    with pytest.raises(InputError, match=r"lies in|the same folder"):
        run(config(**places))
    assert entries(here) == before


def test_an_output_around_the_model_is_refused_and_one_inside_is_not(here: Path, config: Config) -> None:
    save_tiny_model(here / "outer" / "model")
    (here / "outer" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"MODEL .* lies in --out"):
        run(config(model="outer/model", out="outer", force=True))
    assert run(config(model="outer/model", out="outer/model/quantized", stage="block-ap", epochs=0)).out.is_dir()


def test_a_model_or_scheme_that_cannot_be_trained_is_refused_before_data_is_read(
    here: Path, tiny_folder: Path, config: Config
) -> None:
    with pytest.raises(UnsupportedSchemeError, match="group_size 48"):
        run(config(group=48, data="absent.txt"))
    model = shutil.copytree(tiny_folder, here / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "vision.extra": torch.ones(2)}, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor vision\.extra"):
        run(config(model="model", data="absent.txt"))


def test_weights_that_are_not_finite_are_named(here: Path, tiny_folder: Path, config: Config) -> None:
    model = shutil.copytree(tiny_folder, here / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, model / "model.safetensors")
    for epochs in (0, 1):
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
            run(config(model="model", epochs=epochs))
        assert not OUT.exists()
    assert [file.name for file in Path("eqat-out").glob("*/blocks/*.safetensors")] == ["000.safetensors"]


def test_infinite_settings_and_results_reach_the_report(here: Path, config: Config) -> None:
    out = run(config(max_grad_norm=math.inf, min_lr_factor=math.inf)).out
    settings = json.loads((out / "training_report.json").read_text(encoding="utf-8"))["settings"]
    assert settings["max_grad_norm"] == settings["min_lr_factor"] == "inf"
    run(build_config({"out": "again"}, out / "eqat_config.yaml"))
    assert (out / "model.safetensors").read_bytes() == Path("again", "model.safetensors").read_bytes()


def test_a_work_folder_in_use_is_refused(here: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def second_run(*args: object, **kwargs: object) -> None:
        with pytest.raises(InputError, match="another eqat train") as caught:
            run(config())
        seen.append(str(caught.value))
        raise KeyboardInterrupt

    monkeypatch.setattr("eqat_train.pipeline.train.run_block_ap", second_run)
    with pytest.raises(KeyboardInterrupt):
        run(config())
    assert seen


def test_the_demo_needs_no_arguments(here: Path) -> None:
    quick = {"samples": 4, "seq_len": 32, "epochs": 1, "val_samples": 2, "e2e_samples": 4, "e2e_seq_len": 32}
    result = run(build_config({**quick, "eval_tokens": 320, "sample_tokens": 5}))
    assert result.out == Path("eqat-out/demo-w2g64")
    assert [row.model for row in result.results] == ["full precision", "round-to-nearest", "Block-AP", "E2E-QP"]
    assert all(row.perplexity and row.sample for row in result.results)


def test_the_demo_replaces_its_own_output_and_no_other(here: Path) -> None:
    quick = {"stage": "block-ap", "epochs": 0, "eval_tokens": 320, "sample_tokens": 0}
    out = run(build_config(quick)).out
    first = (out / "training_report.json").read_bytes()
    assert run(build_config(quick)).out == out
    assert (out / "training_report.json").read_bytes() != first
    (out / "eqat_config.yaml").unlink()  # now it could be anyone's
    with pytest.raises(OutputExistsError):
        run(build_config(quick))
