"""E2E-QAT on two ranks: what one process trains, half of it on each, and any number of ranks goes on with it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qat_rank_worker import MIXTURE
from ranks_of_a_test import launch, what_ranks_saw, write_text
from safetensors.torch import load_file
from tiny_models import save_tiny_model
from torch import Tensor

from eqat_train.config import build_config
from eqat_train.costs.estimate import qat_bytes
from eqat_train.e2e_qat import QatSettings
from eqat_train.e2e_qat import memory as qat_memory
from eqat_train.e2e_qat.memory import check_memory, shares_teacher
from eqat_train.e2e_qat.trainer import QatTrainer
from eqat_train.end_to_end.state import E2eProgress, E2eState
from eqat_train.pipeline.plan import make_plan
from eqat_train.pipeline.train import train
from eqat_train.ranks import group
from eqat_train.ranks.rows import Rows
from eqat_train.reporting.progress import Reporter
from eqat_train.resume.durable import checksum, write_json, write_tensors
from formats import QuantScheme
from formats.errors import InputError
from formats.model import open_checkpoint

RATES = {"lr_weight": 1e-4, "lr_scale": 1e-4, "lr_zero": 1e-3, "lr_norm": 1e-4}
SETTINGS: dict[str, Any] = {
    "stage": "e2e-qat",
    "start": "activations",
    "model": "qwen2",  # with biases
    "overrides": {"lm_head": "w4g32"},  # logits of a quantized head are whole ones
    "data": "train.txt",
    "group": 32,
    "e2e_samples": 19,  # in the last of five steps ranks have one and two
    "e2e_seq_len": 32,
    "e2e_batch": 4,
    "e2e_micro_batch": 1,
    "device": "cpu",
} | RATES


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def interrupted(trainer: QatTrainer, *args: Any) -> Tensor:
    values = step(trainer, *args)
    if len(trainer.losses) == 1:  # the third: losses are read a step late
        os.kill(os.getpid(), signal.SIGINT)
    return values


step = QatTrainer._step


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where one process has made ``alone`` and two ranks everything else, see ``qat_rank_worker.py``."""
    folder = tmp_path_factory.mktemp("qat-ranks")
    write_text(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("qwen2", "olmoe"):
            save_tiny_model(Path(name), name)
        train(build_config(SETTINGS | {"out": "alone"}), Reporter())
        train(build_config(SETTINGS | MIXTURE | {"out": "alone-mixture"}), Reporter())
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(QatTrainer, "_step", interrupted)
            train(build_config(SETTINGS | {"out": "resumed"}), Reporter())
        ended = launch(2, folder, "qat_rank_worker.py", json.dumps(SETTINGS))
        assert ended.returncode and (folder / "rank0.json").exists(), ended.stderr[-3000:]
        listener = Listener()
        train(build_config(SETTINGS | {"out": "handed over"}), listener)
        (folder / "said alone.json").write_text(json.dumps(listener.said))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def told(made: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    return what_ranks_saw(made)


def steps(folder: Path) -> list[dict[str, Any]]:
    events = json.loads((folder / "training_report.json").read_text(encoding="utf-8"))["events"]
    return [event for event in events if event["event"] in ("qat_step", "qat_validation")]


def same_bytes(one: Path, other: Path) -> bool:
    mine, its = (load_file(folder / "model.safetensors") for folder in (one, other))
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def assert_same_training(one: Path, other: Path) -> None:
    """Losses to the rounding of float32 sums in another order, and parameters within what AdamW makes of that.

    AdamW divides by the gradient's own size, so a gradient near zero may turn a whole step, at most the learning rate,
    around: parameters differ by twice what they moved at the most, and a weight beside a rounding boundary takes
    another code.
    """
    mine, its = steps(one), steps(other)
    assert len(mine) == len(its) > 3
    for event, expected in zip(mine, its, strict=True):
        for name in event.keys() & {"loss", "grad_norm"}:
            assert event[name] == pytest.approx(expected[name], rel=1e-5)
    count = len(mine)
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        codes = different = 0
        assert first.layer_names == second.layer_names
        for name in first.layer_names:
            a, b = first.layer(name), second.layer(name)
            codes += a.codes.numel()
            different += int((a.codes != b.codes).sum()) + int((a.zeros != b.zeros).sum())
            assert (a.scales.float() - b.scales.float()).abs().max() <= 2 * count * RATES["lr_scale"]
        for name in first.passthrough_names:
            moved = (first.get(name).float() - second.get(name).float()).abs().max()
            assert moved <= 2 * count * RATES["lr_norm"], name
    assert different <= codes / 1000


def test_two_ranks_train_what_one_process_trains(made: Path, told: list[dict[str, Any]]) -> None:
    assert told[0]["ended"]["whole"] == told[1]["ended"]["whole"] == "good"
    assert_same_training(made / "whole", made / "alone")


def test_each_rank_holds_half_of_what_is_trained(told: list[dict[str, Any]]) -> None:
    assert sum(rank["held"][0]["own"] for rank in told) == told[0]["held"][0]["all"]
    for rank in told:
        held, shared = rank["held"]
        row = 64 + 2 * 64 // 32  # of the head, which has 257
        assert held["own"] == shared["own"] <= held["all"] / 2 + row / 2
        assert held["whole"] < held["all"] / 50  # norms and biases
        assert held["teacher's own"] == held["teacher's all"] and not held["teacher's in rows"]


def test_the_teacher_in_shares_gives_the_same_bytes(made: Path, told: list[dict[str, Any]]) -> None:
    assert same_bytes(made / "shared", made / "whole")
    for rank in told:
        _, held = rank["held"]
        head = 257 * 64  # stays whole: it is multiplied with a piece of the tokens at a time
        assert held["teacher's in rows"] == 14
        assert held["teacher's own"] - head == (held["teacher's all"] - head) / 2
    assert any("share of the full-precision model" in text for text in told[0]["said"])


def test_layers_that_one_rank_has_to_recompute_are_recomputed_by_both_to_the_same_bytes(made: Path) -> None:
    assert same_bytes(made / "recomputed", made / "whole")


def test_experts_without_tokens_on_a_rank_or_on_all_are_trained_as_alone(
    made: Path, told: list[dict[str, Any]]
) -> None:
    assert any(told[0]["dropped"]) and told[0]["dropped"] == told[1]["dropped"]
    assert_same_training(made / "mixture", made / "alone-mixture")


def test_two_ranks_go_on_from_one_process(made: Path, told: list[dict[str, Any]]) -> None:
    assert "going on with an unfinished E2E-QAT: 3 of 5 steps are done" in told[0]["said"]
    assert_same_training(made / "resumed", made / "alone")


def test_one_process_goes_on_from_two_ranks(made: Path, told: list[dict[str, Any]]) -> None:
    assert [rank["ended"]["handed over"] for rank in told] == ["KeyboardInterrupt"] * 2
    said = json.loads((made / "said alone.json").read_text())
    assert "going on with an unfinished E2E-QAT: 4 of 5 steps are done" in said
    assert_same_training(made / "handed over", made / "alone")


def test_a_signal_to_one_rank_stops_both_and_they_go_on_to_the_same_bytes(
    made: Path, told: list[dict[str, Any]]
) -> None:
    assert [rank["ended"]["stopped"] for rank in told] == ["KeyboardInterrupt"] * 2
    assert "going on with an unfinished E2E-QAT: 4 of 5 steps are done" in told[0]["said"]
    assert same_bytes(made / "stopped", made / "whole")


def test_a_rank_that_dies_ends_the_run_with_one_line_and_the_state_is_kept(
    made: Path, told: list[dict[str, Any]]
) -> None:
    assert "another rank has ended" in told[0]["ended"]["killed"] and "\n" not in told[0]["ended"]["killed"]
    assert not (made / "killed").exists() and (made / "killed.work" / "e2e-qat" / "state.json").exists()


def test_only_rank_0_leaves_files(made: Path) -> None:
    for folder in ("whole", "shared", "resumed", "stopped", "handed over"):
        assert {file.name for file in (made / folder).iterdir()} == {file.name for file in (made / "alone").iterdir()}
        assert not (made / f"{folder}.work").exists()


def test_a_layer_in_rows_is_the_layer(tmp_path: Path) -> None:
    ended = launch(3, tmp_path, "row_worker.py")
    assert not ended.returncode, ended.stderr[-3000:]
    assert max(json.loads(ended.stdout)) < 1e-13  # of 6, 7, 4 and 2 rows: one rank may have none


@pytest.mark.parametrize(("number", "own"), [(0, slice(0, 3)), (1, slice(3, 6)), (2, slice(6, 7))])
def test_parts_are_as_large_as_the_first_and_the_last_may_be_smaller(number: int, own: slice) -> None:
    assert Rows(7, number, 3).own == own
    assert Rows(2, number, 3).own == slice(min(number, 2), min(number + 1, 2))


@pytest.mark.parametrize(("number", "ranks"), [(0, 1), (0, 2), (1, 2), (2, 4), (3, 4)])
def test_any_number_of_ranks_reads_what_three_have_saved(tmp_path: Path, number: int, ranks: int) -> None:
    whole, norm, moments = torch.randn(7, 4), torch.randn(5), torch.rand(2, 7, 4)
    files = {}
    for saver in range(3):
        own = Rows(7, saver, 3).own
        file = tmp_path / f"step-000003.rank-{saver:04d}-of-0003.safetensors"
        tensors = {"0.parameter": whole[own], "0.exp_avg": moments[0][own], "0.exp_avg_sq": moments[1][own]}
        tensors["0.step"] = torch.tensor(3.0)
        if saver == 0:
            tensors["1.parameter"] = norm
        files[file.name] = write_tensors(file, {name: tensor.contiguous() for name, tensor in tensors.items()})
    write_json(tmp_path / "started_with.json", {"a": 1})
    write_json(tmp_path / "state.json", {"files": files, "losses": [1.0], "grad_norms": [2.0], "val_loss_before": None})
    rows = Rows(7, number, ranks)
    own_count = rows.own.stop - rows.own.start
    parameters = [torch.nn.Parameter(torch.zeros(own_count, 4)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = torch.optim.AdamW(parameters)
    progress = E2eState(tmp_path, {"a": 1}).load(parameters, optimizer, {parameters[0]: rows} if ranks > 1 else {})
    assert progress == E2eProgress((1.0,), (2.0,), None)
    state = optimizer.state[parameters[0]]
    for found, expected in zip((parameters[0], state["exp_avg"], state["exp_avg_sq"]), (whole, *moments), strict=True):
        assert torch.equal(found, expected[rows.own])
    assert state["step"] == 3 and torch.equal(parameters[1], norm)
    assert all(checksum(tmp_path / name) == text for name, text in files.items())


@pytest.fixture
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 1 of 3, as far as shares go."""
    ranks = group.Ranks(1, 3, 3, torch.device("cpu"), "gloo", None)  # type: ignore[arg-type]
    for name in ("_joined", "_acting"):
        monkeypatch.setattr(group, name, ranks)


@pytest.mark.usefixtures("second_of_three")
def test_a_batch_that_ranks_cannot_share_is_refused_at_once(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"--e2e-batch 4 .* 3 ranks; use --e2e-batch 6"):
        make_plan(build_config(SETTINGS | {"model": str(tiny_folder), "overrides": {}}))


@pytest.mark.parametrize(("share", "needed", "fits"), [("auto", "39.1", 4), ("off", "47.2", 8)])
def test_the_refusal_counts_ranks(
    share: Any, needed: str, fits: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """7e9 parameters, 6.5e9 of them trained: 18 * 6.5 + 6 * 0.5 = 120 GB = 111.8 GiB on one GPU."""
    settings = QatSettings(QuantScheme(2, 64), device="cuda", share_weights=share)
    sizes, advice = (
        (6_500_000_000, 7_000_000_000),
        f"38.0 GiB are free; use torchrun with {fits} GPUs as this one, or --",
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (38 * 2**30, 80 * 2**30))
    with pytest.raises(InputError, match=f"111.8 GiB of .* on the GPU and {advice}"):
        check_memory(*sizes, settings)
    request.getfixturevalue("second_of_three")
    with pytest.raises(InputError, match=f"{needed} GiB of .* on each of 3 GPUs and {advice}"):
        check_memory(*sizes, settings)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (48 * 2**30, 80 * 2**30))
    check_memory(*sizes, settings)


@pytest.mark.parametrize(("free", "shared"), [(10**6, True), (10**9, False)])
@pytest.mark.parametrize(("share", "asked"), [("auto", None), ("on", True), ("off", False)])
def test_the_teacher_is_shared_where_a_gpu_would_be_too_full(
    share: Any, asked: bool | None, free: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of 256 x 1024 on two GPUs: 12 bytes for each of 2**17 weights to come, and 2 for each of 2**18."""
    monkeypatch.setattr(qat_memory, "size", lambda: 2)
    monkeypatch.setattr(qat_memory, "largest", lambda value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    linear = SimpleNamespace(in_features=1024, out_features=256)
    latent: Any = SimpleNamespace(parameters=[torch.empty(128, 1024)], linears={"q_proj": linear})
    settings = QatSettings(QuantScheme(2, 64), device="cuda", share_weights=share)
    assert shares_teacher(latent, settings) == (shared if asked is None else asked)


def test_a_gpu_of_several_holds_less_by_what_is_shared() -> None:
    weights, others = 6 * 10**9, 10**9
    assert qat_bytes(weights + others, weights) == 18 * weights + 6 * others  # fp32, gradient, moments; the teacher
    assert qat_bytes(weights + others, weights, ranks=4) == 4 * weights + 2 * weights + 6 * others
    assert qat_bytes(weights + others, weights, ranks=4, share_teacher=True) == 4.5 * weights + 6 * others
