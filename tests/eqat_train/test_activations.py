"""ActivationStore: the same numbers in every place; the choice of a place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eqat_train.block_ap import activations
from eqat_train.block_ap.activations import ActivationStore, choose_place
from formats.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by place, as the machine reports them."""
    free = {"gpu": 1000, "ram": 10_000, "disk": 100_000}
    monkeypatch.setattr(activations, "_free_gpu", lambda device: free["gpu"] if device.type == "cuda" else 0)
    monkeypatch.setattr(activations.psutil, "virtual_memory", lambda: SimpleNamespace(available=free["ram"]))
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda path: SimpleNamespace(free=free["disk"]))
    return free


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_and_rounded_once(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hidden = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    with ActivationStore((5, 3, 4), dtype, place, CPU, tmp_path / "stream.bin") as store:
        for start in range(0, 5, 2):
            store.write(start, hidden[start : start + 2])
        assert len(store) == 5
        assert store.read(0, 5).dtype == torch.float32
        assert torch.equal(store.read(1, 5), hidden[1:].to(dtype).float())
        store.write(2, torch.zeros(1, 3, 4))
        assert not store.read(2, 3).any() and torch.equal(store.read(3, 5), hidden[3:].to(dtype).float())


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_a_stream_is_copied_whole_and_independent(place: str, tmp_path: Path) -> None:
    shape = (2, 3, 4)
    with (
        ActivationStore(shape, torch.float32, place, CPU, tmp_path / "a.bin") as one,
        ActivationStore(shape, torch.float32, place, CPU, tmp_path / "b.bin") as other,
    ):
        one.write(0, torch.ones(shape))
        other.copy_from(one)
        one.write(0, torch.zeros(shape))
        assert torch.equal(other.read(0, 2), torch.ones(shape))


def test_the_file_is_full_size_at_once_and_gone_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "stream.bin"
    with ActivationStore((4, 3, 2), torch.bfloat16, "disk", CPU, file):
        assert file.stat().st_size == 4 * 3 * 2 * 2
    assert not file.exists()


def test_the_file_is_gone_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "stream.bin"
    with pytest.raises(KeyboardInterrupt), ActivationStore((4, 3, 2), torch.float32, "disk", CPU, file):
        raise KeyboardInterrupt
    assert not file.exists()


def test_a_file_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent/stream\.bin of .* GiB cannot be created"):
        ActivationStore((4, 3, 2), torch.float32, "disk", CPU, tmp_path / "absent" / "stream.bin")


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_an_empty_stream_is_allowed(place: str, tmp_path: Path) -> None:
    with ActivationStore((0, 3, 2), torch.float32, place, CPU, tmp_path / "stream.bin") as store:
        assert len(store) == 0


@pytest.mark.parametrize(
    ("nbytes", "device", "expected"),
    [
        (100, CUDA, "gpu"),
        (100, CPU, "ram"),
        (900, CUDA, "ram"),  # a share of the free memory is left to the rest
        (9_000, CUDA, "disk"),
        (9_000, CPU, "disk"),
    ],
)
def test_auto_takes_the_fastest_place_with_room(
    nbytes: int, device: torch.device, expected: str, room: dict[str, int], tmp_path: Path
) -> None:
    assert choose_place("auto", nbytes, device, tmp_path).place == expected


def test_memory_that_training_needs_is_not_room(room: dict[str, int], tmp_path: Path) -> None:
    assert choose_place("auto", 100, CUDA, tmp_path, reserved=950).place == "ram"


@pytest.mark.parametrize(
    ("requested", "nbytes", "message"),
    [
        ("gpu", 100, "need a CUDA device and the device is cpu"),
        ("tape", 100, "activations is 'tape'; allowed are auto, gpu, ram and disk"),
        ("ram", 9_000, r"activations take 8\.79 KiB .* usable are ram 5\.86 KiB; .*--activations auto"),
        ("auto", 10**6, "fewer --samples.*--work on a larger disk"),
    ],
)
def test_a_place_that_cannot_hold_the_streams_is_refused(
    requested: str, nbytes: int, message: str, room: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        choose_place(requested, nbytes, CPU, tmp_path)


def test_the_choice_says_where_and_how_much(room: dict[str, int], tmp_path: Path) -> None:
    room["ram"] = 2**40
    assert str(choose_place("ram", 3 * 2**30, CPU, tmp_path)) == "activations in RAM: 3.00 GiB"


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_hidden_states_beyond_float16_are_refused_with_the_option(place: str, tmp_path: Path) -> None:
    with ActivationStore((2, 3, 4), torch.float16, place, CPU, tmp_path / "stream.bin") as store:
        store.write(0, torch.full((1, 3, 4), 65504.0))
        store.check_range()
        store.write(1, torch.full((1, 3, 4), -1e5))
        with pytest.raises(InputError, match=r"reach 1e\+05 and --activation-dtype float16 holds 65504"):
            store.check_range()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wider_dtypes_hold_large_hidden_states(dtype: torch.dtype, tmp_path: Path) -> None:
    with ActivationStore((1, 3, 4), dtype, "ram", CPU, tmp_path / "stream.bin") as store:
        store.write(0, torch.full((1, 3, 4), 1e30))
        store.check_range()


def test_advice_names_the_options_that_take_less_room(room: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"take 1\.00 GiB in float32 .*--activation-dtype bfloat16 .*fewer --samples"):
        choose_place("auto", 2**30, CPU, tmp_path, dtype=torch.float32)
    with pytest.raises(InputError, match="in bfloat16") as caught:
        choose_place("auto", 2**30, CPU, tmp_path, dtype=torch.bfloat16)
    assert "--activation-dtype" not in str(caught.value)
