"""Exports in humming-kernels: its loader where the package is installed, its kernels where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.runtimes import humming as runtime
from formats.errors import InputError, MissingExtraError
from formats.model import open_checkpoint

MIXED = Path(__file__).parent.parent / "formats" / "golden" / "compressed-tensors" / "mixed"
BITS = [2, 3, 4, 8]
FORMATS = ["compressed-tensors", "gptq_v2"]


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], dict[str, torch.nn.Module]]:
    """Loads every layer of a folder with humming's own loader, on the CPU: only its lock buffer asks for a GPU."""
    pytest.importorskip("humming", reason="needs humming-kernels and triton: pip install 'eqat[humming]'")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")

    def load(folder: Path) -> dict[str, torch.nn.Module]:
        with open_checkpoint(folder) as checkpoint:
            return {name: runtime._load(checkpoint, name, torch.float16) for name in checkpoint.layer_names}

    return load


@pytest.mark.parametrize("bits", BITS)
def test_its_loader_takes_our_tensors_and_finds_the_same_layers_in_both_formats(
    loader: Callable, native: Callable[..., Path], tmp_path: Path, bits: int
) -> None:
    standard: dict[str, list[dict[str, torch.Tensor]]] = {}
    for target in FORMATS:
        convert(native(f"native-{target}", bits=bits, architecture="qwen2"), tmp_path / target, target)
        with open_checkpoint(tmp_path / target) as checkpoint:
            for name, layer in loader(tmp_path / target).items():
                assert (layer.shape_n, layer.shape_k) == checkpoint.layer_features(name)
                stored, state = checkpoint.layer_tensors(name), layer.state_dict()
                for local in state.keys() - {"locks"}:
                    assert torch.equal(state[local], stored[local].to(state[local].dtype)), (name, local)
                schema, tensors = layer.weight_schema._convert_humming(
                    state, [layer.shape_n], [layer.shape_k], torch.float16
                )
                assert str(schema.b_dtype) == f"uint{bits}" and schema.has_zero_point
                standard.setdefault(name, []).append(tensors)
    for name, (ours, theirs) in standard.items():
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[local], theirs[local]) for local in ours), name


def test_layers_of_every_config_group_are_loaded(loader: Callable) -> None:
    with open_checkpoint(MIXED) as checkpoint:
        for name, layer in loader(MIXED).items():
            scheme = checkpoint.layer_scheme(name)
            assert (layer.weight_schema.num_bits, layer.weight_schema.symmetric) == (scheme.bits, scheme.sym)
            state, stored = layer.state_dict(), checkpoint.layer_tensors(name)
            assert all(torch.equal(state[local], stored[local]) for local in state.keys() - {"locks"}), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(eqat: Callable, native: Callable[..., Path], tmp_path: Path) -> None:
    convert(native(bits=4), tmp_path / "out", "compressed-tensors")
    outcome = eqat("verify", tmp_path / "out", "--runtime", "humming")
    assert outcome.code == 2
    assert "runtime humming needs an NVIDIA GPU" in outcome.err and len(outcome.err.splitlines()) == 1


def test_the_package_is_asked_for_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_has_gpu", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install '.*\[humming\]'"):
        get_runtime("humming").check("gptq_v2")
    with pytest.raises(InputError, match="it reads compressed-tensors, gptq_v2"):
        get_runtime("humming").check("gptq")


@pytest.mark.gpu
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_its_kernels_compute_with_our_weights(
    native: Callable[..., Path], tmp_path: Path, bits: int, target: str
) -> None:
    pytest.importorskip("humming", reason="needs humming-kernels: pip install 'eqat[humming]'")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    convert(native(bits=bits), tmp_path / "out", target)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        found = check_runtime(checkpoint, get_runtime("humming"))
    assert found.ok and found.dtype == "float16", found.lines()
