"""Models without their weights in memory: skeletons on the meta device, filled a module at a time.

``build_skeleton`` makes the transformers model with meta parameters and real buffers, ``load_parameters_`` reads one
sub-module's tensors from a checkpoint. ``load_dense_model`` is the exception: it fills a whole model, dequantized, for
evaluation and tests.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from formats.checkpoint import CheckpointReader
from formats.errors import CheckpointError, InputError
from formats.model import Checkpoint, open_checkpoint

from ..error_text import first_line
from ..hardware import give_back_freed_memory
from .experts import unfuse_experts_
from .hub import resolve_model
from .stored_names import rename_as_stored_
from .text_part import own_name, place_as_stored_, text_part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "OwnTensors",
    "TensorSource",
    "build_skeleton",
    "check_names",
    "fill_model_",
    "load_config",
    "load_dense_model",
    "load_parameters_",
    "load_tokenizer",
    "persistent_tensors",
    "resolve_model",
    "unload_",
]

# Old checkpoints carry this buffer in every layer; transformers computes it from the configuration.
_IGNORED_TENSORS = (r"rotary_emb\.inv_freq$",)
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


class TensorSource(Protocol):
    """Anything that gives a checkpoint's tensors by name, e.g. a CheckpointReader or a Checkpoint."""

    def get(self, name: str) -> Tensor: ...


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The transformers configuration of a model folder, without its ``quantization_config``.

    Raises:
        InputError: transformers does not know the architecture, or its own code is needed and not trusted.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as exc:
        raise InputError(_explain(folder, "configuration", exc)) from exc
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def build_skeleton(
    source: Path | PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model with every parameter on the meta device and real buffers, in evaluation mode.

    Its modules have the names of the file: experts that transformers fuses are linears of their own. Of a model that
    takes more than text it is the text decoder.

    Args:
        source: model folder, or its configuration.
        dtype: dtype of the parameters.
        trust_remote_code: allow Python files of the model folder to run.

    Raises:
        InputError: transformers cannot build a causal language model from the configuration.
    """
    config = load_config(source, trust_remote_code=trust_remote_code) if isinstance(source, Path) else source
    text = text_part(config)
    try:
        with init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(text or config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as exc:
        raise InputError(_explain(source, "model", exc)) from exc
    unfuse_experts_(model)
    rename_as_stored_(model)
    if text is not None and isinstance(source, Path):
        with CheckpointReader(source) as reader:
            place_as_stored_(model, reader.tensors)
    return model.eval().requires_grad_(False)


class _EmptyOnMeta(TorchFunctionMode):
    """Inside, ``torch.empty`` allocates nothing.

    That is what layers make parameters with. ``init_empty_weights`` alone frees each one when it is registered, but the
    holes left in the heap add up to the model's size, and training fills them with its own tensors one after the other.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        InputError: the folder has no tokenizer that transformers can load.
    """
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise InputError(f"{folder} has no tokenizer files ({', '.join(TOKENIZER_FILES)}); copy the model's own there")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as exc:
        raise InputError(_explain(folder, "tokenizer", exc)) from exc


def _explain(source: object, what: str, exc: Exception) -> str:
    if "trust_remote_code" in str(exc):
        return f"{source} needs Python code of its own; read it, then allow it with --trust-remote-code"
    return f"{source}: transformers cannot load the {what}: {first_line(exc)}"


def persistent_tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every parameter and persistent buffer that a state dict holds, as (owner, local name, full name)."""
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, name, prefix + name
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield owner, name, prefix + name


def _assign(owner: nn.Module, name: str, tensor: Tensor) -> None:
    if name in owner._parameters:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _check_shape(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(tensor.shape)}; config.json describes {list(expected.shape)}"
        )


