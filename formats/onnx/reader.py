"""Reading the folder back: the graph's initializers are the checkpoint's tensors under their own names.

Only what eqat wrote can be read: other exporters name initializers as they like, merge projections and transpose
matrices.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint_reader import CheckpointReader
from ..errors import CheckpointError
from ..safetensors_header import TensorInfo
from .extra import require_onnx
from .graph import GRAPH_NAME, ONNX_TYPES, OWN_PREFIX

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxReader", "load_graph"]

_DTYPES = {number: dtype for dtype, number in ONNX_TYPES.items()}


class OnnxReader(CheckpointReader):
    """A folder with ``model.onnx`` and external data.

    Raises:
        MissingExtraError: the package onnx is not installed.
        CheckpointError: on opening, when the graph cannot be parsed or is not eqat's, or data is missing or cut off.
    """

    def _read_headers(self) -> dict[str, TensorInfo]:
        model = load_graph(self.folder)
        for node in model.graph.node:
            if node.op_type == "MatMulNBits":
                _check_node(node, self.folder)
        sizes: dict[str, int] = {}
        stored = [proto for proto in model.graph.initializer if proto.external_data]
        places = {proto.name: _place(proto, self.folder, sizes) for proto in stored}
        return {name: place for name, place in places.items() if not name.startswith(OWN_PREFIX)}


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


def _place(proto: onnx.TensorProto, folder: Path, sizes: dict[str, int]) -> TensorInfo:
    """Where an initializer lies; ``sizes`` are those of the files met so far.

    Raises:
        CheckpointError: the file is missing or too short, or the entry is malformed.
    """
    place = {entry.key: entry.value for entry in proto.external_data}
    file, dtype = place.get("location", ""), _DTYPES.get(proto.data_type)
    if not file or Path(file).name != file or dtype is None:
        raise CheckpointError(
            f"{folder / GRAPH_NAME}: {proto.name} is of type {proto.data_type} in {file!r}; not eqat's"
        )
    if file not in sizes:
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing but {GRAPH_NAME} names it; fetch it again")
        sizes[file] = (folder / file).stat().st_size
    shape = tuple(proto.dims)
    nbytes, offset = torch.Size(shape).numel() * dtype.itemsize, int(place.get("offset", "0"))
    if int(place.get("length", nbytes)) != nbytes:
        raise CheckpointError(f"{folder / GRAPH_NAME}: {proto.name} {list(shape)} takes {nbytes} bytes")
    if offset < 0 or offset + nbytes > sizes[file]:
        raise CheckpointError(f"{folder / file} ends at {sizes[file]}, before {proto.name} does; fetch it again")
    return TensorInfo(dtype, shape, nbytes, file, offset)
