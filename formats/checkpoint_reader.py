"""Reading a checkpoint folder: everything is checked on opening, tensors are read one at a time.

Headers are checked here, so that a damaged file is named before any work starts. Data is read, not mapped: a plain read
is several times as fast as faulting pages in, and resident memory is that of the tensors alive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .safetensors_header import TensorInfo, read_header

__all__ = ["CONFIG_KEYS", "INDEX_NAME", "QUANTIZATION_FILES", "SINGLE_NAME", "CheckpointReader", "read_json"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# gptqmodel's order (gptqmodel/quantization/config.py, QUANT_CONFIG_FILENAME_COMPAT); config.json comes last.
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")
# Inside config.json; the second is what compressed-tensors wrote in 2024, and vLLM still reads, the third is mlx-lm's.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_CHUNK = 8 * 2**20  # bytes
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointReader:
    """A folder with ``config.json`` and safetensors weights; a context manager.

    Attributes:
        folder: the folder.
        config: ``config.json``.
        quantization_config: the first of ``quantize_config.json``, ``quant_config.json``,
            ``config.json["quantization_config"]`` and ``config.json["quantization"]``; empty if there is none.
        tensors: read-only name -> TensorInfo, in file order.

    Raises:
        CheckpointError: on opening, when a file is missing, truncated or malformed, or the index names a tensor
            that its shard lacks.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            what = "is a file" if self.folder.exists() else "does not exist"
            raise CheckpointError(
                f"checkpoint folder {self.folder} {what}; give a local folder with config.json and weights"
            )
        if not os.path.lexists(self.folder / "config.json"):
            raise CheckpointError(
                f"{self.folder} has no config.json; a checkpoint is a folder with config.json and safetensors weights"
            )
        self.config = read_json(self.folder / "config.json")
        self.quantization_config = self._find_quantization_config()
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._read_headers())
        shards = {info.shard for info in self.tensors.values()}
        self._identities = {shard: _identity(os.stat(self.folder / shard)) for shard in shards}
        self._closed = False

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU.

        Raises:
            CheckpointError: there is no such tensor, the file changed since opening, or the reader is closed.
        """
        info = self._info(name)
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        count = 0
        with self._opened(name, info) as file:
            file.seek(info.offset)
            count = file.readinto(data.numpy().data) if info.nbytes else 0
        self._check_count(name, info, count, info.nbytes)
        return data.view(info.dtype).view(info.shape)

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor's bytes, a few at a time.

        Yields:
            offset within the tensor, and uint8 ``[bytes]`` that the next step overwrites.

        Raises:
            CheckpointError: as ``get``.
        """
        info = self._info(name)
        buffer = torch.empty(min(_CHUNK, info.nbytes), dtype=torch.uint8)
        for start in range(0, info.nbytes, _CHUNK):
            part = buffer[: info.nbytes - start]
            with self._opened(name, info) as file:
                file.seek(info.offset + start)
                count = file.readinto(part.numpy().data)
            self._check_count(name, info, start + count, start + len(part))
            yield start, part

    def get_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix ``[rows, columns]``, in the order asked for; nothing else is read.

        Raises:
            CheckpointError: as ``get``.
        """
        info = self._info(name)
        width = info.nbytes // max(1, info.shape[0])
        data = torch.empty(len(rows) * width, dtype=torch.uint8)
        view, at = data.numpy().data, 0
        with self._opened(name, info) as file:
            for _, run in groupby(enumerate(rows), key=lambda item: item[1] - item[0]):  # rows that follow each other
                indices = [row for _, row in run]
                file.seek(info.offset + indices[0] * width)
                count, wanted = file.readinto(view[at : at + len(indices) * width]), len(indices) * width
                self._check_count(name, info, count, wanted)
                at += wanted
        return data.view(info.dtype).view(len(rows), *info.shape[1:])

    def expect(self, name: str) -> None:
        """Has the system begin to read a tensor that is wanted soon; whatever is wrong shows when it is."""
        info = self._info(name)
        with suppress(OSError, AttributeError):  # not every system has the call
            with (self.folder / info.shard).open("rb") as file:
                os.posix_fadvise(file.fileno(), info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Makes further reads an error; tensors already read stay valid."""
        self._closed = True

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if self._closed:
            raise CheckpointError(f"checkpoint {self.folder} is closed; read its tensors inside the with block")
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; it has {len(self.tensors)} others")
        return self.tensors[name]

    def _check_count(self, name: str, info: TensorInfo, count: int, expected: int) -> None:
        if count != expected:
            path = self.folder / info.shard
            raise CheckpointError(f"cannot read tensor {name!r} of {path}: {count} of its {info.nbytes} bytes came")

    @contextmanager
    def _opened(self, name: str, info: TensorInfo) -> Iterator[BufferedReader]:
        """The file that holds a tensor, which is still the one that was checked."""
        path = self.folder / info.shard
        try:
            with path.open("rb") as file:
                if _identity(os.fstat(file.fileno())) != self._identities[info.shard]:
                    raise CheckpointError(f"cannot read tensor {name!r}: {path} changed since it was opened")
                yield file
        except OSError as exc:
            raise CheckpointError(f"cannot read tensor {name!r} of {path}: {exc.strerror}") from exc

    def _find_quantization_config(self) -> dict[str, Any]:
        for name in QUANTIZATION_FILES:
            path = self.folder / name
            if path.exists():
                return read_json(path)
        for key in CONFIG_KEYS:
            inside = self.config.get(key)
            if inside and not isinstance(inside, dict):
                raise CheckpointError(f"{self.folder / 'config.json'}: {key} is not an object")
            if inside:
                return inside
        return {}

    def _read_headers(self) -> dict[str, TensorInfo]:
        index = self.folder / INDEX_NAME
        if index.exists():
            return self._read_sharded(index)
        return read_header(self._single_file())

    def _read_sharded(self, index: Path) -> dict[str, TensorInfo]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{index}: no weight_map from tensor names to file names")
        headers = {}
        for shard in dict.fromkeys(weight_map.values()):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index}: shard {shard!r} lies outside the folder; only plain file names")
            if not (self.folder / shard).exists():
                raise CheckpointError(f"{self.folder / shard} is missing but {INDEX_NAME} names it; fetch it again")
            headers[shard] = read_header(self.folder / shard)
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                holder = next((f"{other} has it" for other, held in headers.items() if name in held), "no shard has it")
                raise CheckpointError(
                    f"{index}: tensor {name!r} is not in {shard}, {holder}; index and shards do not belong together"
                )
        return {name: headers[shard][name] for name, shard in weight_map.items()}

    def _single_file(self) -> Path:
        usual = self.folder / SINGLE_NAME
        if usual.exists():
            return usual
        files = sorted(self.folder.glob("*.safetensors"))  # AutoGPTQ wrote gptq_model-4bit-128g.safetensors
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(
                f"{self.folder} has {len(files)} safetensors files and no {INDEX_NAME}; add the index or keep one file"
            )
        if any(next(self.folder.glob(pattern), None) for pattern in _PICKLED):
            raise CheckpointError(
                f"{self.folder} has only pickled weights, which are never loaded; convert them to safetensors first"
            )
        raise CheckpointError(f"{self.folder} has no safetensors weights; expected {SINGLE_NAME} or {INDEX_NAME}")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    """Tells one state of a file from another."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value
