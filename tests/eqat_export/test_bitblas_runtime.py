"""bitblas' kernels on a GPU; without one, what they are asked for and handed, and the workaround for Hopper."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import bitblas_build, get_runtime
from eqat_export.runtimes.bitblas import BATCHES, BitblasRuntime, Kernel, build_kernels
from eqat_export.runtimes.bitblas_build import hopper_templates, load_libraries, patched_templates
from formats import QuantScheme, dequantize, get_format, round_to_nearest
from formats.errors import InputError, MissingExtraError
from formats.model import open_checkpoint

HEADER = Path("3rdparty", "tilelang", "src", "tl_templates", "cuda", "gemm_sm90.h")
ENVIRONMENT = ("TL_TEMPLATE_PATH", "NVCC_PREPEND_FLAGS", "LIBRARY_PATH")
# A stand-in that records what it is asked for, and reads bytes with Python's integers.
STAND_IN = """
import torch
from types import SimpleNamespace
__version__ = "stand-in"
asked = []
FIRST_BITS = {2: [0, 8, 2, 10, 4, 12, 6, 14, 16, 24, 18, 26, 20, 28, 22, 30], 4: [0, 16, 4, 20, 8, 24, 12, 28]}

def MatmulConfig(**fields):
    return SimpleNamespace(**fields)

class Matmul:
    def __init__(self, config, target, enable_tuning):
        asked.append((config, target, enable_tuning))
        self.config, self.lib = config, object()

    def __call__(self, inputs, qweight, scales, zeros=None):
        bits = int(self.config.W_dtype.removeprefix("uint").removeprefix("int"))
        mask, first = 2**bits - 1, FIRST_BITS[bits]
        codes = [[(word >> at) & mask for word in row for at in first] for row in qweight.view(torch.int32).tolist()]
        if zeros is None:
            offsets = torch.full(scales.shape, 2 ** (bits - 1))
        elif self.config.zeros_mode == "original":
            offsets = zeros
        else:
            fields = [[(byte >> at) & mask for byte in row for at in range(0, 8, bits)] for row in zeros.tolist()]
            offsets = torch.tensor(fields).T
        width = self.config.K // scales.shape[1]
        spread = lambda values: values.repeat_interleave(width, dim=1).double()
        weight = ((torch.tensor(codes) - spread(offsets)) * spread(scales)).half()
        return (inputs.double() @ weight.double().T).half()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in, importable as bitblas, with a template folder like the real one's."""
    folder = tmp_path / "site" / "bitblas"
    (folder / HEADER).parent.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN)
    (folder / HEADER).write_text(
        "template <int num_mma> TL_DEVICE void wait_wgmma() {\n  warpgroup_wait<num_mma>();\n}\n"
    )
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delitem(sys.modules, "bitblas", raising=False)
    monkeypatch.setattr(bitblas_build, "LIBRARIES", {})
    monkeypatch.setattr(BitblasRuntime, "version", "0.1.0.post1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    yield folder
    sys.modules.pop("bitblas", None)


@pytest.mark.parametrize("name", ["qzeros", "zeros"])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_layer_gets_its_stored_bytes_and_gptqmodels_operator(
    native: Callable[..., Path], tmp_path: Path, package: Path, bits: int, name: str
) -> None:
    convert(native(bits=bits, architecture="qwen2"), tmp_path / "out", "bitblas", options={"zeros_name": name})
    with open_checkpoint(tmp_path / "out") as checkpoint:
        session = get_runtime("bitblas").load(checkpoint, torch.device("cpu"))
        for layer_name in checkpoint.layer_names:
            layer, run = checkpoint.layer(layer_name), session.layer(layer_name)
            assert run is not None
            weight = dequantize(layer).half().T
            expected = weight if layer.bias is None else (weight.float() + layer.bias.float()).half()
            assert torch.equal(run(torch.eye(layer.in_features, dtype=torch.float16)), expected), layer_name
        assert session.layer("model.embed_tokens") is None
        shapes = {checkpoint.layer_features(layer_name) for layer_name in checkpoint.layer_names}
    asked = sys.modules["bitblas"].asked
    assert {(config.N, config.K) for config, _, _ in asked} == shapes
    assert len(asked) == len(shapes)
    for config, target, tuning in asked:
        assert (config.W_dtype, config.zeros_mode, config.group_size) == (f"uint{bits}", "quantized", 32)
        assert (config.A_dtype, config.accum_dtype, config.out_dtype) == ("float16", "float32", "float16")
        assert (config.M, config.with_scaling, config.with_zeros, config.propagate_b) == (BATCHES, True, True, False)
        assert (target, tuning) == ("cuda -arch=sm_80", False)


def test_zeros_as_numbers_and_no_zeros_at_all(
    native: Callable[..., Path], edited: Callable[..., Path], tmp_path: Path, package: Path
) -> None:
    convert(native(bits=4), tmp_path / "out", "bitblas")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".qzeros")]:
            fields = tensors.pop(name).view(torch.uint8)
            zeros = torch.stack([fields & 15, fields >> 4], dim=-1).flatten(1).T  # [out, groups]
            if "mlp" in name:
                tensors[name.replace("qzeros", "zeros")] = zeros.half().contiguous()

    folder = edited(tmp_path / "out", change)
    for config in ("config.json", "quantize_config.json"):
        text = (folder / config).read_text()
        (folder / config).write_text(text.replace('"sym": false', '"sym": true'))
    with open_checkpoint(folder) as checkpoint:
        session = BitblasRuntime().load(checkpoint, torch.device("cpu"))
        for name in checkpoint.layer_names:
            layer, run = checkpoint.layer(name), session.layer(name)
            assert layer.scheme.sym is ("mlp" not in name)
            assert run is not None
            assert torch.equal(run(torch.eye(layer.in_features).half()), dequantize(layer).half().T), name
    kinds = {(config.W_dtype, config.with_zeros, config.zeros_mode) for config, _, _ in sys.modules["bitblas"].asked}
    assert kinds == {("uint4", True, "original"), ("int4", False, "quantized")}


