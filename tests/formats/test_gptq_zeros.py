"""The zero convention of a GPTQ file is read off its values."""

import pytest
import torch

from formats import get_format, round_to_nearest
from formats.errors import InputError
from formats.gptq_zeros import diagnose_zeros
from formats.model import open_checkpoint
from formats.types import QuantizedLinear, QuantScheme

NAMES = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]


@pytest.fixture
def diagnose(make_folder):
    """Diagnosis of round-to-nearest layers stored in one format under any configuration."""

    def run(stored_as: str, layers: list[QuantizedLinear], **config):
        fmt = get_format(stored_as)
        tensors = {
            f"{name}.{local}": tensor
            for name, layer in zip(NAMES, layers, strict=False)
            for local, tensor in fmt.encode(layer).items()
        }
        scheme = layers[0].scheme
        labels = {key: value for key, value in (fmt.quantization_config(scheme) | config).items() if value is not None}
        with open_checkpoint(make_folder(tensors, {"quantization_config": labels})) as checkpoint:
            return diagnose_zeros(checkpoint)

    return run


def gaussian_layers(bits: int, group_size: int = 64) -> list[QuantizedLinear]:
    generator = torch.Generator().manual_seed(bits)
    weights = (torch.randn(256, 512, generator=generator) for _ in NAMES)
    return [round_to_nearest(weight, QuantScheme(bits, group_size)) for weight in weights]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_values_tell_the_convention_whatever_the_label(diagnose, bits, stored_as, label) -> None:
    found = diagnose(stored_as, gaussian_layers(bits), checkpoint_format=label, format=label)
    assert found.label == label
    assert found.follows == stored_as
    assert found.contradicted is (label != stored_as)
    assert found.wrapped == 0
    assert ("agree" in found.verdict) is (label == stored_as)
    if found.contradicted:
        assert f"set checkpoint_format and format to {stored_as!r}" in found.verdict


@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
def test_symmetric_files_are_told_by_their_one_value(diagnose, stored_as) -> None:
    layers = [
        QuantizedLinear(
            torch.zeros(32, 64, dtype=torch.uint8),
            torch.ones(32, 1, dtype=torch.float16),
            torch.full((32, 1), 8, dtype=torch.int32),
            QuantScheme(4, -1, sym=True),
        )
    ]
    found = diagnose(stored_as, layers, checkpoint_format="gptq", format="gptq")
    assert found.follows == stored_as
    assert "symmetric" in found.evidence[0]


def test_an_unlabelled_file_is_assumed_v1(diagnose) -> None:
    found = diagnose("gptq", gaussian_layers(4), checkpoint_format=None, format=None, meta=None)
    assert not found.labelled
    assert found.label == "gptq"
    assert "unlabelled, so readers assume v1" in found.verdict
    assert found.producers == {}


def test_too_few_groups_say_nothing(diagnose) -> None:
    layer = round_to_nearest(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), QuantScheme(4, -1))
    found = diagnose("gptq_v2", [layer])
    assert found.follows is None
    assert not found.contradicted
    assert "do not tell" in found.verdict


def test_wrapped_fields_are_counted_and_the_producer_named(diagnose, monkeypatch) -> None:
    layers = gaussian_layers(4)
    for layer in layers:
        layer.zeros[:5] = 0
    fmt = get_format("gptq")
    monkeypatch.setattr(type(fmt), "encode", lambda self, layer: wrapped_per_field(layer))
    found = diagnose("gptq", layers, meta={"quantizer": ["gptqmodel:2.2.0"]})
    assert found.follows == "gptq"
    assert found.wrapped >= 3 * 5 * 8
    assert "fields wrapped at z = 0" in found.verdict
    assert any("gptqmodel borrows" in sentence for sentence in found.evidence)


def wrapped_per_field(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    maxq = layer.scheme.maxq
    shifted = QuantizedLinear(layer.codes, layer.scales, (layer.zeros - 1) & maxq, layer.scheme)
    return get_format("gptq_v2").encode(shifted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("zeros", ["random", "mixed", "low", "high"])
def test_zeros_that_do_not_follow_the_codes_are_not_taken_for_a_convention(
    diagnose, make_layer, bits, stored_as, zeros
) -> None:
    assert diagnose(stored_as, [make_layer(bits, 32, 64, 1024, zeros=zeros)]).follows is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("kind", ["one sign", "skewed", "moved"])
def test_a_correct_file_of_unusual_weights_is_not_called_wrong(diagnose, bits, group_size, stored_as, kind) -> None:
    generator = torch.Generator().manual_seed(bits)
    weights = [torch.randn(256, 256, generator=generator) for _ in NAMES]
    if kind == "one sign":  # every zero clamped at 0
        weights = [weight.abs() for weight in weights]
    elif kind == "skewed":
        weights = [weight.exp() for weight in weights]
    layers = [round_to_nearest(weight, QuantScheme(bits, group_size)) for weight in weights]
    if kind == "moved":  # zeros that training moved by one either way
        for layer in layers:
            layer.zeros.add_(torch.randint(-1, 2, layer.zeros.shape, generator=generator, dtype=torch.int32))
            layer.zeros.clamp_(0, layer.scheme.maxq)
    assert diagnose(stored_as, layers).follows in (None, stored_as)


def test_only_gptq_has_conventions(make_layer, make_folder) -> None:
    native = get_format("native")
    tensors = {f"model.up.{local}": tensor for local, tensor in native.encode(make_layer()).items()}
    folder = make_folder(tensors, {"quantization_config": native.quantization_config(QuantScheme(4, 32))})
    with open_checkpoint(folder) as checkpoint, pytest.raises(InputError, match="not GPTQ"):
        diagnose_zeros(checkpoint)