def load_parameters_(
    module: nn.Module, prefix: str, source: TensorSource, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Fills a meta module's parameters and persistent buffers, and moves its other buffers to the device.

    Args:
        module: any sub-module of a skeleton.
        prefix: its path in the model, e.g. ``model.layers.3``; empty for the model itself.
        source: reads ``<prefix>.<name>``.
        device: where the tensors go.
        dtype: dtype of floating tensors.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the module's.
    """
    for owner, local, full in list(persistent_tensors(module)):
        name = f"{prefix}.{full}" if prefix else full
        tensor = source.get(name)
        _check_shape(name, tensor, getattr(owner, local))
        # A copy even where nothing changes: the source may hand out a view of a memory-mapped file.
        target = dtype if tensor.is_floating_point() else tensor.dtype
        _assign(owner, local, tensor.to(device, target, copy=True))
    module.to(device)


def unload_(module: nn.Module) -> None:
    """Puts what ``load_parameters_`` can read again back on the meta device; other buffers stay."""
    loaded = [(owner, local) for owner, local, _ in persistent_tensors(module) if not getattr(owner, local).is_meta]
    for owner, local in loaded:
        _assign(owner, local, getattr(owner, local).detach().to("meta"))
    if loaded:
        give_back_freed_memory()


class OwnTensors(nn.Module):
    """A module's direct parameters and buffers, shared, without its children."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set


def load_dense_model(
    source: Path | Checkpoint,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A whole model in memory, quantized layers dequantized; for evaluation and tests.

    Args:
        source: model or checkpoint folder in any known format, or an open checkpoint.
        dtype: dtype of the floating tensors; quantized weights are dequantized in fp32 first.
        device: where the model goes.
        trust_remote_code: allow Python files of the folder to run.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    with ExitStack() as stack:
        checkpoint = source if isinstance(source, Checkpoint) else stack.enter_context(open_checkpoint(source))
        folder = checkpoint.reader.folder
        model = build_skeleton(folder, dtype, trust_remote_code=trust_remote_code)
        fill_model_(model, checkpoint.dense_tensors(dtype), device, folder)
        return model


def check_names(model: PreTrainedModel, names: Iterable[str], folder: Path) -> None:
    """Refuses tensors that a full-precision model has no place for and that transformers does not ignore either.

    Raises:
        CheckpointError: there is one; the text names it.
    """
    slots = {full for _, _, full in persistent_tensors(model)}
    for name in names:
        if name not in slots:
            _check_ignored(model, name, folder)


def _check_ignored(model: PreTrainedModel, name: str, folder: Path) -> None:
    ignored = (*_IGNORED_TENSORS, *(model._keys_to_ignore_on_load_unexpected or ()))
    if not any(re.search(pattern, name) for pattern in ignored):
        raise CheckpointError(f"{folder}: unexpected tensor {name}; {type(model).__name__} has no such parameter")


def fill_model_(
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device | str,
    folder: Path,
    *,
    filled: Collection[str] = (),
) -> None:
    """Fills a whole skeleton from a stream of named tensors, ties what is tied, and moves it to the device.

    Args:
        model: from ``build_skeleton``.
        tensors: full name and tensor, in the dtype it is to have.
        device: where the model goes.
        folder: where the tensors come from, for messages.
        filled: full names that are in place already.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape.
    """
    slots = {full: (owner, local) for owner, local, full in persistent_tensors(model) if full not in filled}
    missing = set(slots)
    for name, tensor in tensors:
        if name not in slots:
            _check_ignored(model, name, folder)
            continue
        owner, local = slots[name]
        _check_shape(name, tensor, getattr(owner, local))
        _assign(owner, local, tensor.to(device))
        missing.discard(name)
    # transformers knows a text decoder inside a larger model by its own names
    model.tie_weights(missing_keys={own_name(name) for name in missing}, recompute_mapping=False)
    missing = {name for name in missing if getattr(*slots[name]).is_meta}
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: tensor {min(missing)}{more} is missing for a {type(model).__name__}")
    nn.Module.to(model, device)