def test_eight_bits_are_not_tried(native: Callable[..., Path], tmp_path: Path, package: Path) -> None:
    convert(native(bits=8), tmp_path / "out", "bitblas")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        result = check_runtime(checkpoint, _Anywhere())
    assert "bitblas 0.1.0.post1 has no 8-bit kernel" in result.lines()[1]
    assert not result.ok


class _Anywhere(BitblasRuntime):
    def check(self, format_id: str | None) -> None:
        pass


def test_what_a_machine_lacks_is_said_in_one_line(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="on an NVIDIA GPU, and none is visible"):
        BitblasRuntime().check("bitblas")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    BitblasRuntime().check("bitblas")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(InputError, match=r"Hopper \(NVIDIA H200\); EQAT_BITBLAS_HOPPER=1 builds them as sm_80's"):
        BitblasRuntime().check("bitblas")
    monkeypatch.setenv("EQAT_BITBLAS_HOPPER", "1")
    BitblasRuntime().check("bitblas")
    with pytest.raises(InputError, match="does not read format gptq"):
        BitblasRuntime().check("gptq")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BitblasRuntime, "requires", ("no_such_bitblas",))
    with pytest.raises(MissingExtraError, match=r"pip install '.*\[bitblas\]'"):
        BitblasRuntime().check("bitblas")


def test_a_missing_library_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitblas_build, "LIBRARIES", {"libnothing.so.12": "nvidia-nothing-cu12"})
    with pytest.raises(InputError, match=r"links libnothing\.so\.12, .* pip install nvidia-nothing-cu12"):
        load_libraries()


def test_templates_are_patched_in_a_copy(package: Path, tmp_path: Path) -> None:
    before = (package / HEADER).read_text()
    copied = patched_templates(package, tmp_path / "scratch")
    text = (copied / "tl_templates" / "cuda" / "gemm_sm90.h").read_text()
    assert text == before.replace("warpgroup_wait<", "cute::warpgroup_wait<")
    assert (package / HEADER).read_text() == before


def test_templates_of_another_version_are_refused(package: Path, tmp_path: Path) -> None:
    (package / HEADER).write_text("template <int num_mma> void wait_wgmma() { cute::warpgroup_wait<num_mma>(); }\n")
    with pytest.raises(InputError, match=r"is not that of bitblas 0\.1\.0\.post1"):
        patched_templates(package, tmp_path / "scratch")


def test_the_environment_is_as_before_afterwards(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TL_TEMPLATE_PATH", raising=False)
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-O3")
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    with hopper_templates(package):
        templates = Path(os.environ["TL_TEMPLATE_PATH"])
        assert os.environ["NVCC_PREPEND_FLAGS"] == f"-I{templates} -O3"
        assert (templates / "tl_templates" / "cuda" / "gemm_sm90.h").exists()
    assert {name: os.environ.get(name) for name in ENVIRONMENT} == before
    assert not templates.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("bits", [2, 4])
def test_exports_run_in_bitblas(
    native: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    pytest.importorskip("bitblas", reason="needs the extra bitblas")
    monkeypatch.setenv("EQAT_BITBLAS_HOPPER", str(int(torch.cuda.get_device_capability() == (9, 0))))
    convert(native(bits=bits, architecture="qwen2"), tmp_path / "out", "bitblas")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        result = check_runtime(checkpoint, get_runtime("bitblas"))
    if bits == 2:  # it has no 2-bit kernel for fewer than 128 out_features
        assert "bitblas built no kernel for" in result.refusal
    else:
        assert result.ok, result.lines()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_weight_comes_back_from_the_kernel(bits: int, group_size: int) -> None:
    pytest.importorskip("bitblas", reason="needs the extra bitblas")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator) * 0.02
    layer = round_to_nearest(weight, QuantScheme(bits, group_size))
    kernel = Kernel(256, 512, f"uint{bits}", group_size, "quantized")
    operator = build_kernels({kernel}, hopper=torch.cuda.get_device_capability() == (9, 0))[kernel]
    stored = get_format("bitblas").encode(layer)
    arguments = [stored[name].cuda() for name in ("qweight", "scales", "qzeros")]
    found = operator(torch.eye(512, dtype=torch.float16, device="cuda"), *arguments)
    assert torch.equal(found.cpu().T, dequantize(layer).half())
