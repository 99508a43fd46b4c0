"""The record of what was made in a working directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from formats import history
from formats.errors import InputError


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("native-a", "native-b", "export-1", "export-2"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_an_empty_directory_has_no_history() -> None:
    assert history.last_native() is None
    assert history.last_exports() == []
    assert not Path(".eqat").exists()


def test_the_newest_native_checkpoint_wins() -> None:
    history.record("native", "native-a")
    history.record("native", "native-b", bits=2)
    history.record("export", "export-1", source="native-b")
    assert history.last_native() == Path("native-b")


def test_a_deleted_checkpoint_is_passed_over() -> None:
    history.record("native", "native-a")
    history.record("native", "native-b")
    Path("native-b").rmdir()
    assert history.last_native() == Path("native-a")


def test_exports_are_those_of_the_newest_native_checkpoint() -> None:
    history.record("native", "native-a")
    history.record("export", "export-1", source="native-a")
    history.record("native", "native-b")
    history.record("export", "export-2", source="native-b")
    assert history.last_exports() == [Path("export-2")]
    assert history.source_of("export-1") == Path("native-a")


def test_a_repeated_export_counts_once() -> None:
    history.record("native", "native-a")
    for path in ("export-1", "export-2", "export-1"):
        history.record("export", path, source="native-a")
    assert history.last_exports() == [Path("export-2"), Path("export-1")]


def test_exports_made_before_the_checkpoint_was_written_anew_do_not_count() -> None:
    history.record("native", "native-a")
    history.record("export", "export-1", source="native-a")
    history.record("native", "native-a")
    assert history.last_exports() == []


def test_an_export_path_that_now_holds_another_checkpoint_does_not_count() -> None:
    history.record("native", "native-a")
    history.record("export", "export-1", source="native-a")
    history.record("export", "export-1", source="native-b")
    assert history.last_exports() == []


def test_without_training_the_last_exported_checkpoint_counts() -> None:
    history.record("export", "export-1", source="native-a")
    history.record("export", "export-2", source="native-b")
    assert history.last_exports() == [Path("export-2")]


def test_paths_below_the_directory_survive_a_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "work"
    (inner / "native").mkdir(parents=True)
    monkeypatch.chdir(inner)
    history.record("native", inner / "native")
    history.record("export", tmp_path / "export-1", source=inner / "native")
    moved = inner.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert history.last_native() == Path("native")
    assert history.last_exports() == [tmp_path / "export-1"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"records": [{}]}', '{"records": [{"kind": "x", "path": "y"}]}'])
def test_a_damaged_history_is_named(text: str) -> None:
    Path(".eqat").mkdir()
    (Path(".eqat") / "history.json").write_text(text)
    with pytest.raises(InputError, match=r"history\.json"):
        history.last_native()


def test_a_failed_write_keeps_the_old_history() -> None:
    history.record("native", "native-a")
    with pytest.raises(TypeError):
        history.record("native", "native-b", value=object())
    assert history.last_native() == Path("native-a")
    assert [path.name for path in Path(".eqat").iterdir()] == ["history.json"]
    assert json.loads((Path(".eqat") / "history.json").read_text())["records"][0]["path"] == "native-a"
