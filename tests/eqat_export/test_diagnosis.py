"""Each kind of damage is named by one sentence, and a sound checkpoint by none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqat_export.convert import convert
from eqat_export.verify import verify_checkpoint
from formats.checkpoint import CheckpointReader
from formats.errors import CheckpointError
from formats.model import open_checkpoint
from formats.packing import pack_bits, unpack_bits

UP = "model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]
Make = Callable[..., Path]


def findings(folder: Path, severity: str, source_format: str | None = None) -> list[str]:
    with open_checkpoint(folder, source_format) as checkpoint:
        return [f"{item.where}: {item.text}" for item in verify_checkpoint(checkpoint) if item.severity == severity]


def relabel(folder: Path, **fields: Any) -> Path:
    """Sets fields of both places a GPTQ configuration stands in."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))
    side = folder / "quantize_config.json"
    if side.exists():
        side.write_text(json.dumps(json.loads(side.read_text()) | fields))
    return folder


@pytest.fixture
def export(native: Make, tmp_path: Path) -> Make:
    """Exports of a tiny model; ``shards`` splits by blocks."""

    def make(to: str = "gptq_v2", name: str = "out", bits: int = 4, shards: bool = False, **kinds: Any) -> Path:
        source = native(f"{name}-source", bits=bits, **kinds)
        convert(source, tmp_path / name, to)
        return split_by_block(tmp_path / name) if shards else tmp_path / name

    return make


