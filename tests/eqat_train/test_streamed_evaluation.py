"""A model measured block by block has the perplexity of the whole model."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import quantize_folder
from tiny_models import ARCHITECTURES, MIXTURES, save_tiny_model, tiny_tokens

from eqat_train.data import TokenWindows
from eqat_train.evaluation.perplexity import perplexity
from eqat_train.evaluation.streamed import streamed_perplexity
from eqat_train.models.loading import load_dense_model
from eqat_train.pipeline import train as pipeline
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.errors import InputError
from formats.model import open_checkpoint

CPU = torch.device("cpu")


def streamed(folder: Path, windows: TokenWindows, work: Path, dtype: torch.dtype = torch.float32) -> float:
    with open_checkpoint(folder) as checkpoint:
        return streamed_perplexity(checkpoint, windows, dtype, CPU, Reporter(), work=work, activations="disk")


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3_moe"])
def test_every_architecture_has_the_perplexity_of_the_whole_model(architecture: str, tmp_path: Path) -> None:
    assert architecture in ARCHITECTURES or architecture in MIXTURES
    folder = save_tiny_model(tmp_path / "model", architecture, dtype=torch.bfloat16)
    windows = TokenWindows.from_ids(tiny_tokens(5))
    expected = perplexity(load_dense_model(folder), windows)
    assert streamed(folder, windows, tmp_path) == pytest.approx(expected, rel=1e-6)
    assert not (tmp_path / "evaluation.bin").exists()


def test_quantized_layers_are_dequantized_one_by_one_to_the_same_perplexity(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    made = quantize_folder(folder, tmp_path / "packed", QuantScheme(2, 32))
    windows = TokenWindows.from_ids(tiny_tokens(400))  # more than one batch
    expected = perplexity(load_dense_model(made), windows)
    assert streamed(made, windows, tmp_path) == pytest.approx(expected, rel=1e-6)
    assert streamed(made, windows, tmp_path, torch.bfloat16) == pytest.approx(expected, rel=0.02)


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    with pytest.raises(InputError, match="the model's vocabulary has 257 entries"):
        streamed(folder, TokenWindows.from_ids(tiny_tokens(2) + 200), tmp_path)


def test_a_run_measures_a_model_that_is_too_large_by_block(here, config, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    usual = train(config(eval_data="test.txt", out="usual"), Reporter())
    monkeypatch.setattr(pipeline, "WHOLE_BYTES", 0)
    monkeypatch.setattr(pipeline, "bytes_to_train", lambda *_: 0)
    by_block = train(config(eval_data="test.txt", out="by-block"), Reporter())
    for one, other in zip(usual.results, by_block.results, strict=True):
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-6) and other.sample is None
