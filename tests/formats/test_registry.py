"""Formats by name."""

from importlib.metadata import EntryPoint

import pytest

from formats import available_formats, get_format, registry
from formats.base import Format
from formats.errors import UnknownFormatError


@pytest.fixture
def entry_point(monkeypatch: pytest.MonkeyPatch):
    def declare(*points: EntryPoint) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: points)
        available_formats.cache_clear()

    yield declare
    monkeypatch.undo()
    available_formats.cache_clear()


def test_every_format_loads_and_knows_its_own_name() -> None:
    for name in available_formats():
        fmt = get_format(name)
        assert isinstance(fmt, Format)
        assert fmt.id == name
        assert fmt.title
        assert fmt.marker in fmt.local_names


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownFormatError, match=r"unknown format 'q4_k'; known are native, gptq, ") as caught:
        get_format("q4_k")
    assert all(name in str(caught.value) for name in available_formats())


def test_the_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        available_formats()["mine"] = "here:Mine"


def test_third_parties_add_formats(entry_point) -> None:
    entry_point(EntryPoint("mine", "formats.dense:DenseFormat", registry.ENTRY_POINT_GROUP))
    assert get_format("mine", dtype="bfloat16").id == "dense"


def test_a_taken_name_is_an_error(entry_point) -> None:
    entry_point(EntryPoint("gptq", "elsewhere:Gptq", registry.ENTRY_POINT_GROUP))
    with pytest.raises(UnknownFormatError, match="already taken"):
        available_formats()


def test_two_third_parties_may_not_share_a_name(entry_point) -> None:
    entry_point(*(EntryPoint("mine", f"{name}:Mine", registry.ENTRY_POINT_GROUP) for name in ("one", "two")))
    with pytest.raises(UnknownFormatError, match="already taken"):
        available_formats()
