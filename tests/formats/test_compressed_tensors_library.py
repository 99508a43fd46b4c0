"""compressed-tensors against the library's own compressor, configuration and matching, on the CPU."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install 'eqat[compressed-tensors]'")

from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_named_modules, match_targets

from formats import QuantizedLinear, QuantScheme, dequantize, get_format
from formats.compressed_tensors_config import config_groups, group_for

SHAPES = [(64, 128, 32), (20, 80, 16), (96, 64, -1)]  # out, in, group


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


def scheme_for(layer: QuantizedLinear) -> QuantizationScheme:
    size = layer.scheme.group_size
    arguments = QuantizationArgs(
        num_bits=layer.scheme.bits,
        symmetric=layer.scheme.sym,
        strategy="channel" if size == -1 else "group",
        group_size=None if size == -1 else size,
    )
    return QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")


@pytest.mark.parametrize("zeros", ["low", "high", "random", "mixed"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_and_weights_are_the_librarys(make_layer, shape, bits, zeros) -> None:
    rows, columns, group = shape
    layer = replace(make_layer(bits, group, rows, columns, zeros=zeros), bias=None)
    middle = 2 ** (bits - 1)
    theirs = PackedQuantizationCompressor.compress(
        {
            "weight": dequantize(layer),
            "weight_scale": layer.scales,
            "weight_zero_point": (layer.zeros - middle).to(torch.int8),
        },
        scheme_for(layer),
    )
    ours = get_format("compressed-tensors").encode(layer)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_computes_our_weights_in_the_dtype_of_the_scales(make_layer, shape, bits, dtype) -> None:
    rows, columns, group = shape
    layer = make_layer(bits, group, rows, columns, scale_dtype=getattr(torch, dtype))
    tensors = get_format("compressed-tensors", scale_dtype=dtype).encode(layer)
    weight = PackedQuantizationCompressor.decompress(tensors, scheme_for(layer))["weight"]
    assert weight.dtype is getattr(torch, dtype)
    assert torch.equal(weight, dequantize(layer).to(weight.dtype))


def test_its_configuration_class_takes_ours() -> None:
    overrides = {"a.down_proj": QuantScheme(8, -1), "b.down_proj": QuantScheme(8, -1), "a.up": QuantScheme(2, 64)}
    written = get_format("compressed-tensors").quantization_config(
        QuantScheme(4, 128, sym=True), ["lm_head"], overrides
    )
    found = QuantizationConfig.model_validate(json.loads(json.dumps(written)))
    assert (found.format, found.quantization_status, found.ignore) == ("pack-quantized", "compressed", ["lm_head"])
    groups = [group for group in found.config_groups.values() if isinstance(group, QuantizationScheme)]
    assert [(group.targets, group.weights.num_bits, group.weights.symmetric) for group in groups] == [
        (["Linear"], 4, True),
        (["a.down_proj", "b.down_proj"], 8, False),
        (["a.up"], 2, False),
    ]
    assert [(group.weights.strategy, group.weights.group_size) for group in groups] == [
        ("group", 128),
        ("channel", None),
        ("group", 64),
    ]


def test_modules_get_the_group_that_the_library_gives_them() -> None:
    """Paths, patterns and classes that overlap, in an order that does not help."""
    model = torch.nn.ModuleDict({name: torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}) for name in "abcd"})
    model["norm"] = torch.nn.LayerNorm(4)
    weights = [{"num_bits": bits, "group_size": 32, "strategy": "group"} for bits in (4, 8, 3, 2)]
    targets = [["Linear"], ["re:[ab].q"], ["b.q", "re:c.q$"], ["re:a"]]
    written = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["re:d"],
        "config_groups": {
            f"g{i}": {"targets": names, "weights": given}
            for i, (names, given) in enumerate(zip(targets, weights, strict=True))
        },
    }
    owners = {target: f"g{i}" for i, names in enumerate(targets) for target in names}
    found = match_named_modules(model, owners, written["ignore"])
    matched = {name: module for name, module in found if isinstance(module, torch.nn.Linear)}
    assert set(matched) == {"a.q", "b.q", "c.q"}
    for name, module in matched.items():
        theirs = owners[match_targets(name, module, owners)[0]]
        assert group_for(config_groups(written), written["ignore"], name).name == theirs, name
