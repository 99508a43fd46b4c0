"""What a model's decoder blocks are really called with.

The model's own forward runs with every block's ``forward`` replaced by a recorder, so masks, rotary embeddings and
whatever else an architecture passes are captured instead of rebuilt. Blocks pass the hidden states through, and the
last one stops the forward, so neither the final norm nor the head runs. Modules outside the blocks are read from the
checkpoint when they are first called; the blocks stay on the meta device, except the first, which runs once to learn
whether blocks return a tensor or a tuple.

Arguments are captured for a batch of one and broadcast over batches. They must not depend on the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from formats.errors import InputError

from ..models.loading import OwnTensors, TensorSource, load_parameters_, unload_
from .embedding_rows import embedding_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["BlockCall", "Capture"]


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden states that a block is called with.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
        hidden_keyword: name under which the hidden states are passed, or None when they come first.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    hidden_keyword: str | None = None

    def arguments(self, hidden_states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The full call, as args and kwargs."""
        if self.hidden_keyword is None:
            return (hidden_states, *self.args), dict(self.kwargs)
        return self.args, {self.hidden_keyword: hidden_states, **self.kwargs}

    def output(self, block: nn.Module, hidden_states: Tensor) -> Any:
        """What the block returns, as it returns it."""
        args, kwargs = self.arguments(hidden_states)
        return block(*args, **kwargs)

    def run(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        """Output hidden states ``[batch, seq, hidden]`` of a block; where it returns a tuple, they come first."""
        output = self.output(block, hidden_states)
        return output[0] if isinstance(output, tuple) else output


class _Stop(Exception):  # noqa: N818 -- ends a forward on purpose, is no error
    pass


class _Recorder:
    """Stands in for the forwards of all blocks.

    ``rest`` is what a block returns after the hidden states, None when it returns them alone.
    """

    def __init__(self, layers: nn.ModuleList, last: int, rest: tuple[Any, ...] | None = None) -> None:
        self.layers, self.last, self.rest = layers, last, rest
        self.calls: dict[int, BlockCall] = {}
        self.inputs: list[Tensor] = []

    def forward_of(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args and "hidden_states" not in kwargs:
                raise InputError(
                    f"block {index} ({type(self.layers[index]).__name__}) is called without hidden states; "
                    "eqat trains blocks that map hidden states to hidden states"
                )
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                self.inputs.append(hidden)
            self.calls[index] = BlockCall(args[1:], kwargs, None if args else "hidden_states")
            if index == self.last:
                raise _Stop
            return hidden if self.rest is None else (hidden, *self.rest)

        return forward

    @contextmanager
    def installed(self) -> Iterator[None]:
        for index, layer in enumerate(self.layers):
            layer.forward = self.forward_of(index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # uncovers the class's own


class Capture:
    """Runs a meta-device skeleton up to its blocks; a context manager that gives the memory back on leaving.

    Args:
        model: skeleton from ``build_skeleton``.
        path: path of its blocks, e.g. ``model.layers``.
        layers: the blocks.
        source: reads the model's tensors by name.
        device: where to compute, in fp32.
    """

    def __init__(
        self, model: PreTrainedModel, path: str, layers: nn.ModuleList, source: TensorSource, device: torch.device
    ) -> None:
        self.model, self.path, self.layers, self.source, self.device = model, path, layers, source, device
        inside = set(layers.modules())
        self._outside = {module: name for name, module in model.named_modules() if module not in inside}
        self._rows = embedding_rows(model, layers, self._outside, source, device)

    def __enter__(self) -> Capture:
        self._handles = [module.register_forward_pre_hook(self._load) for module in self._outside]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._outside:
            unload_(OwnTensors(module))
        if self._rows is not None:
            self._rows.restore()

    def _load(self, module: nn.Module, args: Any) -> Any:
        if self._rows is not None and module is self._rows.module and args:
            return self._rows.load(args)
        own = OwnTensors(module)
        if any(tensor.is_meta for tensor in own.parameters()):
            load_parameters_(own, self._outside[module], self.source, self.device, torch.float32)
        else:
            own.to(self.device)  # buffers of modules without parameters, such as rotary embeddings
        return None

    @torch.no_grad()
    def _record(self, input_ids: Tensor, recorder: _Recorder) -> Tensor:
        with recorder.installed():
            try:
                self.model(input_ids=input_ids.to(self.device), use_cache=False)
            except _Stop:
                pass
        if not recorder.inputs:
            raise InputError(
                f"{type(self.model).__name__}'s forward does not call its first block; eqat cannot train it"
            )
        return recorder.inputs[0]

    def inputs(self, input_ids: Tensor) -> Tensor:
        """Hidden states that enter the first block, fp32 ``[batch, seq, hidden]``, for int64 ``[batch, seq]`` ids."""
        return self._record(input_ids, _Recorder(self.layers, last=0))

    def calls(self, input_ids: Tensor) -> list[BlockCall]:
        """Arguments of every block for a batch of one: int64 ``[1, seq]`` tokens.

        Raises:
            InputError: an argument depends on the tokens or does not broadcast, or a block is never called.
        """
        rest = self._returned_after_hidden(input_ids)
        one, other = (_Recorder(self.layers, len(self.layers) - 1, rest) for _ in range(2))
        self._record(input_ids, one)
        self._record(input_ids.flip(1), other)
        for index in range(len(self.layers)):
            if index not in one.calls or index not in other.calls:
                raise InputError(f"{self.path}.{index} is never called by {type(self.model).__name__}'s forward")
            first, second = one.calls[index], other.calls[index]
            name = _differing(first.args, second.args) or _differing(first.kwargs, second.kwargs)
            if name is not None:
                raise InputError(
                    f"{self.path}.{index} is called with {name} that depends on the tokens; eqat trains blocks whose "
                    "other arguments depend on positions only"
                )
        return [one.calls[index] for index in range(len(self.layers))]

    @torch.no_grad()
    def _returned_after_hidden(self, input_ids: Tensor) -> tuple[Any, ...] | None:
        recorder = _Recorder(self.layers, last=0)
        hidden = self._record(input_ids, recorder)
        block, call = self.layers[0], recorder.calls[0]
        load_parameters_(block, f"{self.path}.0", self.source, self.device, torch.float32)
        output = call.output(block, hidden)
        try:
            call.output(block, hidden.expand(2, -1, -1))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as exc:
            raise InputError(
                f"{self.path}.0 ({type(block).__name__}) takes arguments that do not broadcast over a batch; "
                "eqat trains blocks whose masks and position embeddings do"
            ) from exc
        finally:
            unload_(block)
        return output[1:] if isinstance(output, tuple) else None


def _differing(one: Any, other: Any, name: str = "an argument") -> str | None:
    """Name of the first argument in which two captures differ, None when they are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return None if one.shape == other.shape and torch.equal(one, other) else name
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return name
        return next(filter(None, (_differing(one[key], other[key], str(key)) for key in one)), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return name
        return next(filter(None, (_differing(a, b, name) for a, b in zip(one, other, strict=True))), None)
    return None if type(one) is type(other) else name
