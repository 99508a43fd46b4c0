"""What every registered format promises, asked of all of them alike.

Nothing here knows a format by name: what each one holds comes from its own ``check``, how exactly from its own
``exactness`` and ``bound``. That its bytes are those of the field is proved beside each format, by other tools' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from formats import QuantizedLinear, QuantScheme, available_formats, dequantize, get_format
from formats.base import Exactness, Format, PackedFormat
from formats.conformance import compare, round_trip
from formats.errors import UnsupportedSchemeError
from formats.packed import PackedLinear

FORMATS = list(available_formats())
READABLE = [name for name in FORMATS if get_format(name).readable]
BITS = range(1, 9)
GROUPS = (16, 32, 64, 128, -1)
SHAPE = (64, 256)


def options_of(format_id: str) -> Iterator[dict[str, str]]:
    """The defaults, then every other value of one option at a time."""
    yield {}
    for option in get_format(format_id).options:
        for value in option.choices:
            if value != option.default:
                yield {option.name.replace("-", "_"): value}


VARIANTS = [
    pytest.param(format_id, options, id=" ".join([format_id, *options.values()]))
    for format_id in FORMATS
    for options in options_of(format_id)
]


def holds(fmt: Format, scheme: QuantScheme, shape: tuple[int, int] = SHAPE) -> bool:
    try:
        fmt.check(scheme, *shape)
    except UnsupportedSchemeError as error:
        assert str(scheme.bits) in str(error) or str(scheme.group_size) in str(error) or "desc_act" in str(error)
        return False
    return True


def held_schemes(fmt: Format) -> list[QuantScheme]:
    return [scheme for bits in BITS for group in GROUPS if holds(fmt, scheme := QuantScheme(bits, group))]


@pytest.mark.parametrize(("format_id", "options"), VARIANTS)
@pytest.mark.parametrize("zeros", ["low", "high", "random", "mixed"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_layer_comes_back_as_promised(make_layer, format_id, options, zeros, scale_dtype) -> None:
    fmt = get_format(format_id, **options)
    schemes = held_schemes(fmt)
    assert schemes
    for scheme in schemes:
        layer = make_layer(scheme.bits, scheme.group_size, *SHAPE, zeros=zeros, scale_dtype=scale_dtype, bias=True)
        try:
            found = round_trip(layer, fmt)
        except UnsupportedSchemeError:
            assert fmt.exactness(layer) is Exactness.ROUNDED, scheme  # values, not the scheme, were refused
            continue
        assert found.ok, (scheme, found)


@pytest.mark.parametrize(("format_id", "options"), VARIANTS)
def test_a_value_too_far_off_is_noticed(make_layer, format_id, options) -> None:
    fmt = get_format(format_id, **options)
    scheme = held_schemes(fmt)[0]
    layer = make_layer(scheme.bits, scheme.group_size, *SHAPE)
    weight = dequantize(layer)
    weight[3, 5] += layer.scales.abs().max().float() * 2 ** (scheme.bits + 1)
    assert not compare(layer, weight, fmt).ok


@pytest.mark.parametrize("format_id", [name for name in FORMATS if isinstance(get_format(name), PackedFormat)])
def test_packed_layers_encode_to_the_bytes_of_unpacked_ones(make_layer, format_id) -> None:
    fmt = get_format(format_id)
    for scheme in held_schemes(fmt):
        layer = make_layer(scheme.bits, scheme.group_size, *SHAPE, bias=True)
        packed, plain = fmt.encode_packed(PackedLinear.pack(layer)), fmt.encode(layer)
        assert list(packed) == list(plain)
        assert all(torch.equal(packed[name], plain[name]) for name in plain), scheme
        assert all(tensor.is_contiguous() for tensor in plain.values())
        assert set(plain) <= set(fmt.local_names) and fmt.marker in plain


@pytest.mark.parametrize(("format_id", "options"), VARIANTS)
def test_what_check_refuses_encode_refuses(make_layer, format_id, options) -> None:
    fmt = get_format(format_id, **options)
    for bits in BITS:
        for group, shape in ((32, (64, 256)), (24, (64, 96)), (10, (33, 70)), (64, (1, 64))):
            scheme = QuantScheme(bits, group)
            if not holds(fmt, scheme, shape):
                with pytest.raises(UnsupportedSchemeError):
                    fmt.encode(make_layer(bits, group, *shape))


@pytest.mark.parametrize("format_id", FORMATS)
def test_act_order_is_held_or_refused(make_layer, format_id) -> None:
    fmt = get_format(format_id)
    scheme = held_schemes(fmt)[0]
    if scheme.group_size == -1:
        scheme = QuantScheme(scheme.bits, 32)
    layer = make_layer(scheme.bits, scheme.group_size, *SHAPE, act_order=True)
    if holds(fmt, layer.scheme):
        assert round_trip(layer, fmt).ok
    else:
        with pytest.raises(UnsupportedSchemeError, match=r"desc_act|act-order|g_idx"):
            fmt.encode(layer)


@pytest.mark.parametrize("format_id", READABLE)
def test_inputs_are_not_changed(make_layer, format_id) -> None:
    fmt = get_format(format_id)
    scheme = held_schemes(fmt)[0]
    layer = make_layer(scheme.bits, scheme.group_size, *SHAPE, bias=True)
    parts = (layer.codes, layer.scales, layer.zeros, layer.bias)
    before = [tensor.clone() for tensor in parts]
    tensors = fmt.encode(layer)
    stored = {name: tensor.clone() for name, tensor in tensors.items()}
    fmt.decode(tensors, layer.scheme)
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True))
    assert all(torch.equal(stored[name], tensors[name]) for name in stored)


@pytest.mark.parametrize("format_id", READABLE)
def test_its_own_configuration_is_read_back(format_id) -> None:
    fmt = get_format(format_id)
    for scheme in held_schemes(fmt):
        config = json.loads(json.dumps(fmt.quantization_config(scheme)))
        found = fmt.parse_config(config)
        assert (found.bits, found.group_size) == (scheme.bits, scheme.group_size), asdict(scheme)


@pytest.mark.parametrize(("format_id", "options"), VARIANTS)
def test_it_has_a_page_and_a_title(format_id, options) -> None:
    fmt = get_format(format_id, **options)
    module = Path(__import__(type(fmt).__module__, fromlist=["x"]).__file__)
    pages = {path.stem for path in (*module.parent.glob("*.md"), *module.parent.parent.glob("*.md"))}
    assert {format_id, format_id.replace("-", "_"), module.stem, module.parent.name} & pages
    assert fmt.title and fmt.title[0] == fmt.title[0].strip() and not fmt.title.endswith(".")


@pytest.mark.parametrize("format_id", READABLE)
def test_a_missing_or_misshapen_tensor_is_named(make_layer, format_id) -> None:
    from formats.errors import CheckpointError  # noqa: PLC0415

    fmt = get_format(format_id)
    scheme = held_schemes(fmt)[0]
    layer: QuantizedLinear = make_layer(scheme.bits, scheme.group_size, *SHAPE)
    tensors = fmt.encode(layer)
    # along the last axis: where one tensor is the whole layer, nothing contradicts its count of rows
    short = {**tensors, fmt.marker: tensors[fmt.marker][..., :-1]}
    with pytest.raises(CheckpointError):
        fmt.decode(short, layer.scheme)
    with pytest.raises(CheckpointError):
        fmt.decode({name: tensor for name, tensor in tensors.items() if name != fmt.marker}, layer.scheme)
