"""Two ranks train what one process trains, hold half of it each, and end together."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_worker import MIXTURE
from ranks_of_a_test import ROOT, launch, what_ranks_saw, write_text
from safetensors.torch import load_file
from tiny_models import save_tiny_model

from eqat_train.block_ap import BlockApSettings
from eqat_train.block_ap.shares import own_samples, own_settings
from eqat_train.config import build_config
from eqat_train.data import NO_LOSS, TokenWindows
from eqat_train.end_to_end.shares import check_batch, own_windows
from eqat_train.pipeline.train import train
from eqat_train.ranks import group
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.errors import InputError
from formats.model import open_checkpoint

SETTINGS: dict[str, Any] = {
    "data": "train.txt",
    "group": 32,
    "samples": 10,  # three batches, the last one of two
    "batch": 4,
    "seq_len": 32,
    "val_samples": 3,  # ranks have one and two
    "epochs": 2,
    "lr_weight": 1e-4,
    "e2e_samples": 11,  # in the last step ranks have one and two
    "e2e_seq_len": 32,
    "e2e_batch": 4,
    "e2e_micro_batch": 1,
    "lr_e2e": 1e-4,
    "device": "cpu",
}


class StopAfterTheFirstBlock(Reporter):
    def event(self, kind: str, **fields: Any) -> None:
        if kind == "block":
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where one process has made ``alone`` and two ranks everything else, see ``rank_worker.py``."""
    folder = tmp_path_factory.mktemp("ranks")
    write_text(folder)
    settings = SETTINGS | {"model": str(tiny_folder)}
    before = Path.cwd()
    os.chdir(folder)
    try:
        train(build_config(settings | {"out": "alone"}), Reporter())
        save_tiny_model(Path("mixtral"), "mixtral")
        train(build_config(settings | MIXTURE | {"out": "alone-mixture"}), Reporter())
        with pytest.raises(KeyboardInterrupt):
            train(build_config(settings | {"out": "resumed"}), StopAfterTheFirstBlock())
    finally:
        os.chdir(before)
    ended = launch(2, folder, "rank_worker.py", json.dumps(settings))
    assert ended.returncode and (folder / "rank0.json").exists(), ended.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def told(made: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    return what_ranks_saw(made)


def report(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Events of a run by kind."""
    events = json.loads((folder / "training_report.json").read_text(encoding="utf-8"))["events"]
    return {kind: [event for event in events if event["event"] == kind] for kind in ("block", "e2e_step", "experts")}


def assert_same_training(one: Path, other: Path) -> None:
    """Losses to the rounding of float32 sums in another order, and parameters within what AdamW makes of that.

    A sum of n float32 terms in another order differs by about sqrt(n) * 2**-24, here 1e-5 of a loss and of a gradient.
    AdamW divides by the gradient's own size, so a gradient near zero may turn a whole step, at most the learning rate,
    around: a weight beside a rounding boundary takes another code, and the scales of a group differ by as much as they
    moved (steps times the learning rate at most).
    """
    mine, its = report(one), report(other)
    for kind, name in (("block", "train_loss"), ("block", "val_loss"), ("e2e_step", "loss"), ("e2e_step", "grad_norm")):
        found = [event[name] for event in mine[kind]]  # of the blocks after an interruption
        assert found and found == pytest.approx([event[name] for event in its[kind]][-len(found) :], rel=1e-5)
    with open_checkpoint(one) as first, open_checkpoint(other) as second:
        codes = different = 0
        for name in first.layer_names:
            a, b = first.layer(name), second.layer(name)
            codes += a.codes.numel()
            different += int((a.codes != b.codes).sum())
            moved = 6 * 1e-4 + 3 * 1e-4  # 6 steps of Block-AP, 3 of E2E-QP
            assert (a.scales.float() - b.scales.float()).abs().max() <= moved
    assert 0 < codes and different <= codes / 1000


def test_two_ranks_train_what_one_process_trains(made: Path) -> None:
    assert_same_training(made / "whole", made / "alone")


def test_each_rank_holds_its_half_of_the_hidden_states(told: list[dict[str, Any]]) -> None:
    # full-precision and quantized stream of the training samples, then of the validation samples
    assert told[0]["samples"] == [5, 5, 1, 1] and told[1]["samples"] == [5, 5, 2, 2]


def test_ranks_go_on_from_what_one_process_has_finished(made: Path, told: list[dict[str, Any]]) -> None:
    assert any("1 of 2 blocks are finished" in text for text in told[0]["said"])
    assert_same_training(made / "resumed", made / "alone")


def test_experts_that_only_some_ranks_use_are_trained_alike(made: Path) -> None:
    assert_same_training(made / "mixture", made / "alone-mixture")
    experts = [report(made / name)["experts"] for name in ("mixture", "alone-mixture")]
    assert [event["tokens"] for event in experts[0]] == [event["tokens"] for event in experts[1]]
    trained = [100 <= seen < 200 for event in experts[0] for seen in event["tokens"]]  # a rank saw half of them or so
    assert any(trained)


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_they_go_on_to_the_same_bytes(
    made: Path, told: list[dict[str, Any]]
) -> None:
    assert [rank["ended"]["stopped"][:17] for rank in told] == ["KeyboardInterrupt"] * 2
    assert any("unfinished E2E-QP: 2 of 3 steps are done" in text for text in told[0]["said"])
    whole, stopped = (load_file(made / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole) and whole.keys() == stopped.keys()


def test_gradients_reduced_beside_backward_give_the_same_bytes(made: Path, told: list[dict[str, Any]]) -> None:
    leaves = 7 * 3 + 2  # of a block: weight, scales and zeros of each linear, and two norms
    assert [rank["overlapped"] for rank in told] == [leaves * 6 * 2] * 2  # six steps, two blocks
    whole, stopped = (load_file(made / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_packed_weights_in_shares_train_the_very_same_scales(made: Path, told: list[dict[str, Any]]) -> None:
    whole, shared = (load_file(made / name / "model.safetensors") for name in ("whole", "shared"))
    assert all(torch.equal(whole[name], shared[name]) for name in whole)
    for rank in told:
        share, everything, gathered = rank["shared"]["held"]
        padding = 14 * 3 * 256 / 2  # of 14 linears: a piece after the codes and two after the zero-points
        assert everything / 2 <= share <= everything / 2 + padding
        assert gathered <= everything / 2  # one of the two layers
        # nearly everything was on its way when it was needed: what comes first is not known in the first passes
        assert rank["shared"]["ahead"] >= 0.6 * rank["shared"]["gathers"] > 0


def test_a_rank_that_drifts_by_one_bit_is_noticed_on_all(made: Path, told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert "RanksDifferError: block 0 (model.layers.0): self_attn.q_proj.weight is not" in rank["ended"]["flipped"]
    assert not (made / "flipped").exists()


def test_a_rank_that_dies_ends_the_run_with_one_line(made: Path, told: list[dict[str, Any]]) -> None:
    assert "another rank has ended" in told[0]["ended"]["killed"] and "\n" not in told[0]["ended"]["killed"]
    assert not (made / "killed").exists()


def test_only_rank_0_leaves_files(made: Path) -> None:
    for folder in ("whole", "resumed", "stopped"):
        names = {file.name for file in (made / folder).iterdir()}
        assert names == {file.name for file in (made / "alone").iterdir()}
        assert not (made / f"{folder}.work").exists()


@pytest.fixture
def second_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 1 of 3, as far as shares go."""
    ranks = group.Ranks(1, 3, 3, torch.device("cpu"), "gloo", None)  # type: ignore[arg-type]
    for name in ("_joined", "_acting"):
        monkeypatch.setattr(group, name, ranks)


@pytest.mark.usefixtures("second_of_three")
def test_a_rank_takes_its_part_of_every_batch() -> None:
    samples = torch.arange(15)[:, None]
    train_part, val_part = own_samples(samples, samples[:4], local_batch=2)
    assert train_part.flatten().tolist() == [2, 3, 8, 9, 13]  # of 0-5, 6-11 and 12-14
    assert val_part.flatten().tolist() == [1]


@pytest.mark.usefixtures("second_of_three")
def test_batches_that_cannot_be_shared_are_refused_with_what_can() -> None:
    settings = BlockApSettings(QuantScheme(2, 64), batch_size=4)
    with pytest.raises(InputError, match=r"--batch 4 .* 3 ranks; use --batch 6"):
        own_settings(settings)
    assert own_settings(replace(settings, batch_size=6)).batch_size == 2
    samples = torch.zeros(14, 2)
    with pytest.raises(InputError, match=r"last batch of 2, .*use --samples 12 or 15"):
        own_samples(samples, samples, local_batch=2)
    with pytest.raises(InputError, match=r"--e2e-batch 32 .* use --e2e-batch 33"):
        check_batch(32)


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize(("count", "rows"), [(6, [2, 3]), (7, [2, 3, -1]), (2, [0]), (1, [-1])])
def test_ranks_have_equally_many_windows_and_what_makes_up_for_a_missing_one_has_no_loss(
    count: int, rows: list[int]
) -> None:
    ids = torch.arange(count)[:, None].repeat(1, 3)
    own = own_windows(TokenWindows.from_ids(ids))
    found = [NO_LOSS if bool((labels == NO_LOSS).all()) else int(labels[0]) for labels in own.labels]
    assert found == [NO_LOSS if row < 0 else row for row in rows]


def test_the_module_that_torchrun_starts_has_the_options_of_eqat_train() -> None:
    commands = [[sys.executable, "-m", *module, "--help"] for module in (["eqat_train"], ["eqat_export", "train"])]
    helps = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for command in commands
    ]
    assert helps[0] == helps[1] and "--e2e-batch" in helps[0]
