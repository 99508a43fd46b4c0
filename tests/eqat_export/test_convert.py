"""Conversion between formats, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from eqat_export import convert as convert_module
from eqat_export.convert import convert
from eqat_train.pipeline import run_files
from formats.affine import dequantize
from formats.errors import UnsupportedSchemeError
from formats.model import open_checkpoint

UP = "model.layers.0.mlp.up_proj"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return dict(checkpoint.dense_tensors())


def fields(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Values of a dense little-endian bit stream along the last axis, by Python integers."""
    rows = []
    for row in packed.astype(np.uint32):
        stream = int.from_bytes(row.astype("<u4").tobytes(), "little")
        rows.append([(stream >> (bits * i)) & (2**bits - 1) for i in range(count)])
    return np.array(rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("chain", [("gptq_v2", "native"), ("gptq", "native"), ("gptq", "gptq_v2", "gptq", "native")])
def test_any_chain_of_formats_keeps_every_weight_bit_for_bit(
    native: Callable[..., Path], tmp_path: Path, bits: int, group_size: int, chain: tuple[str, ...]
) -> None:
    source = native(bits=bits, group_size=group_size)
    expected = weights(source)
    for i, target in enumerate(chain):
        out = tmp_path / f"{i}-{target}"
        convert(source, out, target)
        found = weights(out)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), name
        source = out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_stored_zero_of_gptq_v1_wraps(native: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    source = native(bits=bits)
    convert(source, tmp_path / "v1", "gptq")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "v1" / "model.safetensors")
    per_word = 32 // bits
    raw = before[f"{UP}.qzeros"].numpy().view(np.uint32)
    z = np.stack([(raw >> (bits * i)) & (2**bits - 1) for i in range(per_word)], axis=-1)
    z = z.reshape(len(raw), -1)[:, :128].astype(np.int64)
    stored = fields(after[f"{UP}.qzeros"].numpy(), bits, 128)
    maxq = 2**bits - 1
    assert (z == 0).any() and (z == maxq).any()
    assert np.array_equal(stored, np.where(z == 0, maxq, z) - 1)
    flipped = np.where(z == 0, -1, 1) * before[f"{UP}.scales"].float().numpy()
    assert np.array_equal(after[f"{UP}.scales"].float().numpy(), flipped)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_native_to_gptq_v2_touches_no_packed_byte(native: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    source = native(bits=bits)
    convert(source, tmp_path / "v2", "gptq_v2")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "v2" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def test_upstream_checkpoints_convert_with_equal_weights(golden_root: Path, tmp_path: Path) -> None:
    for name in ("w2g64", "w3g128"):
        source = golden_root / name
        expected = weights(source)
        for target in ("gptq", "gptq_v2", "native"):
            convert(source, tmp_path / f"{name}-{target}", target)
            found = weights(tmp_path / f"{name}-{target}")
            assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dense_output_is_one_dtype_and_rounded_once(
    native: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    source = native(bits=4, architecture="qwen2")
    result = convert(source, tmp_path / "dense", "dense", options={"dtype": str(dtype).removeprefix("torch.")})
    found = load_file(tmp_path / "dense" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    with open_checkpoint(source) as checkpoint:
        for name in checkpoint.layer_names:
            exact = dequantize(checkpoint.layer(name), torch.float64)
            assert torch.equal(found[f"{name}.weight"], exact.float().to(dtype))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "dense" / "quantize_config.json").exists()
    assert (result.rounded.tensors > 0) is (dtype is not torch.float32)


def test_rounded_scales_are_reported_with_their_error(native: Callable[..., Path], tmp_path: Path) -> None:
    source = native(bits=2, scale_dtype=torch.float32)
    result = convert(source, tmp_path / "v2", "gptq_v2")
    before, after = weights(source), weights(tmp_path / "v2")
    worst = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert result.rounded.tensors == 14
    assert result.rounded.error == pytest.approx(worst, rel=1e-6)
    assert 0 < result.rounded.error <= result.rounded.bound
    assert 0 < result.rounded.relative < 2**-10


def test_layers_are_checked_before_anything_is_written(
    native: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = native(bits=5)
    written = []
    monkeypatch.setattr(convert_module, "write_part", lambda *arguments: written.append(arguments))
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UnsupportedSchemeError, match=r"layer model\.layers\.0\..*2, 3, 4 and 8 bits, not 5"):
        convert(source, tmp_path / "out", "gptq")
    assert not written
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_output_is_sharded_with_an_index_and_brings_its_companions(native: Callable[..., Path], tmp_path: Path) -> None:
    source = native()
    (source / "LICENSE").write_text("free")
    convert(source, tmp_path / "out", "gptq", shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, framework="pt") as file:
            assert name in file.keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "quantize_config.json"):
        assert (tmp_path / "out" / name).exists()


def test_a_full_precision_model_is_refused_with_the_fix(eqat: Callable, dense_models: Callable[[str], Path]) -> None:
    outcome = eqat("export", dense_models("llama"), "--to", "gptq")
    assert outcome.code == 2
    assert "eqat train" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_export_and_verify_need_no_arguments_after_training(
    eqat: Callable, native: Callable[..., Path], tmp_path: Path
) -> None:
    from formats import history  # noqa: PLC0415

    assert eqat("export", "--to", "gptq").code == 2
    history.record("native", native())
    assert "eqat export" in eqat("verify").err
    first = eqat("export", "--to", "gptq")
    assert first.code == 0, first.err
    assert "last native checkpoint" in first.err
    assert "next: eqat verify\n" in first.out
    assert (tmp_path / "native-gptq" / "config.json").exists()
    assert eqat("export", "--to", "gptq_v2").code == 0
    checked = eqat("verify")
    assert checked.code == 0
    assert "native-gptq:" in checked.out and "native-gptq_v2:" in checked.out
    again = eqat("export", "--to", "gptq")
    assert again.code == 2
    assert "--force" in again.err and "--out" in again.err
    assert eqat("export", "--to", "gptq", "--force").code == 0


def test_rounding_is_never_silent(eqat: Callable, native: Callable[..., Path]) -> None:
    source = native(scale_dtype=torch.float32)
    outcome = eqat("export", source, "--to", "gptq_v2")
    assert "ROUNDED: 14 of 14 layers; largest error" in outcome.out
    report = json.loads(eqat("export", source, "--to", "gptq_v2", "--force", "--json").out)
    assert report["exactness"] == {"rounded": 14}
    assert report["rounded"]["error"] > 0
    quiet = eqat("export", source, "--to", "gptq_v2", "--force", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_a_wrong_label_can_be_overruled(eqat: Callable, native: Callable[..., Path], tmp_path: Path) -> None:
    source = native()
    assert eqat("export", source, "--to", "gptq_v2", "--out", tmp_path / "v2").code == 0
    for name in ("config.json", "quantize_config.json"):
        path = tmp_path / "v2" / name
        path.write_text(path.read_text().replace('"gptq_v2"', '"gptq"'))
    assert eqat("export", tmp_path / "v2", "--from", "gptq_v2", "--to", "native", "--out", tmp_path / "n").code == 0
    expected = weights(source)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "n").items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "q4_k"), "unknown format 'q4_k'; known are native, gptq"),
        (("--to", "gptq", "--dtype", "float16"), "gptq takes none of its own"),
        (("--to", "dense", "--dtype", "int8"), "allowed are float16, bfloat16, float32"),
        (("--to", "gptq", "--shard-size", "huge"), "e.g. --shard-size 5GB"),
        (("--to", "gptq", "--from", "dense"), "full-precision"),
    ],
)
def test_bad_options_name_what_is_allowed(
    eqat: Callable, native: Callable[..., Path], arguments: tuple[str, ...], message: str
) -> None:
    outcome = eqat("export", native(), *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_output_onto_or_around_the_source_is_refused(eqat: Callable, native: Callable[..., Path]) -> None:
    source = native()
    for out in (source, source.parent):
        outcome = eqat("export", source, "--to", "gptq", "--out", out, "--force")
        assert outcome.code == 2
        assert "choose another" in outcome.err
    assert (source / "model.safetensors").exists()


def test_what_training_leaves_beside_its_checkpoint_stays_there(native: Callable[..., Path], tmp_path: Path) -> None:
    source = native()
    for name in (run_files.CONFIG_FILE, run_files.LOG_FILE, run_files.REPORT_FILE):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text("")
    convert(source, tmp_path / "out", "gptq")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "chat_template.jinja" in names
    assert not names & {run_files.CONFIG_FILE, run_files.LOG_FILE, run_files.REPORT_FILE}


def test_layers_that_a_format_cannot_hold_side_by_side_are_refused_before_anything_is_written(
    native: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "v2"
    convert(native(bits=4), folder, "gptq_v2")
    for name in ("config.json", "quantize_config.json"):
        config = json.loads((folder / name).read_text())
        config.get("quantization_config", config)["dynamic"] = {rf"+:^{UP}$": {"bits": 2}}
        (folder / name).write_text(json.dumps(config))
    started: list[int] = []
    with pytest.raises(UnsupportedSchemeError, match=rf"layer {UP} is w2g32, the model w4g32; .*--to gptq"):
        convert(folder, tmp_path / "out", "bitblas", start=lambda total: started.append(total) or print)
    assert not started
    assert not (tmp_path / "out").exists()
