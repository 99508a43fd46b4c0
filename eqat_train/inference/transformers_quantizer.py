"""``AutoModelForCausalLM.from_pretrained`` on a native checkpoint, through transformers' own registry of quantizers.

Importing this module registers ``quant_method`` "eqat"; :mod:`eqat_train` sees to that. Linears that the checkpoint
stores packed become :class:`PackedLinear` before transformers fills the model; the rest is transformers' own loading,
with its report of missing and unexpected tensors. What contradicts the checkpoint's own scheme is refused before a
tensor is read, because transformers does not compare shapes of quantized models.

Read against transformers 5.17 to 5.23: ``quantizers/{auto,base}.py``, ``modeling_utils.py``, ``core_model_loading.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from formats.errors import CheckpointError, InputError
from formats.model import Checkpoint, open_checkpoint

from ..models.experts import check_experts, unfuse_experts_
from ..models.replacing import replace_linear_
from .packed_linear import PackedLinear, native_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EqatConfig", "EqatQuantizer"]

METHOD = "eqat"


@register_quantization_config(METHOD)
class EqatConfig(QuantizationConfigMixin):
    """``quantization_config`` of a native checkpoint; its keys are described in ``formats/native.md``.

    Raises:
        InputError: it is not the native layout's.
    """

    def __init__(self, **stored: Any) -> None:
        layout = stored.get("checkpoint_format", "native")
        if layout != "native":
            raise InputError(
                f"checkpoint_format is {layout!r}; transformers loads eqat's 'native': eqat export --to native"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.stored = {"quant_method": METHOD, "checkpoint_format": "native", **stored}

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``config.json``."""
        return dict(self.stored)


@register_quantizer(METHOD)
class EqatQuantizer(HfQuantizer):
    """Puts packed linears where a native checkpoint has packed layers."""

    requires_calibration = True  # transformers' word for: only what is quantized already can be loaded

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise InputError("a quantized model is loaded from the folder or hub id of its native checkpoint")
        unfuse_experts_(model, rename=False)
        # transformers builds models with the meta device as the default one; tensors are read on the CPU
        with torch.device("cpu"), open_checkpoint(Path(checkpoint_files[0]).parent, "native") as checkpoint:
            modules = {name: _module_name(model, name) for name in checkpoint.layer_names}
            if None in modules.values():
                _refuse_fused_experts(model, checkpoint.reader.folder)
            for name, module_name in modules.items():
                if module_name is not None:  # otherwise transformers reports its tensors as unexpected
                    replace_linear_(model, module_name, _empty(checkpoint, name, model.dtype))

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes a native checkpoint again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Training scales is ``eqat train``'s."""
        return False


def _refuse_fused_experts(model: PreTrainedModel, folder: Path) -> None:
    """Raises where transformers would leave experts at random numbers, for it has no packed layer to fill."""
    try:
        check_experts(model, type(model).__name__)
    except InputError as exc:
        raise InputError(
            f"{folder}: transformers keeps a layer's experts in one parameter and loads none that are packed; run it "
            f"with eqat generate, or make it dense first: eqat export {folder} --to dense"
        ) from exc


def _module_name(model: PreTrainedModel, name: str) -> str | None:
    """The module of a stored layer: its own name, transformers' other one, or without the prefix of the bare model."""
    ours = name.replace(".block_sparse_moe.", ".mlp.").replace("language_model.model.", "model.language_model.", 1)
    bare = ours.removeprefix(f"{model.base_model_prefix}.")
    return next((known for known in (name, ours, bare) if _has_module(model, known)), None)


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _empty(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> PackedLinear:
    """The layer on the meta device, checked against the tensors that are to fill it."""
    scheme, stored = checkpoint.layer_scheme(name), checkpoint.layer_shapes(name)
    out_features, in_features = checkpoint.layer_features(name)
    _check_shapes(
        f"layer {name} of {checkpoint.reader.folder}", native_shapes(scheme, out_features, in_features), stored
    )
    plain = True
    if "g_idx" in stored:
        consecutive = torch.arange(in_features) // scheme.width(in_features)
        plain = torch.equal(checkpoint.get(f"{name}.g_idx").to(torch.int64), consecutive)
    with torch.device("meta"):
        return PackedLinear.empty(
            scheme,
            out_features,
            in_features,
            scale_dtype=checkpoint.reader.tensors[f"{name}.scales"].dtype,
            bias_dtype=dtype if "bias" in stored else None,
            g_idx="g_idx" in stored,
            act_order=not plain,
        )


def _check_shapes(where: str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    for local, shape in expected.items():
        if stored[local] != shape:
            raise CheckpointError(f"{where}: {local} has shape {list(stored[local])}; its scheme takes {list(shape)}")
