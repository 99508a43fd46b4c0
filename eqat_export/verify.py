"""Checks of one checkpoint on its own.

Opening it has already checked index, headers and file lengths (``formats.checkpoint``). Here every layer is decoded,
which checks shapes, dtypes and ranges, and the configuration is compared with what the tensors hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from eqat_export.diagnosis.layouts import check_layouts
from eqat_export.diagnosis.mixtures import check_mixtures
from eqat_export.diagnosis.structure import check_structure, has_tokenizer
from eqat_export.diagnosis.survey import Survey
from eqat_export.diagnosis.values import ValueChecks
from eqat_export.findings import Finding, error, note, warning
from formats.checkpoint_reader import QUANTIZATION_FILES, read_json
from formats.compressed_tensors_config import matches
from formats.errors import CheckpointError, InvalidLayerError
from formats.gptq import GptqV2Format, dynamic_rules
from formats.gptq_zeros import ZeroDiagnosis, diagnose_zeros, has_zero_label
from formats.model import Checkpoint
from formats.types import QuantizedLinear

__all__ = ["verify_checkpoint"]

SHARED_KEYS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method")


def verify_checkpoint(
    checkpoint: Checkpoint, step: Callable[[str], None] = lambda name: None, survey: Survey | None = None
) -> list[Finding]:
    """Everything that is wrong, or may be, with a checkpoint that could be opened.

    Args:
        checkpoint: any format, full precision included.
        step: called with each layer's name once it is done.
        survey: filled with what was seen of the layers.
    """
    survey = Survey() if survey is None else survey
    findings = list(_check_configuration(checkpoint))
    try:
        findings += _check_modules(checkpoint)
    except CheckpointError as exc:
        findings.append(error("configuration", str(exc)))
    findings += check_structure(checkpoint)
    findings += check_layouts(checkpoint)
    values = ValueChecks(checkpoint, one_convention=not _has_conventions(checkpoint))
    for name in checkpoint.layer_names:
        findings += _check_layer(checkpoint, name, values, survey)
        step(name)
    findings += values.findings()
    findings += _check_passthrough(checkpoint)
    if _has_conventions(checkpoint) and len(survey.layers) == len(checkpoint.layer_names):
        survey.zeros = diagnose_zeros(checkpoint)
        findings += _zero_findings(checkpoint, survey.zeros)
    findings += check_mixtures(checkpoint, survey)
    return findings


def _has_conventions(checkpoint: Checkpoint) -> bool:
    """True for formats in which a zero may be stored as it is or less one."""
    if isinstance(checkpoint.format, GptqV2Format):
        return True
    return checkpoint.format is not None and checkpoint.format.id == "auto-round" and has_zero_label(checkpoint.config)


def _check_configuration(checkpoint: Checkpoint) -> Iterator[Finding]:
    folder = checkpoint.reader.folder
    if not has_tokenizer(checkpoint):
        yield warning(str(folder), "no tokenizer; gptqmodel and generation need one")
    configurations: dict[str, dict[str, Any]] = {}
    for name in QUANTIZATION_FILES:
        if (folder / name).exists():
            configurations[name] = read_json(folder / name)
    inside = checkpoint.reader.config.get("quantization_config")
    if isinstance(inside, dict):
        configurations["config.json"] = inside
    for key in SHARED_KEYS:
        values = {name: config[key] for name, config in configurations.items() if key in config}
        if len(set(map(str, values.values()))) > 1:
            stated = ", ".join(f"{name} says {value}" for name, value in values.items())
            yield error("configuration", f"{key}: {stated}; readers take one or the other")
    if checkpoint.format is not None and not checkpoint.reader.quantization_config:
        yield note("configuration", "no quantization_config; bits and group_size were read from shapes")


def _check_modules(checkpoint: Checkpoint) -> Iterator[Finding]:
    ignored = _ignored(checkpoint.reader.quantization_config)
    for name in checkpoint.layer_names:
        if any(pattern.match(name) for pattern in ignored):
            yield error(name, "is quantized, but the configuration says it is kept in full precision")
    if not checkpoint.reader.quantization_config:
        return
    blocks = {_block(name) for name in checkpoint.layer_names}
    targets = checkpoint.reader.quantization_config.get("ignore") or ()  # compressed-tensors'
    for name in checkpoint.passthrough_names:
        module, _, local = name.rpartition(".")
        linear = local == "weight" and len(checkpoint.reader.tensors[name].shape) == 2 and _block(module) in blocks
        kept = any(pattern.match(module) for pattern in ignored) or any(matches(target, module) for target in targets)
        if linear and not kept:
            yield warning(module, "is in full precision among quantized layers, and the configuration does not say so")


def _ignored(quantization: dict[str, Any]) -> list[re.Pattern[str]]:
    """What a configuration keeps in full precision, in every format's words."""
    named = quantization.get("modules_to_not_convert") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"modules_to_not_convert is {named!r}; expected a list of module paths")
    patterns = [re.compile(rf"{re.escape(name)}(\.|$)") for name in named]
    if quantization.get("lm_head") is False:
        patterns.append(re.compile(r"lm_head$"))
    extra = quantization.get("extra_config")  # auto-round's
    wide = [name for name, own in extra.items() if own.get("bits", 0) > 8] if isinstance(extra, dict) else []
    false = [name for name, value in quantization.items() if value is False and "." in name]  # mlx-lm's
    patterns += [re.compile(rf"{re.escape(name)}$") for name in (*wide, *false)]
    left_out = (key for key in dynamic_rules(quantization) if key.startswith("-:"))
    return patterns + [re.compile(key.removeprefix("-:")) for key in left_out]


