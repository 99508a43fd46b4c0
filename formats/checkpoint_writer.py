"""Writing a checkpoint folder: streamed tensor by tensor, published at once or not at all.

Everything goes to a hidden sibling of the output (``atomic_output.py``).
A shard's header is written last, into room reserved at its start; small shards are then rewritten without the slack.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .atomic_output import AtomicOutput, writing
from .checkpoint_reader import INDEX_NAME, QUANTIZATION_FILES, SINGLE_NAME
from .errors import CheckpointError, InputError
from .pieces import Header, Place
from .safetensors_header import DTYPE_NAMES, LENGTH_BYTES, build_header
from .writeback import Writeback

__all__ = ["TRAINING_FILES", "CheckpointWriter"]

HEADER_BYTES = 256 * 1024  # room for about 2000 tensors a shard
MAX_SLACK = 0.01  # share of a shard that reserved header space may waste

# Files a loader may want: tokenizers, generation and processor settings, custom code, licences.
_COMPANION_SUFFIXES = {".json", ".jinja", ".md", ".model", ".py", ".spm", ".tiktoken", ".txt"}
_COMPANION_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_COMPANION_FOLDERS = ("additional_chat_templates",)
# What eqat train leaves beside its checkpoint tells about that run, not about a conversion of its result.
TRAINING_FILES = ("eqat_config.yaml", "train.log", "training_report.json")
# What onnxruntime-genai and auto-round write beside a model is about that model alone.
_NEVER_COPIED = {"config.json", "genai_config.json", "quantization_config.json", *QUANTIZATION_FILES, *TRAINING_FILES}


class CheckpointWriter:
    """Streams tensors into a new checkpoint folder; a context manager.

    Attributes:
        folder: where the checkpoint appears on a clean exit.
        working_folder: the hidden folder that becomes it, from ``__enter__`` on; further files may be written there.

    Args:
        folder: output path.
        shard_size: bytes of tensor data after which a new shard begins; a larger tensor gets a shard of its own.
        force: replace an existing checkpoint, only once the new one is complete.

    Raises:
        OutputExistsError: on construction, when ``folder`` exists and ``force`` is not given, or holds no checkpoint.
        CheckpointError: the disk is full, or the folder cannot be written; nothing is left behind.
    """

    def __init__(self, folder: Path | str, *, shard_size: int = 5 * 2**30, force: bool = False) -> None:
        if shard_size <= 0:
            raise InputError(f"shard_size is {shard_size}; it is a positive number of bytes")
        self._output = AtomicOutput(
            folder, force=force, replaceable=_is_checkpoint, unlike="is not a checkpoint folder"
        )
        self.folder = self._output.path
        self.working_folder = self._output.working
        self._shard_size = shard_size
        self._shards: list[_Shard] = []
        self._names: set[str] = set()
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor to the current shard, on disk before this returns.

        Raises:
            CheckpointError: the name was added before, the dtype has no safetensors name, or the disk is full.
        """
        data = tensor.detach().cpu().contiguous()
        shard, offset = self._next(Header(name, data.dtype, tuple(data.shape), data.nbytes))
        with writing(self.folder):
            shard.write(offset, data)

    def reserve(self, header: Header) -> Place:
        """Room for a tensor that is written by someone else, until this writer's exit.

        Raises:
            CheckpointError: as ``add``.
        """
        shard, offset = self._next(header)
        return Place(shard.path, offset)

    def add_layer(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Appends the tensors of one layer, local name -> tensor, as ``{name}.{local name}``."""
        for local, tensor in tensors.items():
            self.add(f"{name}.{local}", tensor)

    def write_json(self, filename: str, value: Any) -> None:
        """Writes a JSON file beside the weights, replacing one of the same name."""
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        with writing(self.folder):
            (self.working_folder / filename).write_text(text, encoding="utf-8")

    def copy_companions(self, source_folder: Path | str, exclude: Collection[str] = ()) -> None:
        """Copies what a loader wants besides weights: tokenizer, generation config, templates, custom code, licence.

        Never copied: weights, their index, ``config.json``, ``genai_config.json``, quantization configs, pickles,
        hidden files, ``TRAINING_FILES``, names in ``exclude``, and names already written here.

        Raises:
            CheckpointError: a file cannot be read or written; the text names which.
        """
        skipped = {*_NEVER_COPIED, *exclude}
        with writing(self.folder):
            for path in sorted(Path(source_folder).iterdir()):
                target = self.working_folder / path.name
                if path.name in skipped or target.exists():
                    continue
                if path.is_dir():
                    if path.name in _COMPANION_FOLDERS:
                        shutil.copytree(path, target, copy_function=_copy)
                elif _is_companion(path.name):
                    _copy(path, target)

    def __enter__(self) -> CheckpointWriter:
        self._output.begin_folder()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.folder):
                    self._name_shards()
                self._output.publish()
        finally:
            for shard in self._shards:
                shard.close()
            self._output.discard()

    def _next(self, header: Header) -> tuple[_Shard, int]:
        """Notes a tensor; returns its shard, and the byte at which its data begins there."""
        name = header.name
        if name in self._names:
            raise CheckpointError(f"tensor {name!r} is added twice to {self.folder}")
        if header.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"tensor {name!r} is {header.dtype}, which safetensors does not hold")
        with writing(self.folder):
            if not self._shards or not self._shards[-1].takes(header, self._shard_size):
                if self._shards:
                    self._shards[-1].seal()
                self._shards.append(_Shard(self.working_folder / f"{len(self._shards)}.shard"))
        self._names.add(name)
        self._total_bytes += header.nbytes
        return self._shards[-1], self._shards[-1].note(header)

    def _name_shards(self) -> None:
        count = len(self._shards)
        weight_map = {}
        for i, shard in enumerate(self._shards):
            shard.finish()
            file_name = SINGLE_NAME if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            shard.path.rename(self.working_folder / file_name)
            weight_map.update(dict.fromkeys(shard.entries, file_name))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            self.write_json(INDEX_NAME, index)


class _Shard:
    """One safetensors file being written: reserved header space, then tensors without holes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self._bytes = 0
        self._header_bytes = LENGTH_BYTES + len("{}") + 64  # the text so far; 64 covers __metadata__
        self._file: BinaryIO = path.open("wb")
        self._writeback = Writeback(self._file)

    def takes(self, header: Header, limit: int) -> bool:
        """Whether this tensor can follow: aligned to its dtype, within the size limit and the header's room."""
        return (
            self._bytes % header.dtype.itemsize == 0
            and self._bytes + header.nbytes <= limit
            and self._header_bytes + _entry_bytes(header) <= HEADER_BYTES
        )

    def note(self, header: Header) -> int:
        """Adds the tensor to the header; returns the byte of the file at which its data begins."""
        start, end = self._bytes, self._bytes + header.nbytes
        self.entries[header.name] = {
            "dtype": DTYPE_NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [start, end],
        }
        self._bytes = end
        self._header_bytes += _entry_bytes(header)
        return HEADER_BYTES + start

    def write(self, offset: int, data: Tensor) -> None:
        flat = data.reshape(-1)
        if flat.numel():  # a view of another dtype needs at least one element
            self._file.seek(offset)
            self._file.write(flat.view(torch.uint8).numpy().data)
        self._writeback.reached(offset + data.nbytes)

    def seal(self) -> None:
        """Takes no more data from this process."""
        self._file.close()

    def finish(self) -> None:
        """Writes the header; everything else is there."""
        self.seal()
        slack = HEADER_BYTES - self._header_bytes
        if slack > MAX_SLACK * self._bytes:
            self._write_compact()
        else:
            with self.path.open("r+b") as file:
                file.write(build_header(self.entries, HEADER_BYTES))

    def close(self) -> None:
        # A full disk fails again when buffered bytes are flushed; the file is about to be removed anyway.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write_compact(self) -> None:
        compact = self.path.with_suffix(".compact")
        with self.path.open("rb") as source, compact.open("wb") as target:
            target.write(build_header(self.entries))
            source.seek(HEADER_BYTES)
            shutil.copyfileobj(source, target, 2**20)
        compact.replace(self.path)


def _entry_bytes(header: Header) -> int:
    # Keys and punctuation take under 60 bytes, the two offsets under 20 each.
    return len(json.dumps(header.name)) + 100 + len(str(list(header.shape)))


def _is_companion(name: str) -> bool:
    if name.startswith(".") or name.endswith(".index.json"):
        return False
    return Path(name).suffix in _COMPANION_SUFFIXES or name.upper().startswith(_COMPANION_NAMES)


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))


def _copy(source: Path | str, target: Path | str) -> None:
    try:
        reading = open(source, "rb")
    except OSError as exc:
        raise CheckpointError(f"cannot read {source}: {exc.strerror}") from exc
    with reading, open(target, "wb") as writing:
        shutil.copyfileobj(reading, writing)
