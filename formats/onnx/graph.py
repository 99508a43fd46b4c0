"""The graph of a Llama-like decoder, as onnxruntime-genai drives it.

    input_ids, attention_mask, past_key_values.N.{key,value}  ->  logits, present.N.{key,value}

Tensors keep their names and bytes: what a checkpoint calls ``model.norm.weight`` is an initializer of that name, in the
dtype it has there, and a Cast brings it to the graph's dtype. A quantized linear is one MatMulNBits named like its
module, a full-precision one a FusedMatMul. What the graph adds of its own begins with ``/``. Operators outside the
standard are onnxruntime's (domain com.microsoft) and its SimplifiedLayerNormalization, which is RMS norm.

Sources: operator schemas of onnxruntime 1.32; input and output names of onnxruntime-genai 0.18.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, UnsupportedSchemeError
from ..safetensors_header import TensorInfo
from ..version import __version__
from .decoder import Decoder

if TYPE_CHECKING:
    import onnx

__all__ = ["GRAPH_NAME", "IR_VERSION", "ONNX_TYPES", "OPSET", "OWN_PREFIX", "ROTARY_NAMES", "NBits", "build_graph"]

GRAPH_NAME = "model.onnx"
OWN_PREFIX = "/"
ROTARY_NAMES = ("/rotary/cos", "/rotary/sin")
ONNX_TYPES = {  # onnx.TensorProto.DataType
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
OPSET, IR_VERSION = 21, 10
_CONTRIB = "com.microsoft"
_RECOMPUTED = ".rotary_emb.inv_freq"  # in old checkpoints; no reader takes it from there


@dataclass(frozen=True)
class NBits:
    """Attributes of one MatMulNBits."""

    bits: int
    block_size: int
    out_features: int
    in_features: int


def build_graph(
    decoder: Decoder,
    tensors: Mapping[str, TensorInfo],
    layers: Mapping[str, NBits],
    dtype: torch.dtype,
    accuracy_level: int,
) -> onnx.ModelProto:
    """The model without its tensors' bytes.

    Args:
        decoder: what to compute.
        tensors: every tensor by its full name; ``ROTARY_NAMES`` among them.
        layers: module path of each quantized linear -> its attributes.
        dtype: of activations, past and logits.
        accuracy_level: attribute of every MatMulNBits.

    Raises:
        CheckpointError: a tensor that the decoder needs is missing.
        UnsupportedSchemeError: a tensor that it does not know is left over.
    """
    graph = _Graph(decoder, tensors, layers, dtype, accuracy_level)
    graph.build()
    left = [name for name in tensors if name not in graph.used and not name.endswith(_RECOMPUTED)]
    if left:
        raise UnsupportedSchemeError(
            f"onnx has no place for {left[0]} in its graph of {decoder.family} ({len(left)} tensors left over)",
            instead=("gptq",),
        )
    return graph.model()


@dataclass
class _Graph:
    decoder: Decoder
    tensors: Mapping[str, TensorInfo]
    layers: Mapping[str, NBits]
    dtype: torch.dtype
    accuracy_level: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)  # tensor -> the value that holds it in the graph's dtype

    def build(self) -> None:
        self.add("ReduceSum", ["attention_mask", self.constant("axis", [1])], "/mask/length", keepdims=0)
        self.add("Sub", ["/mask/length", self.constant("one", [1])], "/mask/last")
        self.add("Cast", ["/mask/last"], "/mask/last_positions", to=ONNX_TYPES[torch.int32])
        self.add("Shape", ["attention_mask"], "/mask/shape")
        self.add("Gather", ["/mask/shape", self.constant("index", 1)], "/mask/total", axis=0)
        self.add("Cast", ["/mask/total"], "/mask/total_length", to=ONNX_TYPES[torch.int32])
        hidden = self.embedding()
        for i in range(self.decoder.layers):
            name = f"model.layers.{i}"
            normed = self.norm(f"{name}.input_layernorm", hidden)
            attended = self.attention(f"{name}.self_attn", i, normed)
            hidden = self.add("Add", [hidden, attended], f"/{name}/attended")
            normed = self.norm(f"{name}.post_attention_layernorm", hidden)
            hidden = self.add("Add", [hidden, self.mlp(f"{name}.mlp", normed)], f"/{name}/out")
        hidden = self.norm("model.norm", hidden)
        self.linear("lm_head" if self.has("lm_head") else "model.embed_tokens", hidden, out="logits")

    def embedding(self) -> str:
        name = "model.embed_tokens.weight"
        rows = self.add("Gather", [self.raw(name), "input_ids"], "/model/embed_tokens", axis=0)
        return rows if self.tensors[name].dtype == self.dtype else self.cast(rows, "/model/embedded")

    def attention(self, name: str, i: int, hidden: str) -> str:
        decoder, window = self.decoder, self.decoder.windows[i]
        if self.has(f"{name}.qkv_proj"):  # the operator takes all three in one as well
            query, key, value = self.linear(f"{name}.qkv_proj", hidden), "", ""
        else:
            query, key, value = (self.linear(f"{name}.{part}_proj", hidden) for part in "qkv")
        if decoder.head_norms:
            query = self.head_norm(f"{name}.q_norm", query, decoder.heads)
            key = self.head_norm(f"{name}.k_norm", key, decoder.kv_heads)
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        rotary = [self.raw(part) for part in ROTARY_NAMES] if decoder.rotated[i] else []
        attended = self.add(
            "GroupQueryAttention",
            [query, key, value, *past, "/mask/last_positions", "/mask/total_length", *rotary],
            f"/{name}/attended",
            f"present.{i}.key",
            f"present.{i}.value",
            domain=_CONTRIB,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            do_rotary=int(decoder.rotated[i]),
            local_window_size=-1 if window is None else window,
        )
        return self.linear(f"{name}.o_proj", attended)

    def mlp(self, name: str, hidden: str) -> str:
        if self.has(f"{name}.gate_up_proj"):
            both = self.linear(f"{name}.gate_up_proj", hidden)
            gate, up = f"/{name}/gate", f"/{name}/up"
            self.add("Split", [both], gate, up, axis=-1, num_outputs=2)
        else:
            gate, up = (self.linear(f"{name}.{part}_proj", hidden) for part in ("gate", "up"))
        sigmoid = self.add("Sigmoid", [gate], f"/{name}/sigmoid")
        silu = self.add("Mul", [gate, sigmoid], f"/{name}/silu")
        return self.linear(f"{name}.down_proj", self.add("Mul", [silu, up], f"/{name}/gated"))

    def head_norm(self, name: str, hidden: str, heads: int) -> str:
        split = self.constant(f"heads/{heads}", [0, 0, heads, self.decoder.head_size])
        normed = self.norm(name, self.add("Reshape", [hidden, split], f"/{name}/split"))
        merged = self.constant(f"merged/{heads}", [0, 0, heads * self.decoder.head_size])
        return self.add("Reshape", [normed, merged], f"/{name}/merged")

    def norm(self, name: str, hidden: str) -> str:
        """RMS norm in fp32, whatever the graph's dtype."""
        inputs = [hidden, self.value(f"{name}.weight")]
        epsilon = self.decoder.epsilon
        return self.add("SimplifiedLayerNormalization", inputs, f"/{name}", axis=-1, epsilon=epsilon, stash_type=1)

    def linear(self, name: str, hidden: str, out: str | None = None) -> str:
        out = out or f"/{name}"
        bias = f"{name}.bias" if f"{name}.bias" in self.tensors else None
        if name not in self.layers:
            product = out if bias is None else f"{out}/product"
            self.add(
                "FusedMatMul", [hidden, self.value(f"{name}.weight")], product, domain=_CONTRIB, transB=1, name=name
            )
            return out if bias is None else self.add("Add", [product, self.value(bias)], out)
        layer = self.layers[name]
        inputs = [hidden, *(self.raw(f"{name}.{part}") for part in ("B", "scales", "zero_points"))]
        return self.add(
            "MatMulNBits",
            inputs if bias is None else [*inputs, "", self.value(bias)],
            out,
            domain=_CONTRIB,
            name=name,
            K=layer.in_features,
            N=layer.out_features,
            bits=layer.bits,
            block_size=layer.block_size,
            accuracy_level=self.accuracy_level,
        )

    def has(self, name: str) -> bool:
        return name in self.layers or f"{name}.weight" in self.tensors

    def raw(self, name: str) -> str:
        """A tensor in its own dtype."""
        if name not in self.tensors:
            raise CheckpointError(f"no tensor {name}, which a {self.decoder.family} model has")
        self.used.setdefault(name, "")
        return name

    def value(self, name: str) -> str:
        """A tensor in the graph's dtype."""
        self.raw(name)
        if not self.used[name]:
            same = self.tensors[name].dtype == self.dtype
            self.used[name] = name if same else self.cast(name, f"/cast/{name}")
        return self.used[name]

    def cast(self, value: str, out: str) -> str:
        return self.add("Cast", [value], out, to=ONNX_TYPES[self.dtype])

    def constant(self, name: str, value: list[int] | int) -> str:
        self.constants[f"/constant/{name}"] = value
        return f"/constant/{name}"

    def add(
        self, kind: str, inputs: Iterable[str], *outputs: str, domain: str = "", name: str = "", **attributes: Any
    ) -> str:
        """Appends a node and returns its first output."""
        from onnx import helper  # noqa: PLC0415

        name = name or outputs[0]
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        return outputs[0]

    def model(self) -> onnx.ModelProto:
        import numpy as np  # noqa: PLC0415
        from onnx import helper, numpy_helper  # noqa: PLC0415

        constants = [
            numpy_helper.from_array(np.array(value, dtype=np.int64), name) for name, value in self.constants.items()
        ]
        stored = [_initializer(name, tensor) for name, tensor in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "decoder", *self.ends(), initializer=[*constants, *stored])
        return helper.make_model(
            graph,
            producer_name="eqat",
            producer_version=__version__,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)],
        )

    def ends(self) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
        """Inputs and outputs."""
        from onnx import helper  # noqa: PLC0415

        decoder, kind = self.decoder, ONNX_TYPES[self.dtype]
        integers = ONNX_TYPES[torch.int64]
        inputs = [
            helper.make_tensor_value_info("input_ids", integers, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info("attention_mask", integers, ["batch_size", "total_sequence_length"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", kind, ["batch_size", "sequence_length", decoder.vocabulary])]
        for i in range(decoder.layers):
            for part in ("key", "value"):
                for ends, name, length in (
                    (inputs, "past_key_values", "past_sequence_length"),
                    (outputs, "present", "total_sequence_length"),
                ):
                    shape: list[str | int | None] = ["batch_size", decoder.kv_heads, length, decoder.head_size]
                    ends.append(helper.make_tensor_value_info(f"{name}.{i}.{part}", kind, shape))
        return inputs, outputs


def _initializer(name: str, tensor: TensorInfo) -> onnx.TensorProto:
    import onnx  # noqa: PLC0415

    proto = onnx.TensorProto(
        name=name, data_type=ONNX_TYPES[tensor.dtype], dims=tensor.shape, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", tensor.shard), ("offset", tensor.offset), ("length", tensor.nbytes)):
        proto.external_data.add(key=key, value=str(value))
    return proto
