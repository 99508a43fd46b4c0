"""onnxruntime on the CPU, with the graph and the data that lie in the folder.

The whole graph gives the logits, computed as the file says. For a layer's weights its MatMulNBits runs alone, in a
model made of that node and the file's own initializers, which onnxruntime reads from the external data by itself; its
accuracy_level is 0 there, so that nothing rounds but the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from formats.errors import CheckpointError
from formats.model import Checkpoint
from formats.onnx.layout import GRAPH_NAME, OnnxFormat
from formats.onnx.reader import load_graph

from .base import Runtime, Session

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxruntimeRuntime"]

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_SILENT = 3  # errors only


class OnnxruntimeRuntime(Runtime):
    """``onnxruntime.InferenceSession(folder / "model.onnx")`` on the CPU."""

    id = "onnxruntime"
    package = "onnxruntime"
    requires = ("onnxruntime", "onnx")
    extra = "onnx"
    formats = ("onnx",)

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`."""
        if not isinstance(checkpoint.format, OnnxFormat):
            raise CheckpointError(f"{checkpoint.reader.folder} is no ONNX model")
        return _OnnxSession(checkpoint.reader.folder, checkpoint.format.scale_dtype)


class _OnnxSession(Session):
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._folder = folder
        self._graph = load_graph(folder).graph
        self._initializers = {proto.name: proto for proto in self._graph.initializer}
        self._producers = {out: node for node in self._graph.node for out in node.output}
        self._nodes = {node.name: node for node in self._graph.node if node.op_type == "MatMulNBits"}
        self._model = _session(str(folder / GRAPH_NAME), folder)

    def logits(self, ids: Tensor) -> Tensor:
        """See Session."""
        batch, length = ids.shape
        feeds = {"input_ids": ids.cpu().numpy(), "attention_mask": torch.ones(batch, length, dtype=torch.int64).numpy()}
        for entry in self._model.get_inputs():
            if entry.name.startswith("past_key_values."):
                feeds[entry.name] = torch.empty(batch, entry.shape[1], 0, entry.shape[3], dtype=self.dtype).numpy()
        with _errors():
            return torch.from_numpy(self._model.run(["logits"], feeds)[0])

    def layer(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """See Session."""
        node = self._nodes.get(name)
        if node is None:
            return None
        return partial(_run, _session(self._alone(node).SerializeToString(), self._folder, optimized=False))

    def _alone(self, node: onnx.NodeProto) -> onnx.ModelProto:
        """A model of one node; its bias is added apart, after the weights were rounded to the graph's dtype."""
        from onnx import NodeProto, helper  # noqa: PLC0415

        product = NodeProto()
        product.CopyFrom(node)
        attributes = {attribute.name: attribute for attribute in product.attribute}
        attributes["accuracy_level"].i = 0
        del product.input[:], product.output[:]
        product.input.extend(["x", *node.input[1:4]])
        product.output.append("y" if len(node.input) < 6 else "product")
        nodes, constants = [product], list(node.input[1:4])
        if len(node.input) == 6:
            bias = node.input[5]
            casts = [self._producers[bias]] if bias in self._producers else []
            nodes = [*casts, product, helper.make_node("Add", ["product", bias], ["y"])]
            constants += [name for cast in casts for name in cast.input] or [bias]
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=self.dtype).numpy().dtype)
        graph = helper.make_graph(
            nodes,
            node.name,
            [helper.make_tensor_value_info("x", kind, ["rows", attributes["K"].i])],
            [helper.make_tensor_value_info("y", kind, ["rows", attributes["N"].i])],
            initializer=[self._initializers[name] for name in constants],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _session(model: str | bytes, folder: Path, *, optimized: bool = True) -> Any:
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry(_DATA_FOLDER, str(folder.resolve()))
    with _errors():
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Tensor) -> Tensor:
    with _errors():
        return torch.from_numpy(session.run(["y"], {"x": inputs.cpu().numpy()})[0])


@contextmanager
def _errors() -> Iterator[None]:
    """onnxruntime's exceptions as RuntimeError: they share no class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: PLC0415

    kinds = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    try:
        yield
    except tuple(getattr(state, kind) for kind in (*kinds, "RuntimeException")) as exc:
        raise RuntimeError(str(exc).strip()) from exc
