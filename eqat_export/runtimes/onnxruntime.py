"""onnxruntime on the CPU, with the graph and the data that lie in the folder.

The whole graph gives the logits, computed as the file says. For a layer's weights its MatMulNBits runs alone, in a
model made of that node and the file's own initializers, which onnxruntime reads from the external data by itself; its
accuracy_level is 0 there, so that nothing rounds but the weights.

Its fp32 matrix products add in one long chain where torch's add in several, which costs up to half as much again in
rounding. So the yardstick of an fp32 graph is transformers' model with every linear computed by onnxruntime from dense
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from formats.errors import CheckpointError
from formats.model import Checkpoint
from formats.onnx.graph import GRAPH_NAME, IR_VERSION, ONNX_TYPES, OPSET
from formats.onnx.layout import OnnxLayout
from formats.onnx.reader import load_graph

from .base import Runtime, Session
from .reference import reference_model

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxruntimeRuntime"]

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_SILENT = 3  # errors only
MAX_ELEMENTS = 2**28  # of a dense weight in one model: protobuf ends at 2 GiB


class OnnxruntimeRuntime(Runtime):
    """``onnxruntime.InferenceSession(folder / "model.onnx")`` on the CPU."""

    id = "onnxruntime"
    package = "onnxruntime"
    requires = ("onnxruntime", "onnx")
    extra = "onnx"
    formats = ("onnx",)

    def load(self, checkpoint: Checkpoint, device: torch.device) -> Session:
        """See :class:`Runtime`."""
        if not isinstance(checkpoint.format, OnnxLayout):
            raise CheckpointError(f"{checkpoint.reader.folder} is no ONNX model")
        return _OnnxSession(checkpoint, checkpoint.format.scale_dtype)


class _OnnxSession(Session):
    device = "cpu"
    yardstick_name = "onnxruntime's own products of dense weights"

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._folder = folder = checkpoint.reader.folder
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

    def yardstick(self, ids: Tensor) -> Tensor | None:
        """See Session; fp16 graphs round at every node, and that is what costs there."""
        if self.dtype != torch.float32:
            return None
        model = reference_model(self._checkpoint, torch.float32, torch.device("cpu"))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(_dense, module)  # type: ignore[method-assign]
        with torch.inference_mode():
            return model(input_ids=ids.cpu()).logits

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
        sizes = attributes["K"].i, attributes["N"].i
        return _small_model(nodes, [self._initializers[name] for name in constants], self.dtype, *sizes)


def _small_model(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], dtype: torch.dtype, columns: int, rows: int
) -> onnx.ModelProto:
    """A model from x ``[any, columns]`` to y ``[any, rows]``."""
    from onnx import helper  # noqa: PLC0415

    kind = ONNX_TYPES[dtype]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", kind, ["any", columns])],
        [helper.make_tensor_value_info("y", kind, ["any", rows])],
        initializer=constants,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _dense(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """A full-precision linear, computed by onnxruntime."""
    from onnx import helper, numpy_helper  # noqa: PLC0415

    columns = linear.in_features
    parts = []
    for weight in linear.weight.detach().split(MAX_ELEMENTS // columns):
        nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft", transB=1)]
        constants = [numpy_helper.from_array(weight.numpy(), "w")]
        model = _small_model(nodes, constants, torch.float32, columns, len(weight)).SerializeToString()
        parts.append(_run(_session(model), inputs.reshape(-1, columns)))
    product = torch.cat(parts, dim=1).view(*inputs.shape[:-1], -1)
    return product if linear.bias is None else product + linear.bias


def _session(model: str | bytes, folder: Path | None = None, *, optimized: bool = True) -> Any:
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = torch.get_num_threads()
    if folder is not None:
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