def _block(name: str) -> str:
    """The path up to the first number, e.g. ``model.layers``; the whole path without one."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0]]) if numbers else name


def _check_layer(checkpoint: Checkpoint, name: str, values: ValueChecks, survey: Survey) -> Iterator[Finding]:
    try:
        layer = checkpoint.layer(name)
    except (CheckpointError, InvalidLayerError) as exc:
        yield error(name, str(exc.__cause__ or exc))  # the cause names no layer: this line does
        return
    survey.see(checkpoint, name, layer)
    yield from values.see(name, layer)
    yield from _check_against_model(checkpoint, name, layer)


def _check_against_model(checkpoint: Checkpoint, name: str, layer: QuantizedLinear) -> Iterator[Finding]:
    model_wide = checkpoint.scheme
    if model_wide is not None and (layer.scheme.bits, layer.scheme.group_size) != (
        model_wide.bits,
        model_wide.group_size,
    ):
        yield note(name, f"is {layer.scheme}, unlike the model-wide {model_wide}")
    if layer.bias is not None and not bool(torch.isfinite(layer.bias).all()):
        yield error(f"{name}.bias", f"{int((~torch.isfinite(layer.bias)).sum())} values are NaN or infinite")


def _check_passthrough(checkpoint: Checkpoint) -> Iterator[Finding]:
    for name in checkpoint.passthrough_names:
        tensor = checkpoint.get(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield error(name, f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are NaN or infinite")


def _zero_findings(checkpoint: Checkpoint, diagnosis: ZeroDiagnosis) -> Iterator[Finding]:
    text = "; ".join((diagnosis.verdict, *diagnosis.evidence))
    read_as = checkpoint.format.id if isinstance(checkpoint.format, GptqV2Format) else diagnosis.label
    if diagnosis.follows is not None and read_as not in (diagnosis.label, diagnosis.follows):
        yield error("qzeros", f"read as {read_as} by --from, against the label and the values: {text}")
    elif diagnosis.contradicted:
        yield error("qzeros", text)
    elif diagnosis.wrapped:
        yield warning("qzeros", text)
    else:
        yield note("qzeros", diagnosis.verdict)
