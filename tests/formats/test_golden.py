"""Checkpoints written by upstream's own code dequantize to upstream's own weights, bit for bit."""

import lzma
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from formats import dequantize, get_format
from formats.checkpoint import CheckpointWriter
from formats.conformance import compare
from formats.model import open_checkpoint
from formats.model_writer import write_layer, write_model_config
from formats.types import QuantScheme

CUT = Path(__file__).parent / "golden"
CASES = {
    "w2g64": QuantScheme(2, 64),
    "w3g128": QuantScheme(3, 128),
    "zeros_out_of_range_w2": QuantScheme(2, 64),
    "zeros_out_of_range_w3": QuantScheme(3, 128),
    "zeros_out_of_range_w4": QuantScheme(4, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_dequantizes_to_upstreams_bytes(case) -> None:
    tensors = load_file(CUT / f"{case}.safetensors")
    expected = tensors.pop("dequant")  # [out, in] fp16
    if "g_idx" not in tensors:  # the quirk files hold what the packer made and nothing else
        tensors["g_idx"] = torch.arange(expected.shape[1], dtype=torch.int32) // CASES[case].group_size
    layer = get_format("native").decode(tensors, CASES[case])
    assert torch.equal(dequantize(layer).half().view(torch.int16), expected.view(torch.int16))
    assert torch.equal(dequantize(layer, torch.float16).view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", ["native", "gptq", "gptq_v2"])
def test_a_layer_goes_through_every_format(case, target) -> None:
    tensors = load_file(CUT / f"{case}.safetensors")
    expected = tensors.pop("dequant")
    tensors.setdefault("g_idx", torch.arange(expected.shape[1], dtype=torch.int32) // CASES[case].group_size)
    layer, fmt = get_format("native").decode(tensors, CASES[case]), get_format(target)
    decoded = fmt.decode(fmt.encode(layer), layer.scheme)
    assert compare(layer, decoded, fmt).ok
    assert torch.equal(dequantize(decoded).half(), expected)


@pytest.mark.parametrize("case", ["w2g64", "w3g128"])
def test_native_writes_upstreams_own_bytes(case) -> None:
    tensors = load_file(CUT / f"{case}.safetensors")
    del tensors["dequant"]
    fmt = get_format("native")
    encoded = fmt.encode(fmt.decode(tensors, CASES[case]))
    assert set(encoded) == set(tensors)
    assert all(torch.equal(encoded[name], tensors[name]) for name in tensors)


def upstream_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(lzma.decompress((folder / "ref" / "dequant_upstream_fp16.safetensors.xz").read_bytes()))


@pytest.mark.parametrize("case", ["w2g64", "w3g128"])
def test_every_layer_of_a_checkpoint_without_a_config_dequantizes_to_upstreams_bytes(golden_root, case) -> None:
    expected = upstream_weights(golden_root / case)
    with open_checkpoint(golden_root / case) as checkpoint:
        assert checkpoint.format.id == "native"
        assert checkpoint.scheme == CASES[case]
        assert checkpoint.overrides == {}
        assert {f"{name}.weight" for name in checkpoint.layer_names} == set(expected)
        for name in checkpoint.layer_names:
            weight = dequantize(checkpoint.layer(name)).half()
            assert torch.equal(weight.view(torch.int16), expected[f"{name}.weight"].view(torch.int16)), name


@pytest.mark.parametrize("case", ["w2g64", "w3g128"])
@pytest.mark.parametrize("target", ["native", "gptq", "gptq_v2"])
def test_a_whole_checkpoint_converts_to_upstreams_bytes(golden_root, tmp_path, case, target) -> None:
    fmt = get_format(target)
    with open_checkpoint(golden_root / case) as source, CheckpointWriter(tmp_path / "out") as writer:
        for name in source.layer_names:
            write_layer(writer, fmt, name, source.packed_layer(name))
        for name in source.passthrough_names:
            writer.add(name, source.get(name))
        write_model_config(writer, source.reader.config, fmt, source.scheme, source.ignore)
    expected = upstream_weights(golden_root / case)
    with open_checkpoint(tmp_path / "out") as found, open_checkpoint(golden_root / case) as source:
        assert found.format.id == target
        assert found.passthrough_names == source.passthrough_names
        for name in found.layer_names:
            assert torch.equal(dequantize(found.layer(name)).half(), expected[f"{name}.weight"]), name


def test_two_bits_reach_gptq_v2_without_touching_a_packed_byte(golden_root, tmp_path) -> None:
    fmt = get_format("gptq_v2")
    with open_checkpoint(golden_root / "w2g64") as source, CheckpointWriter(tmp_path / "out") as writer:
        for name in source.layer_names:
            write_layer(writer, fmt, name, source.packed_layer(name))
        write_model_config(writer, source.reader.config, fmt, source.scheme)
    before = load_file(golden_root / "w2g64" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after
    assert all(torch.equal(after[name], before[name]) for name in after)
