"""Reading data: every kind of file, datasets, and one-line errors for what cannot be read."""

import json
import lzma
from pathlib import Path

import pytest

from eqat_train.data import open_source
from formats.errors import InputError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

DOCUMENTS = ["First document.\nWith two lines.", "Second.\n\nWith a blank line.", "Third: <|endoftext|> inside a line."]
SEPARATED = "\n<|endoftext|>\n".join(DOCUMENTS) + "\n"
ROWS = [{"text": text, "id": number} for number, text in enumerate(DOCUMENTS)]


def test_separator_lines_split_plain_text_into_documents(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(SEPARATED, encoding="utf-8")
    assert list(open_source(str(file)).texts()) == DOCUMENTS


def test_windows_line_ends_and_byte_order_mark_do_not_reach_the_documents(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + SEPARATED.replace("\n", "\r\n").encode())
    assert list(open_source(str(file)).texts()) == DOCUMENTS


def test_text_without_separators_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("One.\n\nStill one.\n", encoding="utf-8")
    assert list(open_source(str(file)).texts()) == ["One.\n\nStill one."]


def test_leading_trailing_and_double_separators_make_no_empty_documents(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>\nA\n<|endoftext|>\n<|endoftext|>\nB\n<|endoftext|>\n", encoding="utf-8")
    assert list(open_source(str(file)).texts()) == ["A", "B"]


def test_compressed_text_reads_like_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt.xz"
    file.write_bytes(lzma.compress(SEPARATED.encode()))
    assert list(open_source(str(file)).texts()) == DOCUMENTS


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.xz"])
def test_json_lines_give_their_text_column(tmp_path: Path, ending: str) -> None:
    content = "\n\n".join(json.dumps(row) for row in ROWS).encode()
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(lzma.compress(content) if ending.endswith("xz") else content)
    source = open_source(str(file))
    assert source.columns == ("text", "id")
    assert list(source.texts()) == DOCUMENTS


def test_parquet_gives_its_text_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    assert list(open_source(str(file)).texts()) == DOCUMENTS


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the datasets library reads, with its own cache in a temporary place."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:2]), folder / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[2:]), folder / "test.parquet")
    return folder


def test_a_dataset_id_names_the_split_or_takes_the_default(dataset_folder: Path) -> None:
    assert list(open_source(str(dataset_folder)).texts()) == DOCUMENTS[:2]
    assert list(open_source(str(dataset_folder), default_split="test").texts()) == DOCUMENTS[2:]
    assert list(open_source(f"{dataset_folder}::test").texts()) == DOCUMENTS[2:]
    assert list(open_source(f"{dataset_folder}:default:train").texts()) == DOCUMENTS[:2]


def test_datasets_with_other_content_have_other_fingerprints(dataset_folder: Path) -> None:
    whole, other = open_source(str(dataset_folder)), open_source(f"{dataset_folder}::test")
    assert whole.fingerprint == open_source(str(dataset_folder)).fingerprint != other.fingerprint


def test_an_unknown_split_is_refused_with_its_name(dataset_folder: Path) -> None:
    with pytest.raises(InputError, match="split 'dev'"):
        open_source(f"{dataset_folder}::dev")


def test_a_dataset_that_is_not_here_is_refused_in_one_line_when_offline() -> None:
    with pytest.raises(InputError, match="nobody/nothing") as caught:
        open_source("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_both_kinds_of_columns_are_recognised(tmp_path: Path) -> None:
    file = tmp_path / "both.jsonl"
    file.write_text(json.dumps({"text": "t", "instruction": "i", "output": "o"}), encoding="utf-8")
    source = open_source(str(file))
    assert source.has_text and source.has_instructions


BAD_FILES = {
    "missing.txt": (None, "does not exist"),
    "notes.md": (b"text", "unknown ending"),
    "latin.txt": (b"caf\xe9", "not UTF-8"),
    "cut.txt.xz": (lzma.compress(b"text" * 1000)[:-20], "damaged xz"),
    "plain.txt.xz": (b"not compressed", "damaged xz"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "list.jsonl": (b'["text"]', "line 1 is a JSON list"),
    "empty.jsonl": (b"\n", "no rows"),
    "columns.jsonl": (b'{"content": "a"}', "columns content"),
    "numbers.jsonl": (b'{"text": 3}', "row 1: text is int"),
    "broken.parquet": (b"PAR1 no parquet", "as Parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files_are_refused_in_one_line_with_their_name(tmp_path: Path, name: str) -> None:
    content, expected = BAD_FILES[name]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        list(open_source(str(file)).texts())
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