def split_by_block(folder: Path) -> Path:
    """The same tensors in one file for block 1 and one for the rest."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{2 if '.layers.1.' in name else 1}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_a_sound_export_has_no_error_and_no_warning(export: Make, form: str, bits: int) -> None:
    folder = export(form, bits=bits, shards=True)
    assert not findings(folder, "error")
    assert not findings(folder, "warning")


@pytest.mark.parametrize(
    ("dropped", "sentence"),
    [
        (["qweight"], f"{UP}: has g_idx, qzeros, scales but no qweight"),
        (["scales"], f"{UP}: no scales; a layer has qweight, qzeros and scales"),
        (["qweight", "qzeros", "scales", "g_idx"], f"{UP}: is missing; 1 other blocks have it"),
    ],
)
def test_missing_tensors_are_named(export: Make, edited: Make, dropped: list[str], sentence: str) -> None:
    def drop(tensors: Tensors) -> None:
        for local in dropped:
            del tensors[f"{UP}.{local}"]

    assert sentence in findings(edited(export(), drop), "error")


def test_a_missing_norm_is_named(export: Make, edited: Make) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors["model.layers.0.input_layernorm.weight"]

    assert findings(edited(export(), drop), "error") == [
        "model.layers.0.input_layernorm: is missing; 1 other blocks have it"
    ]


def test_blocks_that_differ_in_kind_are_not_called_damaged(export: Make, edited: Make) -> None:
    def experts(tensors: Tensors) -> None:
        """Block 1 gets a router where block 0 has an up_proj."""
        for local in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{UP}.{local}"]
        tensors["model.layers.1.mlp.router.weight"] = torch.zeros(4, 64)

    assert not findings(edited(export(), experts), "error")


def test_a_missing_block_is_named(export: Make, edited: Make) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    assert findings(edited(export(), drop), "error") == [
        "model.layers: has no tensors of block 1; 2 blocks are expected"
    ]


def test_an_index_that_names_the_wrong_shard_says_which_has_it(export: Make) -> None:
    folder = export(shards=True)
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"][f"{UP}.scales"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"not in model-00001-of-00002\S+, model-00002-of-00002\S+ has it"):
        CheckpointReader(folder)


def test_shards_and_tensors_that_nothing_names_are_a_warning(export: Make) -> None:
    folder = export(shards=True)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00001-of-00003.safetensors")
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(value))
    stray, unnamed = findings(folder, "warning")
    assert stray.startswith("model-00001-of-00003.safetensors: is part of no checkpoint here")
    assert "holds 1 tensors that the index does not name, e.g. model.norm.weight" in unnamed


def test_shards_of_two_exports_are_told_by_their_scales(export: Make) -> None:
    folder = export(shards=True)
    path = folder / "model-00002-of-00002.safetensors"
    changed = {name: t.bfloat16() if name.endswith("scales") else t for name, t in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})
    assert any(
        "scales: are float16 in model-00001" in text and "two exports" in text for text in findings(folder, "error")
    )


def test_shards_of_two_exports_are_told_by_their_zeros(golden_root: Path, tmp_path: Path) -> None:
    for form in ("gptq", "gptq_v2"):
        convert(golden_root / "w2g64", tmp_path / form, form)
        split_by_block(tmp_path / form)
    name = "model-00002-of-00002.safetensors"
    shutil.copy(tmp_path / "gptq" / name, tmp_path / "gptq_v2" / name)
    assert any("two exports" in text and f"gptq in {name}" in text for text in findings(tmp_path / "gptq_v2", "error"))


def test_one_layer_of_another_kind_is_a_warning(export: Make, edited: Make) -> None:
    def drop(tensors: Tensors) -> None:
        del tensors[f"{UP}.g_idx"]

    assert any(f"without g_idx in 1, e.g. {UP}" in text for text in findings(edited(export(), drop), "warning"))


@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        (torch.float32, "scales: are float32; gptq_v2 readers cast them to float16, where"),
        (torch.bfloat16, "bfloat16 itself keeps 8 bits of each"),
    ],
)
def test_scales_that_readers_cast_are_a_warning(export: Make, edited: Make, dtype: torch.dtype, sentence: str) -> None:
    def cast(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(".scales"):
                tensors[name] = (tensors[name].float() * 1.0001).to(dtype)

    assert any(sentence in text for text in findings(edited(export(), cast), "warning"))


def test_scales_beyond_half_precision(export: Make, edited: Make) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.scales"][0, :3] = 3e-6
        tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"].float()
        tensors["model.layers.0.mlp.up_proj.scales"][0, :3] = 3e-6
        tensors[f"{UP}.scales"][0, 9] = 1e6

    folder = edited(export(), change)
    assert any("3 groups have a float16 scale below" in text for text in findings(folder, "warning"))
    assert any(f"1 are beyond float16's 65504, e.g. in {UP}" in text for text in findings(folder, "error"))


def test_a_placeholder_g_idx_is_an_error(export: Make, edited: Make) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.g_idx"].zero_()

    assert f"{UP}: g_idx is 0 throughout although there are 2 groups: a placeholder" in findings(
        edited(export(), change), "error"
    )


def test_oddities_of_the_group_order_are_named(export: Make, edited: Make) -> None:
    def crowd(tensors: Tensors) -> None:
        tensors[f"{UP}.g_idx"][40] = 0

    folder = edited(export(), crowd, "crowded")
    assert any("puts 33 features into group 0; a group has 32" in text for text in findings(folder, "warning"))

    def reorder(tensors: Tensors) -> None:
        tensors[f"{UP}.g_idx"] = tensors[f"{UP}.g_idx"].flip(0).contiguous()

    folder = edited(export(name="second"), reorder, "reordered")
    assert any("g_idx reorders the groups and desc_act is false" in text for text in findings(folder, "warning"))


def test_a_lost_group_order_is_an_error(export: Make, edited: Make) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    folder = relabel(edited(export(), drop), desc_act=True)
    assert any("desc_act is true and there is no g_idx" in text for text in findings(folder, "error"))


def test_a_native_3_bit_file_labelled_gptq_is_named_precisely(native: Make, edited: Make) -> None:
    source = native(bits=3, group_size=64)
    folder = relabel(edited(source, lambda tensors: None), quant_method="gptq", checkpoint_format="gptq_v2")
    assert any(
        "14 3-bit layers are mislabelled: their shapes are EfficientQAT's own ten codes a word, not gptq_v2" in text
        and "down_proj has 13 rows for 128 in_features; read it with --from native" in text
        for text in findings(folder, "error")
    )
    assert not [text for text in findings(folder, "error", "native") if "mislabelled" in text]


def test_a_dense_3_bit_file_labelled_native_is_named_precisely(export: Make) -> None:
    folder = relabel(export(bits=3, group_size=64), quant_method="eqat", checkpoint_format="native")
    assert any(
        "GPTQ's dense stream, not native" in text and "--from gptq_v2" in text for text in findings(folder, "error")
    )


def test_a_planar_3_bit_file_read_as_dense_is_told_by_its_codes(
    golden_root: Path, tmp_path: Path, edited: Make
) -> None:
    packing = pytest.importorskip("gptqmodel.utils.planar_packing", reason="gptqmodel is not installed")
    convert(golden_root / "w3g128", tmp_path / "v2", "gptq_v2")
    assert not findings(tmp_path / "v2", "error")

    def planar(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("qweight"):
                codes = unpack_bits(tensors[name].T, 3, tensors[name].shape[0] * 32 // 3, axis=1)
                tensors[name] = packing.planar_pack_rows(codes.T.to(torch.int32), 3).contiguous()

    found = findings(edited(tmp_path / "v2", planar), "error")
    assert any("mislabelled: their codes look uniform as gptq_v2" in text and "planar gptq_p" in text for text in found)


def test_levels_clamped_to_their_upper_half_are_an_error(golden_root: Path, tmp_path: Path, edited: Make) -> None:
    convert(golden_root / "w2g64", tmp_path / "v2", "gptq_v2")

    def clamp(tensors: Tensors) -> None:
        name = "model.layers.1.mlp.up_proj.qweight"
        codes = unpack_bits(tensors[name], 2, tensors[name].shape[0] * 16, axis=0)
        tensors[name] = pack_bits((codes + 2).clamp(max=3).to(torch.uint8), 2, axis=0)

    found = findings(edited(tmp_path / "v2", clamp), "error")
    assert any("codes: 1 layers use only the upper half of their levels" in text for text in found)


def test_overrun_words_are_a_warning(golden_root: Path, tmp_path: Path, edited: Make) -> None:
    convert(golden_root / "w2g64", tmp_path / "v2", "gptq_v2")

    def overrun(tensors: Tensors) -> None:
        tensors[f"{UP}.qzeros"][0, 1] |= -1 << 6

    found = findings(edited(tmp_path / "v2", overrun), "warning")
    assert any(text.startswith("qzeros: 1 words end in a run of ones") for text in found)


def test_zeros_one_below_the_codes_are_seen_in_formats_with_one_convention(golden_root: Path, edited: Make) -> None:
    def shift(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                columns = tensors[name].shape[1] * 16
                fields = unpack_bits(tensors[name], 2, columns, axis=1, per_word=16)
                tensors[name] = pack_bits((fields.int() - 1).clamp(min=0).to(torch.uint8), 2, axis=1, per_word=16)

    assert not findings(golden_root / "w2g64", "warning")
    found = findings(edited(golden_root / "w2g64", shift), "warning")
    assert any(text.startswith("zeros: lie one below the codes") for text in found)
