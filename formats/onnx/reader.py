"""Reading the folder back: the graph's initializers are the checkpoint's tensors under their own names.

Only what eqat wrote can be read: other exporters name initializers as they like, merge projections and transpose
matrices.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint_reader import read_json
from ..errors import CheckpointError
from ..safetensors_header import TensorInfo
from .extra import require_onnx
from .graph import ONNX_TYPES, OWN_PREFIX, Stored
from .layout import GRAPH_NAME

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxReader", "load_graph", "stored_tensors"]

_DTYPES = {number: dtype for dtype, number in ONNX_TYPES.items()}


class OnnxReader:
    """A folder with ``model.onnx``; see ``formats.container.ModelReader``.

    Raises:
        MissingExtraError: the package onnx is not installed.
        CheckpointError: on opening, when the graph cannot be parsed or is not eqat's, data is missing or cut off, or a
            MatMulNBits contradicts the configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.quantization_config: dict[str, Any] = self.config.get("quantization_config") or {}
        graph = load_graph(folder)
        self._stored = stored_tensors(graph, folder)
        for node in graph.graph.node:
            if node.op_type == "MatMulNBits":
                _check_node(node, folder)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {
                name: TensorInfo(tensor.dtype, tensor.shape, tensor.nbytes, tensor.file)
                for name, tensor in self._stored.items()
                if not name.startswith(OWN_PREFIX)
            }
        )
        self._closed = False

    def get(self, name: str) -> Tensor:
        """One tensor on the CPU.

        Raises:
            CheckpointError: there is no such tensor, the file changed since opening, or the reader is closed.
        """
        if self._closed:
            raise CheckpointError(f"checkpoint {self.folder} is closed; read its tensors inside the with block")
        if name not in self._stored:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; it has {len(self.tensors)} others")
        return read_tensor(self.folder, self._stored[name])

    def __enter__(self) -> OnnxReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True


def load_graph(folder: Path) -> onnx.ModelProto:
    """The graph without its external data.

    Raises:
        MissingExtraError: the package onnx is not installed.
        CheckpointError: it cannot be parsed.
    """
    require_onnx("reading an ONNX model")
    import onnx  # noqa: PLC0415
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    path = folder / GRAPH_NAME
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as exc:
        raise CheckpointError(f"cannot read {path}: {exc}") from exc


def _check_node(node: onnx.NodeProto, folder: Path) -> None:
    """Raises CheckpointError unless a MatMulNBits takes the tensors of the layer that it is named after."""
    expected = [f"{node.name}.{local}" for local in ("B", "scales", "zero_points")]
    if list(node.input[1:4]) != expected:
        raise CheckpointError(
            f"{folder / GRAPH_NAME}: node {node.name!r} multiplies with {', '.join(node.input[1:4])}; eqat's nodes are "
            "named like the layer, and no other exporter's graphs are read"
        )


def stored_tensors(graph: onnx.ModelProto, folder: Path) -> dict[str, Stored]:
    """Where each initializer with external data lies, after checking it against the files.

    Raises:
        CheckpointError: a file is missing or too short, or an entry is malformed.
    """
    found: dict[str, Stored] = {}
    sizes: dict[str, int] = {}
    for proto in graph.graph.initializer:
        if not proto.external_data:
            continue
        place = {entry.key: entry.value for entry in proto.external_data}
        file, dtype = place.get("location", ""), _DTYPES.get(proto.data_type)
        if Path(file).name != file or dtype is None:
            raise CheckpointError(f"{folder / GRAPH_NAME}: {proto.name} is of type {proto.data_type} in {file!r}")
        if file not in sizes:
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder / file} is missing but {GRAPH_NAME} names it; fetch it again")
            sizes[file] = (folder / file).stat().st_size
        shape = tuple(proto.dims)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        offset = int(place.get("offset", "0"))
        if int(place.get("length", nbytes)) != nbytes:
            raise CheckpointError(f"{folder / GRAPH_NAME}: {proto.name} {list(shape)} takes {nbytes} bytes")
        if offset < 0 or offset + nbytes > sizes[file]:
            raise CheckpointError(f"{folder / file} ends at {sizes[file]}, before {proto.name} does; fetch it again")
        found[proto.name] = Stored(dtype, shape, file, offset, nbytes)
    return found


def read_tensor(folder: Path, stored: Stored) -> Tensor:
    """One tensor. Its memory is a private mapping of the file, which goes with it.

    Raises:
        CheckpointError: the file is gone or shorter than it was.
    """
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    skipped = stored.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with (folder / stored.file).open("rb") as file:
            start = stored.offset - skipped
            data = mmap.mmap(file.fileno(), stored.nbytes + skipped, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"cannot read {folder / stored.file}: {exc}") from exc
    count = stored.nbytes // stored.dtype.itemsize
    return torch.frombuffer(data, dtype=stored.dtype, count=count, offset=skipped).view(stored.shape)
