"""Perplexity of a model that is never in memory as a whole: its windows go through one block after the other.

Hidden states of all windows are kept where Block-AP would keep them. In the end the model's own forward runs with
blocks that hand the kept states on, so the final norm, the head and whatever an architecture does to its logits are
the model's. In float32 the result is that of :func:`.perplexity.perplexity`; in bfloat16 embeddings and rotary angles
are computed in float32 first, which is closer to the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.checkpoint import CheckpointReader
from formats.model import Checkpoint

from ..block_ap.activations import ActivationStore, Place, bytes_to_train, choose_place
from ..block_ap.capture import BlockCall, Capture
from ..block_ap.passes import forward_spans
from ..data import TokenWindows
from ..models.decoder import find_decoder_layers
from ..models.loading import OwnTensors, build_skeleton, load_parameters_, unload_
from ..reporting.progress import Reporter
from .perplexity import BATCH_TOKENS, check_windows, perplexity_of

__all__ = ["DenseSource", "dense_bytes", "streamed_perplexity"]


class DenseSource:
    """A checkpoint's tensors under the names of the full-precision model, quantized layers dequantized one by one.

    Args:
        checkpoint: open.
        tied: full name of a tensor that the file lacks -> the name it has there.
    """

    def __init__(self, checkpoint: Checkpoint, tied: dict[str, str]) -> None:
        self._checkpoint, self._tied = checkpoint, tied
        self._layers = set(checkpoint.layer_names)
        self.tensors = checkpoint.reader.tensors

    def get(self, name: str) -> Tensor:
        """One tensor as stored; a dequantized weight is fp32."""
        path, _, local = name.rpartition(".")
        if path in self._layers and local in ("weight", "bias"):
            layer = self._checkpoint.layer(path)
            if local == "weight":
                return self._checkpoint.stored_weight(path, layer)
            if layer.bias is not None:
                return layer.bias
        if name not in self.tensors and name in self._tied:
            return self.get(self._tied[name])
        return self._checkpoint.get(name)

    def get_rows(self, name: str, rows: list[int]) -> Tensor:
        """Some rows of a matrix outside of the quantized layers."""
        reader = self._checkpoint.reader
        return reader.get_rows(name, rows) if isinstance(reader, CheckpointReader) else reader.get(name)[rows]


def dense_bytes(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> int:
    """Bytes of the whole model in a dtype."""
    model = build_skeleton(checkpoint.reader.folder, dtype, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


@torch.no_grad()
def streamed_perplexity(
    checkpoint: Checkpoint,
    windows: TokenWindows,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    *,
    work: Path,
    activations: Place | str = "auto",
    title: str = "evaluating",
    trust_remote_code: bool = False,
) -> float:
    """Perplexity of a checkpoint, in memory of one block or of its output head, whichever is larger.

    Args:
        checkpoint: open, in full precision or in any readable quantized format.
        windows: int64 token ids and labels ``[windows, seq_len]``.
        dtype: to compute in.
        device: where to compute.
        reporter: is told of progress.
        work: folder for hidden states on disk.
        activations: where they are kept; "auto" is the fastest place with room.
        title: of the progress task.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        InputError: a token id outside the model's vocabulary, no label, or no room for hidden states.
    """
    folder = checkpoint.reader.folder
    model = build_skeleton(folder, torch.float32, trust_remote_code=trust_remote_code)
    path, layers = find_decoder_layers(model)
    paths = {module: name for name, module in model.named_modules()}
    tied = {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding in paths:
        tied[f"{paths[head]}.weight"] = f"{paths[embedding]}.weight"
    source = DenseSource(checkpoint, tied)
    check_windows(windows, model.config.get_text_config().vocab_size)
    batch = max(1, BATCH_TOKENS // windows.seq_len)
    with Capture(model, path, layers, source, device) as capture:
        calls = [_cast(call, dtype) for call in capture.calls(windows.input_ids[:1])]
        shape = (len(windows), windows.seq_len, capture.inputs(windows.input_ids[:1]).shape[-1])
        nbytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
        reserved = bytes_to_train(layers, BATCH_TOKENS)
        place = choose_place(activations, nbytes, device, work, reserved=reserved, dtype=dtype).place  # type: ignore[arg-type]
        store = ActivationStore(shape, dtype, place, device, work / "evaluation.bin")
        for start in range(0, len(windows), batch):
            store.write(start, capture.inputs(windows.input_ids[start : start + batch]).to(dtype))
    with store:
        rest: tuple[Any, ...] | None = None
        with reporter.task(f"{title}, block by block", len(layers)) as task:
            for index, layer in enumerate(layers):
                load_parameters_(layer, f"{path}.{index}", source, device, dtype)
                for start, stop in forward_spans(store):
                    output = calls[index].output(layer, store.read(start, stop).to(dtype))
                    rest = output[1:] if isinstance(output, tuple) else None
                    store.write(start, output[0] if isinstance(output, tuple) else output)
                unload_(layer)
                task.update(1)
        with _handing_on(model, layers, source, paths, device, dtype) as hand_on:

            def logits(start: int, ids: Tensor) -> Tensor:
                hand_on(store.read(start, start + len(ids)).to(dtype), rest)
                return model(input_ids=ids, use_cache=False).logits

            return perplexity_of(logits, windows, device, batch, reporter, title)


@contextmanager
def _handing_on(
    model: nn.Module,
    layers: nn.ModuleList,
    source: DenseSource,
    paths: dict[nn.Module, str],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Any]:
    """Inside, blocks give the hidden states that were handed over, and embeddings nothing but their shape."""
    inside = set(layers.modules())
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    state: dict[str, Any] = {}

    def block(*args: Any, **kwargs: Any) -> Any:
        hidden = state["hidden"]
        return hidden if state["rest"] is None else (hidden, *state["rest"])

    def load(module: nn.Module, _: Any) -> None:
        own = OwnTensors(module)
        if any(tensor.is_meta for tensor in own.parameters()):
            load_parameters_(own, paths[module], source, device, dtype)
        else:
            own.to(device)

    def hand_on(hidden: Tensor, rest: tuple[Any, ...] | None) -> None:
        state.update(hidden=hidden, rest=rest)

    outside = [module for module in paths if module not in inside and module is not embedding]
    handles = [module.register_forward_pre_hook(load) for module in outside]
    for layer in layers:
        layer.forward = block
    embedding.forward = lambda *_: state["hidden"]
    try:
        yield hand_on
    finally:
        for handle in handles:
            handle.remove()
        for module in [*layers, embedding]:
            del module.forward
        for module in outside:
            unload_(OwnTensors(module))


def _cast(call: BlockCall, dtype: torch.dtype) -> BlockCall:
    """A call with its floating arguments, masks and rotary embeddings, in a dtype."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return tuple(map(one, value)) if isinstance(value, tuple) else value

    return BlockCall(tuple(map(one, call.args)), {k: one(v) for k, v in call.kwargs.items()}, call.hidden_keyword)
