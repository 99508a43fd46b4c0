"""Zeros that overran their word are seen in the words, and sound zeros never look like it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from formats import QuantScheme, get_format, round_to_nearest
from formats.zero_words import overrun_words

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("name", "bits"), [("w2", 2), ("w3", 3), ("w4", 4)])
def test_upstreams_overrun_words_are_found(name, bits) -> None:
    tensors = load_file(GOLDEN / f"zeros_out_of_range_{name}.safetensors")
    assert overrun_words(tensors["qzeros"], bits, tensors["scales"].shape[1], 32 // bits) > 0


@pytest.mark.parametrize(("name", "bits"), [("w2g64", 2), ("w3g128", 3)])
def test_upstreams_sound_words_are_not(name, bits) -> None:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    assert overrun_words(tensors["qzeros"], bits, tensors["scales"].shape[1], 32 // bits) == 0


@pytest.mark.parametrize("form", ["native", "gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zeros", ["random", "mixed", "low", "high"])
def test_any_zeros_in_range_are_sound(make_layer, form, bits, zeros) -> None:
    layer, fmt = make_layer(bits, 32, 256, 512, zeros=zeros), get_format(form)
    assert overrun_words(fmt.encode(layer)["qzeros"], bits, 256, fmt.per_word(bits)) == 0


@pytest.mark.parametrize("bits", [2, 4])
def test_one_overrun_word_among_real_zeros_is_found(bits) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    qzeros = get_format("gptq_v2").encode(round_to_nearest(weight, QuantScheme(bits, 64)))["qzeros"]
    assert overrun_words(qzeros, bits, 256) == 0
    qzeros[3, 2] |= -1 << 4  # what OR-ing an unmasked -1 into the field at bit 4 leaves
    assert overrun_words(qzeros, bits, 256) == 1
