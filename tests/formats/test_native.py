"""The native layout against literal shift loops, and the reading of upstream's config-less folders."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from formats import Exactness, dequantize, get_format
from formats.conformance import round_trip
from formats.errors import CheckpointError
from formats.types import QuantScheme

NATIVE = get_format("native")
SHAPES = [(64, 128, 32), (64, 128, -1), (64, 128, 128), (10, 77, 32), (1, 1, -1), (33, 45, 7)]  # out, in, group


def packed_by_shifts(values: np.ndarray, bits: int) -> np.ndarray:
    """``32 // bits`` values of each column to a word, low bits first; values ``[n, columns]``."""
    per_word = 32 // bits
    words = np.zeros((-(-values.shape[0] // per_word), values.shape[1]), dtype=np.uint32)
    for i, row in enumerate(values.astype(np.uint32)):
        words[i // per_word] |= row << np.uint32(bits * (i % per_word))
    return words.view(np.int32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), SHAPES)
def test_bytes_are_the_shift_loops(make_layer, bits, out_features, in_features, group_size) -> None:
    layer = make_layer(bits, group_size, out_features, in_features, bias=True)
    tensors = NATIVE.encode(layer)
    assert set(tensors) == {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert np.array_equal(tensors["qweight"].numpy(), packed_by_shifts(layer.codes.T.numpy(), bits))
    assert np.array_equal(tensors["qzeros"].numpy().T, packed_by_shifts(layer.zeros.numpy(), bits))
    assert torch.equal(tensors["scales"], layer.scales.T)
    width = in_features if group_size == -1 else group_size
    assert tensors["g_idx"].tolist() == [i // width for i in range(in_features)]
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zeros", ["low", "high", "random", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_is_exact(make_layer, bits, zeros, shape, dtype) -> None:
    out_features, in_features, group_size = shape
    layer = make_layer(bits, group_size, out_features, in_features, zeros=zeros, scale_dtype=dtype)
    found = round_trip(layer, NATIVE)
    assert found.ok
    assert found.exactness is Exactness.EXACT
    decoded = NATIVE.decode(NATIVE.encode(layer), layer.scheme)
    assert decoded.scales.dtype is dtype
    assert decoded.scheme == layer.scheme


def test_act_order_and_bias_come_back(make_layer) -> None:
    layer = make_layer(3, 32, 20, 100, act_order=True, bias=True)
    decoded = NATIVE.decode(NATIVE.encode(layer), QuantScheme(3, 32))
    assert torch.equal(decoded.g_idx, layer.g_idx)
    assert torch.equal(decoded.bias, layer.bias)
    assert decoded.scheme.desc_act


def test_symmetric_layers_are_recognised_by_their_zeros(make_layer) -> None:
    layer = make_layer(4, 32)
    layer = replace(layer, zeros=torch.full_like(layer.zeros, 8))
    assert NATIVE.decode(NATIVE.encode(layer), layer.scheme).scheme.sym


def test_config_says_everything_and_comes_back() -> None:
    scheme, other = QuantScheme(2, 64, desc_act=True), QuantScheme(4, -1)
    config = NATIVE.quantization_config(scheme, ["lm_head"], {"model.layers.0.mlp": other})
    assert config["quant_method"] == "eqat"
    assert config["checkpoint_format"] == "native"
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert NATIVE.detect(config, ["a.qweight"])
    assert NATIVE.parse_config(config) == scheme
    assert NATIVE.layer_scheme(config, "model.layers.0.mlp", {}) == other
    assert NATIVE.layer_scheme(config, "model.layers.1.mlp", {}) == scheme


@pytest.mark.parametrize(
    "config", [{}, {"bits": "2", "group_size": 64}, {"bits": 2}, {"bits": 9, "group_size": 64}, {"bits": True}]
)
def test_bad_configs_are_refused(config) -> None:
    with pytest.raises(CheckpointError, match="quantization configuration"):
        NATIVE.parse_config(config)


def shapes_of(layer) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in NATIVE.encode(layer).items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_bits_and_group_size_follow_from_shapes(make_layer, bits, group_size) -> None:
    layers = {
        "a": shapes_of(make_layer(bits, group_size, 96, 256)),
        "b": shapes_of(make_layer(bits, group_size, 256, 768)),
    }
    assert NATIVE.parse_config(NATIVE.infer_config(layers)) == QuantScheme(bits, group_size)


def test_a_layer_no_wider_than_a_group_does_not_hide_the_group_size(make_layer) -> None:
    layers = {"a": shapes_of(make_layer(2, 64, 96, 64)), "b": shapes_of(make_layer(2, 64, 96, 256))}
    assert NATIVE.parse_config(NATIVE.infer_config(layers)).group_size == 64


def test_shapes_that_leave_bits_open_are_refused(make_layer) -> None:
    with pytest.raises(CheckpointError, match="do not tell bits"):
        NATIVE.infer_config({"tiny": shapes_of(make_layer(2, -1, 4, 4))})


def test_mixed_group_sizes_without_a_config_are_refused(make_layer) -> None:
    layers = {"a": shapes_of(make_layer(2, 64, 96, 256)), "b": shapes_of(make_layer(2, 32, 96, 256))}
    with pytest.raises(CheckpointError, match=r"differ in group_size: \[32, 64\]"):
        NATIVE.infer_config(layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": None}, "no qzeros"),
        ({"scales": None}, "no scales"),
        ({"qweight": torch.zeros(4, 64, dtype=torch.int32)}, "qweight has shape"),
        ({"qweight": torch.zeros(16, 64, dtype=torch.int64)}, "qweight is int64"),
        ({"qweight": torch.zeros(16, dtype=torch.int32)}, "expected two axes"),
        ({"qzeros": torch.zeros(4, 7, dtype=torch.int32)}, "qzeros has shape"),
        ({"scales": torch.ones(3, 64)}, "scales has shape"),
        ({"scales": torch.full((4, 64), float("nan"))}, "finite"),
        ({"g_idx": torch.zeros(128)}, "expected integers"),
        ({"g_idx": torch.full((128,), 4, dtype=torch.int32)}, "g_idx span"),
        ({"g_idx": torch.zeros(100, dtype=torch.int32)}, "qweight has shape"),
        ({"bias": torch.zeros(3)}, "bias have shape"),
    ],
)
def test_contradicting_tensors_are_refused(make_layer, change, message) -> None:
    layer = make_layer(4, 32)
    tensors = NATIVE.encode(layer) | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        NATIVE.decode(tensors, layer.scheme)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_missing_g_idx_means_consecutive_groups(make_layer, bits) -> None:
    per_word = 32 // bits
    layer = make_layer(bits, -1, 64, 8 * per_word)
    tensors = NATIVE.encode(layer)
    del tensors["g_idx"]
    assert torch.equal(dequantize(NATIVE.decode(tensors, layer.scheme)), dequantize(layer))
