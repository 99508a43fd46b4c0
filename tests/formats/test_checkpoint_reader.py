"""Opening a checkpoint folder checks all of it; files are built with the safetensors library."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from formats import checkpoint_reader
from formats.checkpoint import CheckpointReader
from formats.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.ones(5, dtype=torch.bfloat16),
    "c.qweight": torch.arange(6, dtype=torch.int32).view(2, 3),
    "flag": torch.tensor(True),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = list(TENSORS)
    weight_map = {name: f"model-0000{1 + (i > 1)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: TENSORS[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def raw_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_single_file_reads_every_tensor(make_folder) -> None:
    with CheckpointReader(make_folder(TENSORS)) as reader:
        assert set(reader.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            info = reader.tensors[name]
            assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            assert torch.equal(reader.get(name), tensor)


def test_shards_read_every_tensor(sharded) -> None:
    with CheckpointReader(sharded) as reader:
        assert list(reader.tensors) == list(TENSORS)
        assert reader.tensors["c.qweight"].shard == "model-00002-of-00002.safetensors"
        assert all(torch.equal(reader.get(name), tensor) for name, tensor in TENSORS.items())


def test_tensors_outlive_the_reader(make_folder) -> None:
    with CheckpointReader(make_folder(TENSORS)) as reader:
        kept = reader.get("a.weight")
    assert torch.equal(kept, TENSORS["a.weight"])
    with pytest.raises(CheckpointError, match="closed"):
        reader.get("a.weight")


def test_unknown_tensor(make_folder) -> None:
    with CheckpointReader(make_folder(TENSORS)) as reader, pytest.raises(CheckpointError, match="no tensor 'd'"):
        reader.get("d")


def test_any_single_safetensors_file_will_do(make_folder) -> None:
    folder = make_folder(TENSORS)
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    assert len(CheckpointReader(folder).tensors) == len(TENSORS)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("quantize_config.json", "quant_config.json"), "quantize_config.json"),
        (("quant_config.json",), "quant_config.json"),
        ((), "config.json"),
    ],
)
def test_quantization_config_is_found_in_gptqmodels_order(make_folder, files, expected) -> None:
    folder = make_folder(TENSORS, {"quantization_config": {"from": "config.json"}})
    for name in files:
        (folder / name).write_text(json.dumps({"from": name}))
    assert CheckpointReader(folder).quantization_config == {"from": expected}


def test_full_precision_has_an_empty_quantization_config(make_folder) -> None:
    assert CheckpointReader(make_folder(TENSORS)).quantization_config == {}


def test_missing_folder(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "nowhere")


def test_file_instead_of_a_folder(make_folder) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        CheckpointReader(make_folder(TENSORS) / "config.json")


def test_missing_shard(sharded) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        CheckpointReader(sharded)


def test_index_that_names_an_absent_tensor(sharded) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["d.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"'d.weight' is not in model-00001"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": 1}}', "not json", '{"weight_map": []}'])
def test_malformed_index(sharded, index) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        CheckpointReader(sharded)


def test_index_may_not_leave_the_folder(sharded) -> None:
    index = {"weight_map": {"a.weight": "../sharded/model-00001-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_file(make_folder, keep) -> None:
    folder = make_folder(TENSORS)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        CheckpointReader(folder)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGED = {
    "header longer than the file": (raw_file({}, length=10**6), "truncated"),
    "header longer than any file": (raw_file({}, length=2**63), "truncated"),
    "not JSON": (raw_file(b"{]"), "not JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not JSON"),
    "nested without end": (raw_file(b"[" * 100_000), "not JSON"),
    "a list": (raw_file([]), "expected an object"),
    "unowned bytes": (raw_file({"a": F32}, b"\0" * 8), "no tensor owns"),
    "a hole": (raw_file({"a": F32, "b": {**F32, "data_offsets": [8, 12]}}, b"\0" * 12), "starts at byte 8"),
    "an overlap": (raw_file({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"\0" * 6), "starts at byte 2"),
    "unknown dtype": (raw_file({"a": {**F32, "dtype": "F12"}}, b"\0" * 4), "'F12'; known are"),
    "shape against span": (raw_file({"a": {**F32, "shape": [2]}}, b"\0" * 4), "takes 8 bytes"),
    "negative shape": (raw_file({"a": {**F32, "shape": [-1]}}, b"\0" * 4), "malformed"),
    "entry without dtype": (raw_file({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4), "malformed"),
    "entry that is no object": (raw_file({"a": 3}), "malformed"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_header(make_folder, damage) -> None:
    content, message = DAMAGED[damage]
    folder = make_folder(TENSORS)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null"])
def test_malformed_config(make_folder, content) -> None:
    folder = make_folder(TENSORS)
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CheckpointReader(folder)


def test_missing_config(make_folder) -> None:
    folder = make_folder(TENSORS)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        CheckpointReader(folder)


def test_no_weights(make_folder) -> None:
    folder = make_folder(TENSORS)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        CheckpointReader(folder)


def test_pickled_weights_are_named_and_never_loaded(make_folder) -> None:
    folder = make_folder(TENSORS)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match="pickled weights, which are never loaded"):
        CheckpointReader(folder)


def test_several_files_without_an_index(make_folder) -> None:
    folder = make_folder(TENSORS)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file(TENSORS, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        CheckpointReader(folder)


def test_file_damaged_after_opening(make_folder) -> None:
    folder = make_folder(TENSORS)
    reader = CheckpointReader(folder)
    (folder / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match="cannot read tensor"):
        reader.get("a.weight")


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_the_quantization_may_stand_under_mlx_lms_key(make_folder, key) -> None:
    folder = make_folder({"a": torch.ones(1)}, {key: {"bits": 4}, "other": {"bits": 3}})
    with CheckpointReader(folder) as reader:
        assert reader.quantization_config == {"bits": 4}


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_a_quantization_that_is_no_object_is_refused(make_folder, key) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is not an object"):
        CheckpointReader(make_folder({"a": torch.ones(1)}, {key: 4}))


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1, 1], []])
def test_rows_of_a_matrix_are_read_in_the_order_asked_for(sharded: Path, rows: list[int]) -> None:
    with CheckpointReader(sharded) as reader:
        assert torch.equal(reader.get_rows("a.weight", rows), TENSORS["a.weight"][rows])
        assert torch.equal(reader.get_rows("c.qweight", [1]), TENSORS["c.qweight"][1:])
    with pytest.raises(CheckpointError, match="is closed"):
        reader.get_rows("a.weight", [0])


def test_large_tensors_can_be_read_a_few_bytes_at_a_time(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_reader, "_CHUNK", 7)
    with CheckpointReader(sharded) as reader:
        for name, tensor in TENSORS.items():
            parts = [(start, part.clone()) for start, part in reader.chunks(name)]
            assert all(len(part) <= 7 for _, part in parts)
            assert [start for start, _ in parts] == list(range(0, tensor.nbytes, 7))
            found = torch.cat([part for _, part in parts]) if parts else torch.empty(0, dtype=torch.uint8)
            assert torch.equal(found, tensor.reshape(-1).view(torch.uint8) if tensor.numel() else found[:0])
        (sharded / "model-00001-of-00002.safetensors").write_bytes(b"another")
        with pytest.raises(CheckpointError, match="changed since it was opened"):
            next(reader.chunks("a.weight"))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told what will be read")
def test_what_is_wanted_soon_is_asked_for_by_its_bytes(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(file: int, offset: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append(os.pread(file, count, offset))

    monkeypatch.setattr(os, "posix_fadvise", noted)
    with CheckpointReader(sharded) as reader:
        reader.expect("a.weight")
        reader.expect("c.qweight")
    assert asked == [TENSORS[name].numpy().tobytes() for name in ("a.weight", "c.qweight")]
    monkeypatch.delattr(os, "posix_fadvise")
    with CheckpointReader(sharded) as reader:
        reader.expect("a.weight")
        assert torch.equal(reader.get("a.weight"), TENSORS["a.weight"])
