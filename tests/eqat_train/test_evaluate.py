"""Perplexity by the protocol, against a small independent implementation in float64; samples that repeat."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, save_tiny_model, tiny_tokens
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eqat_train.data import TokenWindows
from eqat_train.evaluation.perplexity import generate_sample, perplexity
from eqat_train.models.loading import load_dense_model, load_tokenizer
from formats.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_dense_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def reference(model: PreTrainedModel, windows: TokenWindows) -> float:
    """exp of the mean of -log p(token t | tokens before t), a token at a time in float64."""
    losses = []
    for ids, labels in zip(windows.input_ids, windows.labels, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double()
        for position in range(1, len(ids)):
            if labels[position] != -100:
                row = logits[position - 1]
                losses.append(math.log(row.exp().sum().item()) - row[labels[position]].item())
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_perplexity_is_the_protocols_whatever_the_batch(model: PreTrainedModel, batch_size: int | None) -> None:
    windows = TokenWindows.from_ids(tiny_tokens(5, 17))
    assert perplexity(model, windows, batch_size=batch_size) == pytest.approx(reference(model, windows), rel=1e-6)


def test_tokens_without_a_label_do_not_count(model: PreTrainedModel) -> None:
    ids = tiny_tokens(3, 20)
    labels = ids.clone()
    labels[0, :15] = labels[1, ::3] = -100
    windows = TokenWindows(ids, labels)
    assert windows.loss_tokens == int((labels[:, 1:] != -100).sum())
    assert perplexity(model, windows) == pytest.approx(reference(model, windows), rel=1e-6)


def test_the_first_label_of_a_window_never_counts(model: PreTrainedModel) -> None:
    ids = tiny_tokens(2, 10)
    labels = ids.clone()
    labels[:, 0] = 5
    assert perplexity(model, TokenWindows(ids, labels)) == perplexity(model, TokenWindows.from_ids(ids))


def test_an_infinite_loss_is_an_infinite_perplexity(folder: Path) -> None:
    broken = load_dense_model(folder)
    broken.lm_head.weight.data.mul_(1e6)
    assert perplexity(broken, TokenWindows.from_ids(tiny_tokens(1, 10))) == math.inf


def test_token_ids_beyond_the_vocabulary_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=f"{VOCABULARY} entries"):
        perplexity(model, TokenWindows.from_ids(torch.full((1, 4), VOCABULARY)))


def test_windows_without_any_label_are_refused(model: PreTrainedModel) -> None:
    ids = tiny_tokens(1, 4)
    with pytest.raises(InputError, match="no token"):
        perplexity(model, TokenWindows(ids, torch.full_like(ids, -100)))


def test_a_sample_repeats_with_its_seed_and_leaves_the_global_generator_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    state = torch.get_rng_state()
    first = generate_sample(model, tokenizer, "Once", 12, seed=1)
    assert generate_sample(model, tokenizer, "Once", 12, seed=1) == first
    assert generate_sample(model, tokenizer, "Once", 12, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.startswith("Once")


def test_an_empty_prompt_starts_after_the_end_of_a_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert generate_sample(model, tokenizer, "", 5)
