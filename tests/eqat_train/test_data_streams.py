"""Token streams and windows: the protocol, the draws, and the cache."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import save_tiny_model
from transformers import PreTrainedTokenizerBase

from eqat_train.data import TokenWindows, evaluation_windows, open_source, token_stream, training_windows
from eqat_train.models.loading import load_tokenizer
from eqat_train.reporting.progress import Reporter
from formats.errors import InputError


class Messages(Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """One token a byte, ids 1..256; 0 ends a document."""
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EQAT_CACHE", str(folder))
    return folder


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def stream_of(spec: str, tokenizer: PreTrainedTokenizerBase, reporter: Reporter | None = None) -> np.ndarray:
    return token_stream(open_source(spec), tokenizer, reporter)


def test_every_document_ends_with_the_end_of_text_id(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    stream = stream_of(write(tmp_path / "t.txt", "ab\n<|endoftext|>\nc\n"), tokenizer)
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    assert stream.tolist() == [a, b, 0, c, 0]
    assert stream.dtype == np.int32


def test_tokenizing_in_many_batches_changes_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    documents = [f"document {number}" * (number % 5 + 1) for number in range(40)]
    spec = write(tmp_path / "t.txt", "\n<|endoftext|>\n".join(documents))
    monkeypatch.setattr("eqat_train.data.streams.BATCH_CHARACTERS", 50)
    expected = [
        id_ for text in documents for id_ in [*(tokenizer.convert_tokens_to_ids(list(text.replace(" ", "Ġ")))), 0]
    ]
    assert stream_of(spec, tokenizer).tolist() == expected


def test_a_second_run_reads_the_cache(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    spec, told = write(tmp_path / "t.txt", "some text"), Messages()
    first = stream_of(spec, tokenizer, told)
    again = stream_of(write(tmp_path / "copy.txt", "some text"), tokenizer, told)
    assert again.tolist() == first.tolist()
    assert len(told.texts) == 1 and "t.txt" in told.texts[0]
    assert [file.suffix for file in cache.iterdir()] == [".npy"]


def test_changed_content_of_the_same_size_and_time_is_tokenized_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    spec = write(tmp_path / "t.txt", "aaaa")
    times = (os.stat(spec).st_atime_ns, os.stat(spec).st_mtime_ns)
    first = stream_of(spec, tokenizer).tolist()
    write(tmp_path / "t.txt", "bbbb")
    os.utime(spec, ns=times)
    assert stream_of(spec, tokenizer).tolist() != first


def test_another_tokenizer_gets_its_own_entry(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    spec = write(tmp_path / "t.txt", "some text")
    stream_of(spec, tokenizer)
    other = load_tokenizer(save_tiny_model(tmp_path / "model"))
    other.eos_token = "a"
    assert stream_of(spec, other)[-1] == tokenizer.convert_tokens_to_ids("a")
    assert len(list(cache.iterdir())) == 2


def test_a_failed_tokenization_leaves_nothing_in_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    with pytest.raises(InputError, match="holds no text"):
        stream_of(write(tmp_path / "t.txt", "\n<|endoftext|>\n"), tokenizer)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQAT_CACHE", write(tmp_path / "file", ""))
    with pytest.raises(InputError, match="EQAT_CACHE"):
        stream_of(write(tmp_path / "t.txt", "text"), tokenizer)


def test_concurrent_writers_finish_with_one_complete_entry(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> None:
    spec, streams = write(tmp_path / "t.txt", "some text " * 2000), []
    threads = [threading.Thread(target=lambda: streams.append(stream_of(spec, tokenizer))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == 6
    assert all((stream == streams[0]).all() and len(stream) == 20001 for stream in streams)
    assert len(list(cache.iterdir())) == 1


def test_evaluation_windows_follow_each_other_and_drop_the_tail() -> None:
    windows = evaluation_windows(np.arange(23, dtype=np.int32), 5)
    assert windows.input_ids.tolist() == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]
    assert torch.equal(windows.labels, windows.input_ids)
    assert windows.loss_tokens == 16


def test_a_token_limit_cuts_the_stream_before_windows_are_made() -> None:
    assert len(evaluation_windows(np.arange(100, dtype=np.int32), 10, tokens=39)) == 3


def test_text_shorter_than_a_window_names_both_lengths() -> None:
    with pytest.raises(InputError, match=r"9 tokens.*window of 10.*--seq-len 9"):
        evaluation_windows(np.arange(9, dtype=np.int32), 10)


@pytest.mark.parametrize("length", [20, 27, 101, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_training_and_validation_windows_share_no_position(length: int, seed: int) -> None:
    train, validation = training_windows(np.arange(length, dtype=np.int32), 10, 50, 8, seed)
    assert train.input_ids.shape == (50, 10)
    assert 1 <= len(validation) == min(8, max(1, length // 10 // 10))
    for windows in (train, validation):  # consecutive positions of the stream
        assert torch.equal(windows.input_ids, windows.input_ids[:, :1] + torch.arange(10))
        assert int(windows.input_ids.max()) < length
    assert not set(train.input_ids.flatten().tolist()) & set(validation.input_ids.flatten().tolist())


def test_training_windows_start_anywhere_between_validation_windows() -> None:
    train, validation = training_windows(np.arange(60, dtype=np.int32), 10, 5000, 1, 0)
    held_out = int(validation.input_ids[0, 0])
    possible = {start for start in range(51) if start + 10 <= held_out or start >= held_out + 10}
    assert set(train.input_ids[:, 0].tolist()) == possible


def test_windows_depend_on_the_seed_alone() -> None:
    stream = np.arange(1000, dtype=np.int32)
    one, two, other = (training_windows(stream, 10, 20, 4, seed)[0].input_ids for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_text_too_short_to_train_and_validate_says_what_would_work() -> None:
    with pytest.raises(InputError, match=r"19 tokens.*at least 20.*--seq-len 9"):
        training_windows(np.arange(19, dtype=np.int32), 10, 1, 1, 0)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path, cache: Path) -> None:
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="eos_token"):
        stream_of(write(tmp_path / "t.txt", "text"), tokenizer)


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long)),
        (torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long)),
        (torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)),
        (torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long)),
    ],
)
def test_windows_of_a_wrong_shape_or_dtype_are_refused(ids: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(InputError):
        TokenWindows(ids, labels)


@pytest.mark.parametrize("left", [0, 10, 130, -4])
def test_a_truncated_cache_entry_is_made_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, left: int
) -> None:
    spec = write(tmp_path / "t.txt", "some words " * 50)
    whole = stream_of(spec, tokenizer).tolist()
    (entry,) = cache.iterdir()
    os.truncate(entry, left if left >= 0 else entry.stat().st_size + left)
    said = Messages()
    assert stream_of(spec, tokenizer, said).tolist() == whole
    assert len(said.texts) == 1 and len(list(cache.iterdir())) == 1
    assert stream_of(spec, tokenizer, said).tolist() == whole
    assert len(said.texts) == 1
