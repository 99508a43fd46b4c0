"""GGUF blocks against ggml's own, and what each type holds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from formats import QuantizedLinear, QuantScheme, dequantize, get_format
from formats.base import Exactness
from formats.conformance import round_trip
from formats.errors import CheckpointError, InputError, UnsupportedSchemeError
from formats.gguf.blocks import BLOCK_TYPES, WRITABLE, pack_blocks, unpack_blocks
from formats.packed import PackedLinear

GOLDEN = load_file(Path(__file__).parent / "golden" / "gguf_blocks.safetensors")
GGUF = get_format("gguf")
SHAPES = [(5, 128, 32), (33, 192, 64), (96, 384, 128), (7, 320, -1)]  # out, in, group


def forced(name: str):
    return get_format("gguf", gguf_type=name)


def by_formula(kind: str, codes: list[int], scale: float) -> list[float]:
    """Python integers and fp16."""
    offset = {"Q2_0": 1, "Q4_0": 8, "Q5_0": 16, "Q8_0": 128}[kind]
    return [float(np.float32(code - offset) * np.float32(np.float16(scale))) for code in codes]


@pytest.mark.parametrize("name", BLOCK_TYPES)
class TestAgainstGgml:
    def test_its_blocks_read_as_its_weights(self, name) -> None:
        kind = BLOCK_TYPES[name]
        codes, scales, minimums = unpack_blocks(kind, GOLDEN[f"{name}.blocks"])
        d = scales.float().repeat_interleave(kind.block, dim=1)
        if minimums is None:
            weight = (codes.float() - kind.offset) * d
        else:
            weight = codes.float() * d + minimums.float().repeat_interleave(kind.block, dim=1)
        assert torch.equal(weight, GOLDEN[f"{name}.weight"])

    def test_its_blocks_are_packed_again_to_its_bytes(self, name) -> None:
        kind = BLOCK_TYPES[name]
        if kind.offset is None:
            pytest.skip("Q4_1 and Q5_1 are never written")
        codes, scales, _ = unpack_blocks(kind, GOLDEN[f"{name}.blocks"])
        assert torch.equal(pack_blocks(kind, codes, scales), GOLDEN[f"{name}.blocks"])

    def test_its_layer_decodes_to_its_weights(self, name) -> None:
        kind = BLOCK_TYPES[name]
        tensors = {"blocks": GOLDEN[f"{name}.blocks"]}
        if kind.offset is None:
            with pytest.raises(CheckpointError, match=r"minimum that is no multiple.*gguf_file="):
                GGUF.decode(tensors, QuantScheme(kind.bits, kind.block))
            return
        layer = GGUF.decode(tensors, QuantScheme(kind.bits, kind.block))
        assert torch.equal(dequantize(layer), GOLDEN[f"{name}.weight"])
        assert (layer.scheme.bits, layer.scheme.group_size) == (kind.bits, kind.block)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_gguf_package_reads_random_blocks_as_we_do(name) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'eqat[gguf]'")
    kind = BLOCK_TYPES[name]
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (6, 5, kind.unit_bytes), generator=generator, dtype=torch.uint8)
    blocks[..., 1] &= 0x3B  # fp16 below 1: no infinity, no NaN
    if kind.offset is None:
        blocks[..., 3] &= 0x3B
    codes, scales, minimums = unpack_blocks(kind, blocks)
    d = scales.float().repeat_interleave(kind.block, dim=1)
    offset = kind.offset or 0
    weight = (codes.float() - offset) * d
    if minimums is not None:
        weight += minimums.float().repeat_interleave(kind.block, dim=1)
    theirs = gguf.dequantize(blocks.view(6, -1).numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(weight.numpy(), theirs)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zeros", ["low", "high", "random", "mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gguf_package_reads_our_layers_as_the_formula(make_layer, bits, zeros, shape) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'eqat[gguf]'")
    out_features, in_features, group_size = shape
    layer = make_layer(bits, group_size, out_features, in_features, zeros=zeros)
    layer.scales[::3] *= -1
    layer.scales[0, 0] = 0
    encoded = GGUF.encode(layer)
    if encoded.choice.type == "Q2_0":
        pytest.skip("the gguf package of PyPI does not know Q2_0; ggml itself reads it in the runtime tests")
    blocks = encoded["blocks"].view(out_features, -1).numpy()
    theirs = gguf.dequantize(blocks, gguf.GGMLQuantizationType[encoded.choice.type])
    assert np.array_equal(theirs, dequantize(layer).numpy())


class TestTheSmallestExactType:
    @pytest.mark.parametrize(
        ("bits", "zeros", "expected"),
        [
            (2, [1, 2], "Q2_0"),
            (2, [0], "Q4_0"),
            (2, [3], "Q4_0"),
            (2, [1, 2, 3], "Q4_0"),
            (3, range(8), "Q4_0"),
            (4, [7, 8], "Q4_0"),
            (4, [6, 8], "Q5_0"),
            (4, [0, 15], "Q5_0"),
            (5, [15, 16], "Q5_0"),
            (5, [14], "Q8_0"),
            (7, [0, 127], "Q8_0"),
            (8, [127, 128], "Q8_0"),
        ],
    )
    def test_follows_the_zeros(self, bits, zeros, expected) -> None:
        layer = spanning(bits, list(zeros))
        encoded = GGUF.encode(layer)
        assert encoded.choice.type == expected
        assert GGUF.exactness(layer) is Exactness.EXACT_WEIGHTS
        assert round_trip(layer, GGUF).ok

    def test_looks_at_codes_where_zeros_do_not_settle_it(self) -> None:
        layer = spanning(4, [3, 9])
        few = replace(layer, codes=(layer.codes.int() % 4 + layer.zeros.repeat_interleave(64, 1) - 1).to(torch.uint8))
        assert GGUF.encode(layer).choice.type == "Q5_0"
        assert GGUF.encode(few).choice.type == "Q2_0"
        assert round_trip(few, GGUF).ok

    def test_a_single_row_far_down_decides_too(self) -> None:
        layer = spanning(2, [1], out_features=300)
        layer.zeros[299, 1] = 0
        assert GGUF.encode(layer).choice.type == "Q4_0"
        assert round_trip(layer, GGUF).ok

    def test_groups_of_32_do_not_fit_q2_0(self, make_layer) -> None:
        layer = make_layer(2, 32, zeros="low")
        encoded = GGUF.encode(replace(layer, zeros=torch.ones_like(layer.zeros)))
        assert (encoded.choice.type, encoded.choice.reason) == ("Q4_0", "groups of 32, Q2_0 has blocks of 64")

    def test_eight_bits_beyond_int8_are_refused(self) -> None:
        with pytest.raises(UnsupportedSchemeError, match=r"q - z beyond Q8_0's -128\.\.127.*--gguf-type Q8_0"):
            GGUF.encode(spanning(8, [100]))

    def test_what_was_chosen_is_told(self) -> None:
        choice = GGUF.encode(spanning(4, [0])).choice
        assert (choice.type, choice.bits_per_weight, choice.reason) == ("Q5_0", 5.5, "q - z beyond Q4_0's -8..7")
        assert GGUF.encode(spanning(2, [1])).choice.reason == "every q - z within -1..2"


class TestAForcedType:
    @pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_takes_the_nearest_integer_it_holds(self, make_layer, kind, bits) -> None:
        layer = make_layer(bits, 64, zeros="mixed")
        fmt = forced(kind.name)
        codes, scales, _ = unpack_blocks(kind, fmt.encode(layer)["blocks"])
        held = (codes.float() - kind.offset) * scales.float().repeat_interleave(kind.block, dim=1)
        steps = layer.codes.double() - layer.zeros.double().repeat_interleave(64, dim=1)
        scale = layer.scales.double().repeat_interleave(64, dim=1)
        either = [steps.clamp(kind.low, kind.high), steps.clamp(-kind.high, -kind.low)]  # as it is, or turned over
        by_group = [(choice * scale).view(64, -1, 64) for choice in either]
        errors = [(choice - steps).abs().view(64, -1, 64).amax(dim=2, keepdim=True) for choice in either]
        expected = torch.where(errors[1] < errors[0], by_group[1], by_group[0]).view_as(steps)
        assert torch.equal(held.double(), expected)
        found = round_trip(layer, fmt)
        assert found.ok
        clipped = bool((held.double() != steps * scale).any())
        assert found.exactness is (Exactness.ROUNDED if clipped else Exactness.EXACT_WEIGHTS)

    def test_q2_0_with_z_of_0_moves_only_the_outermost_code(self) -> None:
        layer = spanning(2, [0])
        fmt = forced("Q2_0")
        encoded = fmt.encode(layer)
        assert not encoded.choice.exact
        assert encoded.choice.reason == "forced; q - z clipped to -1..2"
        error = (dequantize(fmt.decode(encoded, QuantScheme(2, 64))) - dequantize(layer)).abs()
        assert torch.equal(error != 0, layer.codes == 3)
        assert torch.equal(error[error != 0], layer.scales.float().repeat_interleave(64, 1)[error != 0])

    def test_q2_0_wants_groups_of_64(self) -> None:
        with pytest.raises(UnsupportedSchemeError, match=r"w2g32 .*groups of 32, Q2_0 has blocks of 64.*auto"):
            forced("Q2_0").check(QuantScheme(2, 32), 64, 128)

    def test_unknown_ones_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"gguf-type is 'Q4_K'; allowed are auto, Q2_0, Q4_0, Q5_0, Q8_0"):
            forced("Q4_K")


@pytest.mark.parametrize("group_size", [64, 128, -1])
@pytest.mark.parametrize("zeros", [[1], [2], [1, 2], [1, 2, 3]])
@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_become_the_same_bytes(bits, zeros, group_size) -> None:
    layer = replace(spanning(bits, zeros, 33, 256, group_size), bias=torch.randn(33))
    packed, plain = GGUF.encode(PackedLinear.pack(layer)), GGUF.encode(layer)
    assert packed.choice == plain.choice
    assert all(torch.equal(packed[name], plain[name]) for name in plain)


class TestScales:
    def test_fp32_ones_are_rounded_to_fp16_within_the_bound(self, make_layer) -> None:
        layer = make_layer(3, 64, scale_dtype=torch.float32)
        found = round_trip(layer, GGUF)
        assert found.ok
        assert found.exactness is Exactness.ROUNDED
        assert 0 < found.max_abs_weight_error <= found.bound

    def test_subnormal_negative_and_zero_ones_are_exact(self) -> None:
        layer = spanning(2, [1, 2])
        layer.scales[0] = 6e-8
        layer.scales[1] = -layer.scales[1]
        layer.scales[2] = 0
        layer.scales[3] = -0.0
        assert round_trip(layer, GGUF).ok
        assert GGUF.exactness(layer) is Exactness.EXACT_WEIGHTS

    def test_one_beyond_fp16_is_refused(self, make_layer) -> None:
        layer = make_layer(4, 32, scale_dtype=torch.float32)
        layer.scales[3, 2] = 70000.0
        with pytest.raises(UnsupportedSchemeError, match="a scale is 70000; gguf stores fp16"):
            GGUF.encode(layer)


class TestBackToTheOriginalScheme:
    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("group_size", [64, 128, -1])
    def test_full_spans_give_the_zeros_back(self, bits, group_size) -> None:
        layer = spanning(bits, range(2**bits), in_features=256, group_size=group_size)
        found = GGUF.decode(GGUF.encode(layer), layer.scheme)
        turned = found.scales.signbit() != layer.scales.signbit()
        found = found.complement(turned)
        assert torch.equal(found.codes, layer.codes)
        assert torch.equal(found.zeros, layer.zeros)
        assert torch.equal(found.scales, layer.scales)

    def test_symmetric_layers_stay_symmetric(self, make_layer) -> None:
        layer = make_layer(4, 64)
        middle = torch.full_like(layer.zeros, 8)
        layer = replace(layer, zeros=middle, scheme=QuantScheme(4, 64, sym=True), codes=layer.codes.clamp(5, 11))
        assert GGUF.decode(GGUF.encode(layer), layer.scheme).scheme == layer.scheme

    def test_blocks_of_another_scheme_are_refused(self, make_layer) -> None:
        encoded = GGUF.encode(make_layer(4, 32, zeros="low"))
        with pytest.raises(CheckpointError, match="different scales"):
            GGUF.decode(encoded, QuantScheme(4, 64))
        with pytest.raises(CheckpointError, match="span more than 3"):
            GGUF.decode(encoded, QuantScheme(2, 32))
        with pytest.raises(CheckpointError, match="no groups of"):
            GGUF.decode(encoded, QuantScheme(4, 16))


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_minimums_that_are_multiples_of_the_scale_are_zero_points(name) -> None:
    kind = BLOCK_TYPES[name]
    blocks = GOLDEN[f"{name}.blocks"].clone()
    zeros = (torch.arange(32, dtype=torch.int32) % 2**kind.bits).view(8, 4)
    d = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1) * 0 + 0.25
    blocks[..., :2] = d.view(torch.uint8).view(8, 4, 2)
    blocks[..., 2:4] = (-zeros * d).half().view(torch.uint8).view(8, 4, 2)
    layer = GGUF.decode({"blocks": blocks}, QuantScheme(kind.bits, 32))
    assert torch.equal(layer.zeros, zeros)
    codes, _, _ = unpack_blocks(kind, blocks)
    weight = codes.float() * 0.25 + (-zeros * d).half().float().repeat_interleave(32, dim=1)
    assert torch.equal(dequantize(layer), weight)


def test_one_block_by_hand() -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(1, 32) % 16
    layer = QuantizedLinear(
        codes, torch.tensor([[0.5]]).half(), torch.tensor([[8]], dtype=torch.int32), QuantScheme(4, 32)
    )
    stored = GGUF.encode(layer)["blocks"].flatten().tolist()
    assert stored == [0x00, 0x38, *(0x11 * j for j in range(16))]
    assert dequantize(layer).flatten().tolist() == by_formula("Q4_0", codes.flatten().tolist(), 0.5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("bits", "zeros", "type_name"),
    [
        (2, [1], "Q2_0"),
        (2, [1, 2, 2], "Q2_0"),
        (2, [0, 1, 2, 3], "Q4_0"),
        (3, range(8), "Q4_0"),
        (4, [8], "Q4_0"),
        (4, [7, 8], "Q4_0"),
        (4, range(16), "Q5_0"),
    ],
)
def test_packed_codes_become_blocks_of_the_same_weights(shape, bits, zeros, type_name) -> None:
    out_features, in_features, group_size = shape
    layer = spanning(bits, zeros, out_features, in_features, group_size)
    expected = dequantize(layer, torch.float64)
    if type_name == "Q2_0" and layer.scheme.width(in_features) % 64:
        type_name = "Q4_0"
    kind = BLOCK_TYPES[type_name]
    for form in (GGUF, forced(type_name)):
        encoded = form.encode(PackedLinear.pack(layer))
        assert encoded.choice.type == type_name
        codes, scales, _ = unpack_blocks(kind, encoded["blocks"])
        assert torch.equal((codes.double() - kind.offset) * scales.double().repeat_interleave(kind.block, 1), expected)
        assert torch.equal(encoded["blocks"], form.encode(layer)["blocks"])


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_0", "Q8_0"])
def test_packed_codes_take_a_wider_type_where_it_is_asked_for(bits, type_name) -> None:
    layer, kind = spanning(bits, range(2**bits)), BLOCK_TYPES[type_name]
    codes, scales, _ = unpack_blocks(kind, forced(type_name).encode(PackedLinear.pack(layer))["blocks"])
    weights = (codes.double() - kind.offset) * scales.double().repeat_interleave(32, 1)
    assert torch.equal(weights, dequantize(layer, torch.float64))


def test_packed_codes_that_fit_although_their_zeros_alone_do_not_tell_become_q4_0() -> None:
    layer = spanning(4, [10])
    layer = replace(layer, codes=layer.codes.clamp(4, 15))
    encoded = GGUF.encode(PackedLinear.pack(layer))
    assert encoded.choice.type == "Q4_0"
    codes, scales, _ = unpack_blocks(BLOCK_TYPES["Q4_0"], encoded["blocks"])
    weights = (codes.double() - 8) * scales.double().repeat_interleave(32, 1)
    assert torch.equal(weights, dequantize(layer, torch.float64))


def spanning(bits: int, zeros, out_features: int = 64, in_features: int = 128, group_size: int = 64) -> QuantizedLinear:
    """A layer whose every group holds each code, with these zeros in turn."""
    scheme = QuantScheme(bits, group_size)
    shape = (out_features, scheme.groups(in_features))
    values = torch.tensor(list(zeros), dtype=torch.int32)
    filled = values[torch.arange(shape[0] * shape[1]) % len(values)].view(shape)
    codes = (torch.arange(out_features * in_features) % 2**bits).to(torch.uint8).view(out_features, in_features)
    if 2**bits > scheme.width(in_features):  # too few places for every code: both ends at least
        codes[:, ::2], codes[:, 1::2] = 0, scheme.maxq
    scales = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 0.1 + 0.001
    return QuantizedLinear(codes, scales.half(), filled, scheme)
