"""Failures that people met in the wild, rebuilt in miniature; each is named by one sentence.

- vllm pull request 38966: GPTQ labelled v1 that stores zeros of 8 at symmetric 4 bits, as gptqmodel 5 wrote some.
- vllm issue 37185: a symmetric 2-bit model of auto-round that vllm answered with "!!!!".
- gptqmodel issue 2350: zero-points of 0 packed as 15, because 1 is taken from them first.
- auto-round pull request 2273: levels clamped to the signed range before packing; a scalar zero of -1 that overruns its
  word; a zero of 0 that v1 cannot hold.

The texts were read in September to November 2026; of 37185 only the report exists, without a diagnosis.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqat_export.convert import convert
from formats import QuantizedLinear, QuantScheme, available_formats, get_format
from formats.packing import pack_bits, unpack_bits
from tests.tiny_checkpoints import quantize_folder

UP = "model.layers.1.mlp.up_proj"
Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def fields_of(tensors: Tensors, name: str, bits: int) -> torch.Tensor:
    qzeros = tensors[f"{name}.qzeros"]
    return unpack_bits(qzeros, bits, qzeros.shape[1] * 32 // bits, axis=1)


@pytest.fixture
def symmetric(dense_models: Callable[[str], Path], tmp_path: Path) -> Make:
    """A real symmetric quantization: codes around the middle of the range."""

    def make(form: str, bits: int = 4) -> Path:
        middle = 2 ** (bits - 1)

        def around_the_middle(layer: QuantizedLinear) -> QuantizedLinear:
            weight = (layer.codes.float() - layer.zeros.repeat_interleave(32, 1)) * layer.scales.repeat_interleave(
                32, 1
            )
            scales = weight.unflatten(1, (-1, 32)).abs().amax(-1) / middle
            codes = (weight / scales.repeat_interleave(32, 1)).round() + middle
            return QuantizedLinear(
                codes.clamp(0, 2**bits - 1).to(torch.uint8),
                scales.half(),
                torch.full_like(layer.zeros, middle),
                QuantScheme(bits, 32, sym=True),
                bias=layer.bias,
            )

        scheme = QuantScheme(bits, 32)
        folder = tmp_path / f"symmetric-{form}"
        return quantize_folder(dense_models("llama"), folder, scheme, format_id=form, change=around_the_middle)

    return make


def configure_auto_round(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def one_less(folder: Path) -> None:
    """Stores z - 1 where z stood, at 2 bits."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name.removesuffix(".qzeros") for name in tensors if name.endswith(".qzeros")]:
        tensors[f"{name}.qzeros"] = pack_bits(fields_of(tensors, name, 2) - 1, 2, axis=1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def relabel(folder: Path, form: str) -> Path:
    for name in ("config.json", "quantize_config.json"):
        path = folder / name
        value = json.loads(path.read_text())
        (value["quantization_config"] if name == "config.json" else value).update(checkpoint_format=form, format=form)
        path.write_text(json.dumps(value))
    return folder


def test_vllm_38966_gptq_with_zeros_of_8(eqat: Callable, symmetric: Make) -> None:
    folder = relabel(symmetric("gptq_v2"), "gptq")
    alone = eqat("verify", folder)
    assert alone.code == 1
    assert (
        "qzeros: labelled gptq (v1, z - 1), but the values are v2, raw z: set checkpoint_format and format to 'gptq_v2'"
        in alone.out
    )
    assert "every field holds the symmetric zero of v2, raw z" in alone.out
    # what has become of it: vllm no longer reads a symmetric zero at all, gptqmodel goes by the label
    report = json.loads(eqat("verify", folder, "--for", "vllm", "--json").out)
    assert report["engine"]["loads"] and report["engine"]["right"]
    outcome = eqat("verify", folder, "--for", "gptqmodel")
    assert "goes by checkpoint_format, which says zeros are less one, and they are raw" in outcome.out
    assert f"use: eqat export {folder} --from gptq_v2 --to gptq_v2" in outcome.out


def test_vllm_37185_symmetric_2_bits(eqat: Callable, symmetric: Make) -> None:
    folder = symmetric("gptq", bits=2)
    assert eqat("verify", folder).code == 0
    assert eqat("verify", folder, "--for", "transformers").code == 0
    outcome = eqat("verify", folder, "--for", "vllm")
    assert outcome.code == 1
    assert "takes GPTQ with sym true at 4 or 8 bits only; here 2 bits, sym True" in outcome.out


@pytest.mark.parametrize("bits", [2, 4])
def test_gptqmodel_2350_zeros_of_0_that_became_maxq(
    eqat: Callable, golden_root: Path, native: Make, tmp_path: Path, edited: Make, bits: int
) -> None:
    """The kernel's mistake, made in a file: 1 is taken from a zero of 0 and the low bits are kept."""
    source = golden_root / "w2g64" if bits == 2 else native(bits=4)
    convert(source, tmp_path / "v2", "gptq_v2")

    def subtract(tensors: Tensors) -> None:
        for name in [name.removesuffix(".qzeros") for name in tensors if name.endswith(".qzeros")]:
            fields = fields_of(tensors, name, bits).clone()
            fields[:, ::9] = 0  # some groups with z = 0
            wrapped = (fields.int() - 1) & (2**bits - 1)
            tensors[f"{name}.qzeros"] = pack_bits(wrapped.to(torch.uint8), bits, axis=1)

    folder = relabel(edited(tmp_path / "v2", subtract), "gptq")
    outcome = eqat("verify", folder)
    assert (
        "fields hold maxq, where z = 0 wrapped: read as 0; readers that add 1 to whole words get other" in outcome.out
    )
    judged = eqat("verify", folder, "--for", "gptqmodel")
    assert judged.code == 1
    assert "adds 1 to whole packed words, and zeros of 0 were wrapped field by field" in judged.out
    assert f"use: eqat export {folder} --to gptq_v2" in judged.out


@pytest.mark.skipif("auto-round" not in available_formats(), reason="the format auto-round is not registered")
def test_vllm_37185_as_auto_round_wrote_it(eqat: Callable, symmetric: Make) -> None:
    """int2-sym in auto_round:auto_gptq. Since then vllm runs it in humming, which takes the zero as symmetric."""
    folder = symmetric("auto-round", bits=2)
    one_less(folder)
    configure_auto_round(folder, packing_format="auto_round:auto_gptq")
    assert eqat("verify", folder).code == 0
    assert eqat("verify", folder, "--for", "vllm").code == 0
    outcome = eqat("verify", folder, "--for", "sglang")
    assert outcome.code == 1
    assert "takes this packing symmetric at 4 or 8 bits only; here 2 bits, sym True" in outcome.out
    # the same with zeros that are no one value is what humming reads wrong
    configure_auto_round(folder, sym=False)
    outcome = eqat("verify", folder, "--for", "vllm")
    assert "runs 2 bits with humming, which takes qzeros as they are, and this packing stores zero - 1" in outcome.out
    # and the model's repository says quant_method intel/auto-round in older versions
    configure_auto_round(folder, quant_method="intel/auto-round")
    assert "knows quant_method auto-round, not 'intel/auto-round'" in eqat("verify", folder, "--for", "vllm").out


@pytest.mark.skipif("auto-round" not in available_formats(), reason="the format auto-round is not registered")
@pytest.mark.parametrize(
    ("packing", "said"),
    [
        (
            "auto_round:auto_gptq",
            "gptq (v1, z - 1), but the values are v2, raw z: set packing_format to 'auto_round:gptqmodel'",
        )
    ],
)
def test_auto_round_packing_against_its_zeros(
    eqat: Callable, golden_root: Path, tmp_path: Path, packing: str, said: str
) -> None:
    convert(golden_root / "w2g64", tmp_path / "out", "auto-round")
    assert eqat("verify", tmp_path / "out").code == 0
    configure_auto_round(tmp_path / "out", packing_format=packing)
    outcome = eqat("verify", tmp_path / "out")
    assert outcome.code == 1
    assert said in outcome.out


@pytest.mark.skipif("awq" not in available_formats(), reason="the format awq is not registered")
def test_gptqmodel_2350_in_awq_itself(eqat: Callable, native: Make, tmp_path: Path) -> None:
    """A sound file with zeros of 0: only the kernel of that version was wrong, and verify says which."""
    convert(native(bits=4), tmp_path / "awq", "awq")
    outcome = eqat("verify", tmp_path / "awq", "--for", "gptqmodel")
    assert outcome.code == 0
    assert "read a zero-point of 0 as 15 in its ExLlamaV2 kernel up to 5.6.12" in outcome.out
    assert "largest zero-point" not in outcome.out


def test_gptqmodel_2350_zeros_of_0_that_became_15_in_a_format_of_raw_zeros(
    eqat: Callable, golden_root: Path, native: Make, tmp_path: Path, edited: Make
) -> None:
    """Weights of one sign have a zero of 0; packed as 15 their groups come out far off."""
    source = native(bits=4)
    assert eqat("verify", source).code == 0

    def wrap(tensors: Tensors) -> None:
        fields = fields_of(tensors, UP, 4)
        fields[fields == 0] = 15
        tensors[f"{UP}.qzeros"] = pack_bits(fields, 4, axis=1)

    outcome = eqat("verify", edited(source, wrap))
    assert "groups have the largest zero-point beside codes that lie near 0" in outcome.out
    assert "gptqmodel's issue 2350" in outcome.out and UP in outcome.out
    assert "largest zero-point" not in eqat("verify", source).out


def test_auto_round_2273_levels_clamped_to_the_signed_range(
    eqat: Callable, golden_root: Path, tmp_path: Path, edited: Make
) -> None:
    """An unsigned zero-point used with signed levels: everything above 2**(b-1) - 1 is clamped."""
    convert(golden_root / "w2g64", tmp_path / "v2", "gptq_v2")

    def clamp(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(".qweight")]:
            levels = unpack_bits(tensors[name], 2, tensors[name].shape[0] * 16, axis=0).int()
            tensors[name] = pack_bits((levels.clamp(max=1) + 2).to(torch.uint8), 2, axis=0)

    outcome = eqat("verify", edited(tmp_path / "v2", clamp))
    assert outcome.code == 1
    assert "codes: 28 layers use only the upper half of their levels, with most codes at the end" in outcome.out
    assert "auto-round did for asymmetric compressed-tensors before its pull request 2273" in outcome.out


def test_auto_round_2273_a_scalar_zero_that_overran_its_word(
    eqat: Callable, golden_root: Path, tmp_path: Path, edited: Make
) -> None:
    convert(golden_root / "w2g64", tmp_path / "v1", "gptq")

    def overrun(tensors: Tensors) -> None:
        tensors[f"{UP}.qzeros"][0, 0] |= -1 << 4

    outcome = eqat("verify", edited(tmp_path / "v1", overrun))
    assert "1 words end in a run of ones" in outcome.out and UP in outcome.out


def test_auto_round_2273_a_zero_of_0_that_v1_cannot_hold(golden_root: Path) -> None:
    """Ours holds it by the complement; clamping to 1, as auto-round does since, moves every weight of the group."""
    layer = QuantizedLinear(
        torch.arange(512, dtype=torch.uint8).view(16, 32) % 4,
        torch.ones(16, 1, dtype=torch.float16),
        torch.zeros(16, 1, dtype=torch.int32),
        QuantScheme(2, 32),
    )
    stored = get_format("gptq").encode(layer)
    assert bool((stored["scales"] < 0).all())
    assert int(unpack_bits(stored["qzeros"], 2, 16, axis=1).max()) == 2  # maxq - 1: nothing wrapped


def test_gptq_labelled_v1_with_raw_zeros_and_no_symmetric_flag(
    eqat: Callable, golden_root: Path, tmp_path: Path
) -> None:
    convert(golden_root / "w2g64", tmp_path / "out", "gptq_v2")
    folder = relabel(tmp_path / "out", "gptq")
    for engine, right in (("gptqmodel", False), ("transformers", False)):
        report = json.loads(eqat("verify", folder, "--for", engine, "--json").out)
        assert report["engine"]["right"] is right
        assert report["engine"]["remedy"] == f"eqat export {folder} --from gptq_v2 --to gptq_v2"
