"""A quantized output head: chosen by name alone, rounded, and trained by E2E-QP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from eqat_train.block_ap import check_block_ap
from eqat_train.block_ap.settings import BlockApSettings
from eqat_train.data import TokenWindows
from eqat_train.e2e_qp import E2eSettings, run_e2e_qp
from eqat_train.overrides import choose_schemes
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme, dequantize
from formats.checkpoint import CheckpointReader
from formats.errors import InputError, UnsupportedSchemeError
from formats.model import open_checkpoint
from tests.eqat_train.block_ap_runs import SCHEME, train_block_ap
from tests.tiny_models import save_tiny_model, tiny_config, tiny_tokens

NAMES = ["model.layers.0.mlp.up_proj"]


def _config() -> PreTrainedConfig:
    config = tiny_config("llama")
    config.vocab_size = 320  # a head whose outputs every layout packs
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model", _config)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    train_block_ap(model, root, overrides={"lm_head": "w8g32"})
    return root / "out"


def test_only_its_own_path_chooses_it() -> None:
    assert choose_schemes(NAMES, SCHEME, {"lm_head": "w8"}, head="lm_head")["lm_head"] == QuantScheme(8, 32)
    assert choose_schemes(NAMES, SCHEME, {"lm_head": "skip"}, head="lm_head")["lm_head"] is None
    assert "lm_head" not in choose_schemes(NAMES, SCHEME, {"*": "w4"}, head="lm_head")
    with pytest.raises(InputError, match="where it is named: lm_head"):
        choose_schemes(NAMES, SCHEME, {"*_head": "w8"}, head="lm_head")


def test_a_shared_weight_and_an_impossible_scheme_are_refused(model: Path, tmp_path: Path) -> None:
    tied = save_tiny_model(tmp_path / "tied", "qwen3")
    with pytest.raises(InputError, match="lm_head shares its weight with the embedding"):
        check_block_ap(tied, BlockApSettings(SCHEME, {"lm_head": "w8"}, device="cpu"))
    with pytest.raises(UnsupportedSchemeError, match="does not divide in_features 64 of lm_head"):
        check_block_ap(model, BlockApSettings(SCHEME, {"lm_head": "w8g48"}, device="cpu"))


def test_it_is_rounded_to_the_nearest_and_nothing_else_changes(model: Path, quantized: Path, tmp_path: Path) -> None:
    train_block_ap(model, tmp_path)
    with open_checkpoint(quantized) as found, open_checkpoint(tmp_path / "out") as plain, CheckpointReader(model) as fp:
        assert set(found.layer_names) == {*plain.layer_names, "lm_head"} and found.ignore == ()
        head = found.layer("lm_head").unpack()
        assert head.scheme == QuantScheme(8, 32)
        weight = fp.get("lm_head.weight").double()
        step = head.scales.double().abs().repeat_interleave(32, dim=1)
        # half a step, and what rounding the scale to fp16 moves the ends of the range by
        assert ((dequantize(head).double() - weight).abs() <= step * (0.5 + 256 * 2**-11)).all()
        assert ((dequantize(head).double() - weight).abs() <= 0.5001 * step).double().mean() > 0.98
        for name in plain.reader.tensors:
            if name != "lm_head.weight":
                assert torch.equal(found.reader.get(name), plain.reader.get(name)), name


def test_e2e_qp_trains_its_scales(quantized: Path, tmp_path: Path) -> None:
    settings = E2eSettings(epochs=4, batch_size=4, lr=1e-3, device="cpu")
    windows = TokenWindows.from_ids(tiny_tokens(8))
    report = run_e2e_qp(quantized, windows, settings, tmp_path / "out", work_dir=tmp_path / "work", reporter=Reporter())
    assert report.losses[-1] < report.losses[0]
    with open_checkpoint(quantized) as before, open_checkpoint(tmp_path / "out") as after:
        old, new = (checkpoint.layer("lm_head").unpack() for checkpoint in (before, after))
        assert torch.equal(old.codes, new.codes) and torch.equal(old.zeros, new.zeros)
        assert not torch.equal(old.scales, new.scales)
