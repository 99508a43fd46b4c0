"""A checkpoint appears whole or not at all; files are read back with the safetensors library."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from formats import checkpoint_writer
from formats.checkpoint import CheckpointReader, CheckpointWriter
from formats.errors import CheckpointError, InputError, OutputExistsError


def write(folder: Path, tensors: dict[str, torch.Tensor], **options) -> Path:
    with CheckpointWriter(folder, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.write_json("config.json", {"model_type": "llama"})
    return folder


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def mixed_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=generator).half(),
        "words": torch.arange(7, dtype=torch.int32),
        "flag": torch.tensor(True),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "brain": torch.randn(4, 4, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 3),
        'quote " \\ é 模型': torch.tensor(3.5, dtype=torch.float64),
        "eighth": torch.ones(8, dtype=torch.float8_e4m3fn),
    }


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """Lets the file system take so many bytes of safetensors data."""

    def limit(capacity: int) -> None:
        real_open = Path.open

        class Disk:
            def __init__(self, file) -> None:
                self._file, self._written = file, 0

            def write(self, data) -> int:
                self._written += len(data)
                if self._written > capacity:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self._file.write(data)

            def __getattr__(self, name: str):
                return getattr(self._file, name)

            def __enter__(self):
                return self

            def __exit__(self, *_) -> None:
                self._file.close()

        def opened(path: Path, mode: str = "r", *args, **kwargs):
            file = real_open(path, mode, *args, **kwargs)
            return Disk(file) if mode == "wb" else file

        monkeypatch.setattr(Path, "open", opened)

    return limit


@pytest.mark.parametrize("shard_size", [1, 40, 5 * 2**30])
def test_everything_written_is_read_back(tmp_path, shard_size) -> None:
    tensors = mixed_tensors()
    folder = write(tmp_path / "out", tensors, shard_size=shard_size)
    found = load_folder(folder)
    assert set(found) == set(tensors)
    with CheckpointReader(folder) as reader:
        for name, tensor in tensors.items():
            assert found[name].dtype is tensor.dtype
            assert torch.equal(found[name].float(), tensor.float())
            assert torch.equal(reader.get(name).float(), tensor.float())


def test_one_shard_is_one_plain_file(tmp_path) -> None:
    folder = write(tmp_path / "out", {"a": torch.ones(4)})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (folder / "model.safetensors").stat().st_size < 200


def test_shards_follow_the_size_limit_and_come_with_an_index(tmp_path) -> None:
    tensors = {f"t{i}": torch.full((25,), float(i)) for i in range(5)}  # 100 bytes each
    folder = write(tmp_path / "out", tensors, shard_size=250)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == dict(zip(tensors, [*shards[:1] * 2, *shards[1:2] * 2, shards[2]], strict=True))
    assert index["metadata"] == {"total_size": 500}
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards


def test_a_misaligned_tensor_opens_the_next_shard(tmp_path) -> None:
    folder = write(tmp_path / "out", {"odd": torch.ones(3, dtype=torch.uint8), "words": torch.ones(2)})
    assert len(list(folder.glob("*.safetensors"))) == 2
    assert torch.equal(load_folder(folder)["words"], torch.ones(2))


def test_a_full_header_opens_the_next_shard(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "HEADER_BYTES", 1024)
    tensors = {f"model.layers.{i}.weight": torch.full((3,), float(i)) for i in range(40)}
    folder = write(tmp_path / "out", tensors)
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = load_folder(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_large_shard_keeps_its_reserved_header(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "HEADER_BYTES", 1024)
    big = torch.arange(2**16, dtype=torch.float32)
    folder = write(tmp_path / "out", {"big": big})
    assert (folder / "model.safetensors").stat().st_size == big.nbytes + 1024
    assert torch.equal(load_folder(folder)["big"], big)


def test_views_are_written_as_what_they_show(tmp_path) -> None:
    base = torch.arange(12, dtype=torch.float32).view(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    folder = write(tmp_path / "out", {"t": base.T, "step": base[:, ::2], "parameter": parameter})
    found = load_folder(folder)
    assert torch.equal(found["t"], base.T)
    assert torch.equal(found["step"], base[:, ::2])
    assert torch.equal(found["parameter"], torch.ones(2))


def test_existing_output_is_refused_before_any_work(tmp_path) -> None:
    folder = write(tmp_path / "out", {"a": torch.ones(1)})
    with pytest.raises(OutputExistsError, match="--force"):
        CheckpointWriter(folder)
    assert os.listdir(tmp_path) == ["out"]


def test_force_replaces_a_checkpoint_once_the_new_one_is_complete(tmp_path) -> None:
    folder = write(tmp_path / "out", {"a": torch.ones(1)}, shard_size=1)
    with CheckpointWriter(folder, force=True) as writer:
        writer.add("b", torch.ones(2))
        writer.write_json("config.json", {})
        assert set(load_folder(folder)) == {"a"}
    assert set(load_folder(folder)) == {"b"}
    assert os.listdir(tmp_path) == ["out"]


def test_force_keeps_the_old_checkpoint_when_the_new_one_fails(tmp_path) -> None:
    folder = write(tmp_path / "out", {"a": torch.ones(1)})
    with pytest.raises(RuntimeError), CheckpointWriter(folder, force=True) as writer:
        writer.add("b", torch.ones(2))
        raise RuntimeError
    assert set(load_folder(folder)) == {"a"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder of something else"])
def test_force_replaces_nothing_but_checkpoints(tmp_path, kind) -> None:
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("keep")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("keep")
    with pytest.raises(OutputExistsError, match="not a checkpoint folder"):
        CheckpointWriter(target, force=True)


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(OutputExistsError), CheckpointWriter(folder) as writer:
        writer.add("a", torch.ones(1))
        write(folder, {"other": torch.ones(1)})
    assert set(load_folder(folder)) == {"other"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind(tmp_path, error) -> None:
    folder = tmp_path / "new" / "parents" / "out"
    with pytest.raises(error), CheckpointWriter(folder) as writer:
        writer.add("a", torch.ones(1000))
        writer.write_json("config.json", {})
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("capacity", [0, 2000, 4100])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, full_disk, capacity) -> None:
    full_disk(capacity)  # 0: the first tensor; 2000: the second; 4100: rewriting the header
    with pytest.raises(CheckpointError, match="no space left while writing") as caught:
        write(tmp_path / "out", {"a": torch.ones(250), "b": torch.ones(750)})
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_while_publishing_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        write(tmp_path / "out", {"a": torch.ones(250)})
    assert os.listdir(tmp_path) == []


def test_an_unwritable_place_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        write(tmp_path / "file" / "out", {"a": torch.ones(1)})


def test_a_tensor_is_added_once(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="'a' is added twice"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))


def test_a_dtype_without_a_name_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="complex128"):
        write(tmp_path / "out", {"a": torch.ones(1, dtype=torch.complex128)})


def test_shard_size_is_positive(tmp_path) -> None:
    with pytest.raises(InputError, match="shard_size is 0"):
        CheckpointWriter(tmp_path / "out", shard_size=0)


def test_files_put_in_the_working_folder_are_published(tmp_path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_json("config.json", {"name": "é"})
        (writer.working_folder / "train.log").write_text("step 1")
    assert (tmp_path / "out" / "train.log").read_text() == "step 1"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"name": "é"}


def test_the_output_has_ordinary_permissions(tmp_path) -> None:
    folder = write(tmp_path / "out", {"a": torch.ones(1)})
    (tmp_path / "usual").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_companions_are_copied_and_weights_and_pickles_are_not(tmp_path) -> None:
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "original").mkdir()
    wanted = [
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "generation_config.json", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
        "modeling_custom.py", "qwen.tiktoken", "LICENSE", "README.md", "additional_chat_templates/tools.jinja",
    ]  # fmt: skip
    unwanted = [
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
        "training_args.bin", "consolidated.00.pth", "optimizer.pt", "config.json", "quantize_config.json",
        "quant_config.json", ".gitattributes", "original/params.json", "tf_model.h5", "report.json",
    ]  # fmt: skip
    for name in [*wanted, *unwanted]:
        (source / name).write_text(name)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write_json("generation_config.json", "ours")
        writer.copy_companions(source, exclude=("report.json",))
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == set(wanted)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == "ours"
