"""What of a model is quantized, how, and what stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from formats import Format, QuantScheme
from formats.checkpoint import CheckpointReader, TensorInfo
from formats.errors import InputError, UnsupportedSchemeError

from ..overrides import choose_schemes
from .decoder import find_decoder_layers, is_quantizable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Targets", "check_linear", "find_targets", "has_matrix", "refuse_quantized"]


@dataclass(frozen=True, eq=False)
class Targets:
    """The layers of a model.

    Attributes:
        path: of the list of decoder blocks, e.g. ``model.layers``.
        layers: the list.
        schemes: module path of every linear that could be quantized -> its scheme, None where it stays.
        head: path and scheme of an output head that is quantized.
        ignore: module paths of matrices that stay in full precision.
    """

    path: str
    layers: nn.ModuleList
    schemes: dict[str, QuantScheme | None]
    head: tuple[str, QuantScheme] | None
    ignore: list[str]

    def overrides(self, usual: QuantScheme) -> dict[str, QuantScheme]:
        """Quantized layers of another scheme than the model's."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme not in (None, usual)}  # type: ignore[misc]


def find_targets(
    model: PreTrainedModel, reader: CheckpointReader, scheme: QuantScheme, overrides: Mapping[str, str]
) -> Targets:
    """Linears inside the decoder blocks, and the output head where an override names it.

    Args:
        model: skeleton.
        reader: of its checkpoint.
        scheme: model-wide.
        overrides: pattern -> value, checked.

    Raises:
        InputError: a pattern matches no layer, or nothing is left to quantize.
    """
    path, layers = find_decoder_layers(model)
    inside = {module: f"{path}.{name}" for name, module in layers.named_modules()}
    outside = [name for name, module in model.named_modules() if is_quantizable(module) and module not in inside]
    linears = [name for module, name in inside.items() if is_quantizable(module)]
    head = _own_head(model, reader)
    others = {name: _why_kept(model, name) for name in outside if name != head}
    schemes = choose_schemes(linears, scheme, overrides, head=head, outside=others)
    found = None if head is None else schemes.get(head)
    outside = [name for name in outside if schemes.get(name) is None]
    kept = [name for module, name in inside.items() if has_matrix(module) and schemes.get(name) is None]
    ignore = [*outside, *kept, *_other_matrices(model, reader.tensors)]
    return Targets(path, layers, schemes, None if head is None or found is None else (head, found), ignore)


def check_linear(name: str, linear: nn.Module, scheme: QuantScheme, fmt: Format) -> None:
    """Refuses a layer that the scheme or the native format does not fit; the text names what does.

    Raises:
        UnsupportedSchemeError: it does not fit.
    """
    layer = cast(nn.Linear, linear)
    if layer.in_features % scheme.width(layer.in_features):
        works = [size for size in (16, 32, 64, 128, 256) if layer.in_features % size == 0]
        raise UnsupportedSchemeError(
            f"group_size {scheme.group_size} does not divide in_features {layer.in_features} of {name}; "
            f"use {', '.join(map(str, works))}{' or ' if works else ''}-1 (one group a row)"
        )
    try:
        fmt.check(scheme, layer.out_features, layer.in_features)
    except UnsupportedSchemeError as exc:
        raise UnsupportedSchemeError(f"{name}: {exc}") from exc


def has_matrix(module: nn.Module) -> bool:
    """True for a module with a two-dimensional ``weight`` of its own."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _own_head(model: PreTrainedModel, reader: CheckpointReader) -> str | None:
    """Module path of a linear output head with a weight of its own in the checkpoint; None where it shares one."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module) or not is_quantizable(head):
        return None
    path = next(name for name, module in model.named_modules() if module is head)
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return None if tied or f"{path}.weight" not in reader.tensors else path


def _why_kept(model: PreTrainedModel, name: str) -> str:
    """Why a linear outside of the blocks is never quantized."""
    if model.get_submodule(name) is model.get_output_embeddings():
        return "shares its weight with the embedding"
    return "is outside the decoder blocks"


def _other_matrices(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Module paths of matrices in a file that belong to none of the model's modules, such as a vision tower's."""
    ours = {name for name, _ in model.named_modules()}
    matrices = (name for name, info in tensors.items() if name.endswith(".weight") and len(info.shape) == 2)
    return [path for path in (name.removesuffix(".weight") for name in matrices) if path not in ours]


def refuse_quantized(reader: CheckpointReader, stage: str) -> None:
    """Refuses a checkpoint that is quantized already."""
    if reader.quantization_config:
        method = reader.quantization_config.get("quant_method", "unknown method")
        raise InputError(f"{reader.folder} is already quantized ({method}); {stage} starts from full precision")
