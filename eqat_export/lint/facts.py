"""The facts that rules ask for.

Of the model:

| fact | value |
|---|---|
| format | format id; ``dense`` in full precision |
| quant_method | as configured, ``none`` where there is none |
| configured | ``config.json``, ``sidecar`` (only in a file of its own) or ``nowhere`` |
| packing_format | auto-round's |
| zeros | ``raw`` or ``less one``: what stored zero-points are, by their values or, where those are silent, the label |
| zeros_label | the same, by the label |
| zeros_as_labelled | both are one |
| wrapped | ``none``, ``field`` or ``word``: how zeros of 0 were wrapped in ``less one`` |
| gptqmodel_quantizer | meta.quantizer lists a gptqmodel that may have written asymmetric v1 |
| tokenizer | there is one |
| model_files | every weight file is named ``model*.safetensors`` |
| stray_files | there are weight files that hold none of the tensors |
| kept | linears in full precision among quantized ones |
| model_dtype | as config.json says, ``none`` where it does not |
| ignored_apart | compressed-tensors: a linear that ``ignore`` names without its fused siblings, or ``none`` |

Of each layer: bits, group_size, sym and desc_act as configured; symmetric and act_order as the tensors have it; g_idx
(there is one); in_features, out_features; in_bits and out_bits (bits of a row and of a column); grouped (group_size is
not -1); whole_groups (group_size divides in_features); fused (engines compute it as a part of another linear);
fused_out and fused_bits (out_features and bits of a column of that linear, or its own); scale_dtype; lowest_zero,
highest_zero; override (its scheme is not the model's); fused_override (so, as a part of a fused linear); fused_alike
(the parts of its fused linear have one scheme); head (it is the output head); expert (it belongs to one expert of a
mixture); experts_alike (all linears of that mixture have one scheme); expert_names (``own`` where its path has
Mixtral's w1, w2 and w3); ggml_type; of compressed-tensors weight_packed, weight_scale, weight_zero_point and
weight_shape (``stored.py`` has what of them).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from eqat_export.diagnosis.structure import has_tokenizer, stray_files
from eqat_export.diagnosis.survey import Survey
from formats.compressed_tensors_config import METHOD, matches
from formats.errors import CheckpointError
from formats.gptq import producers
from formats.gptq_zeros import has_zero_label, wraps_by_word, zero_label
from formats.model import Checkpoint
from formats.types import QuantScheme

from .rules import Value
from .stored import stored_facts

__all__ = ["FUSED", "Facts", "facts_of"]

Facts = Mapping[str, Value]

# Linears that vllm and sglang compute as one (packed_modules_mapping of their Llama; most models name them alike).
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_HEADS = ("lm_head", "embed_out")
_MIXTRAL = ("w1", "w2", "w3")
_MEANINGS = {"gptq": "less one", "gptq_v2": "raw"}
_GGML_UNITS = {9: "Q2_0", 18: "Q4_0", 22: "Q5_0", 34: "Q8_0"}  # bytes for 32 weights


def facts_of(checkpoint: Checkpoint, survey: Survey) -> dict[str, Facts]:
    """Layer name -> what is known of it, the model's facts included; one entry ``""`` where no layer is quantized."""
    model = _model_facts(checkpoint, survey)
    if checkpoint.format is None:
        return {"": model}
    schemes = _schemes(checkpoint)
    return {
        name: {
            **model,
            **_layer_facts(checkpoint, survey, name, scheme),
            **_fused_facts(checkpoint, schemes, name),
            **_expert_facts(schemes, name),
        }
        for name, scheme in schemes.items()
    }


def _model_facts(checkpoint: Checkpoint, survey: Survey) -> dict[str, Value]:
    reader = checkpoint.reader
    config = reader.quantization_config
    inside = isinstance(reader.config.get("quantization_config"), dict)
    shards = {info.shard for info in reader.tensors.values()}
    facts: dict[str, Value] = {
        "format": checkpoint.format.id if checkpoint.format else "dense",
        "configured": "config.json" if inside else "sidecar" if config else "nowhere",
        "gptqmodel_quantizer": _lists_gptqmodel(config),
        "tokenizer": has_tokenizer(checkpoint),
        "model_files": all(shard.startswith("model") for shard in shards if shard.endswith(".safetensors")),
        "stray_files": bool(stray_files(checkpoint)),
        "kept": len(checkpoint.ignore) > int("lm_head" in checkpoint.ignore),
        "model_dtype": str(reader.config.get("dtype") or reader.config.get("torch_dtype") or "none").removeprefix(
            "torch."
        ),
        **_configured_facts(config),
    }
    if facts["format"] == METHOD:
        facts["ignored_apart"] = _ignored_apart(checkpoint)
    if survey.zeros is not None:
        follows = survey.zeros.follows or survey.zeros.label
        facts["zeros"] = _MEANINGS.get(follows, follows)
        facts["zeros_as_labelled"] = not survey.zeros.contradicted
        facts["wrapped"] = ("word" if wraps_by_word(config) else "field") if survey.zeros.wrapped else "none"
    return facts


def _configured_facts(config: Mapping[str, Any]) -> dict[str, Value]:
    facts: dict[str, Value] = {"quant_method": str(config.get("quant_method") or "none").lower()}
    if "auto-round" in str(facts["quant_method"]):
        facts["packing_format"] = str(
            config.get("packing_format") or "auto_round:auto_gptq"
        )  # as engines take none for
    if has_zero_label(config) and config:
        label = zero_label(config) or "gptq"
        if label in _MEANINGS:
            facts["zeros_label"] = _MEANINGS[label]
    return facts


def _schemes(checkpoint: Checkpoint) -> dict[str, QuantScheme]:
    """Of every layer whose configuration can be read; verification has named the others."""
    found = {}
    for name in checkpoint.layer_names:
        try:
            found[name] = checkpoint.layer_scheme(name)
        except CheckpointError:
            continue
    return found


def _layer_facts(checkpoint: Checkpoint, survey: Survey, name: str, scheme: QuantScheme) -> dict[str, Value]:
    shapes = checkpoint.layer_shapes(name)
    facts: dict[str, Value] = {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "grouped": scheme.group_size > 0,
        "sym": scheme.sym,
        "desc_act": scheme.desc_act,
        "g_idx": "g_idx" in shapes or "weight_g_idx" in shapes,
        "override": scheme != checkpoint.scheme,
        "head": name.rpartition(".")[2] in _HEADS,
    }
    features = _features(checkpoint, name)
    if features is not None:
        out_features, in_features = features
        facts |= {"out_features": out_features, "in_features": in_features}
        facts |= {"out_bits": out_features * scheme.bits, "in_bits": in_features * scheme.bits}
        facts["whole_groups"] = scheme.group_size == -1 or in_features % scheme.group_size == 0
        if checkpoint.format is not None and checkpoint.format.id == METHOD:
            facts |= stored_facts(checkpoint, name, scheme, out_features, in_features)
    if name in survey.layers:
        seen = survey.layers[name]
        facts |= {
            "symmetric": _symmetric(survey, seen.symmetric),
            "act_order": seen.act_order,
            "scale_dtype": seen.scale_dtype,
            "lowest_zero": seen.lowest_zero,
            "highest_zero": seen.highest_zero,
        }
    if "blocks" in shapes and shapes["blocks"][-1] in _GGML_UNITS:
        facts["ggml_type"] = _GGML_UNITS[shapes["blocks"][-1]]
    return facts


def _symmetric(survey: Survey, decoded: bool) -> bool:
    """Whether zeros are the middle of the range; decoded ones are off by one where the label is wrong."""
    zeros = survey.zeros
    return decoded if zeros is None or not zeros.contradicted else zeros.symmetric == zeros.follows


def _fused_facts(checkpoint: Checkpoint, schemes: Mapping[str, QuantScheme], name: str) -> dict[str, Value]:
    bits = schemes[name].bits
    parts = _parts(name, _linears(checkpoint))
    if not parts:
        features = _features(checkpoint, name)
        return {"fused": False, **(_fused_size(features[0], bits) if features else {})}
    found = [schemes.get(part) for part in parts]
    kinds = {(scheme.bits, scheme.group_size, scheme.sym) if scheme else None for scheme in found}
    facts: dict[str, Value] = {
        "fused": True,
        "fused_alike": len(kinds) == 1,
        "fused_override": schemes[name] != checkpoint.scheme,
    }
    sizes = [_features(checkpoint, part) for part in parts if part in schemes]
    if all(sizes):
        facts |= _fused_size(sum(size[0] for size in sizes if size), bits)
    return facts


def _expert_facts(schemes: Mapping[str, QuantScheme], name: str) -> dict[str, Value]:
    mixture, expert, within = name.partition(".experts.")
    if not expert:
        return {"expert": False}
    kinds = {
        (scheme.bits, scheme.group_size, scheme.sym)
        for other, scheme in schemes.items()
        if other.startswith(f"{mixture}.experts.")
    }
    names = "own" if within.rpartition(".")[2] in _MIXTRAL else "usual"
    return {"expert": True, "experts_alike": len(kinds) == 1, "expert_names": names}


def _fused_size(out_features: int, bits: int) -> dict[str, Value]:
    return {"fused_out": out_features, "fused_bits": out_features * bits}


def _ignored_apart(checkpoint: Checkpoint) -> str:
    """The first linear that ``ignore`` names although it does not name all that are fused with it."""
    targets = checkpoint.config.get("ignore") or ()
    linears = _linears(checkpoint)
    ignored = {name for name in linears if any(matches(target, name) for target in targets)}
    return next((name for name in sorted(ignored) if not ignored.issuperset(_parts(name, linears))), "none")


def _linears(checkpoint: Checkpoint) -> set[str]:
    return {*checkpoint.layer_names, *(path.removesuffix(".weight") for path in checkpoint.passthrough_names)}


def _parts(name: str, linears: Collection[str]) -> list[str]:
    """The linears that are fused with this one, itself included; empty where it stays alone."""
    parent, _, leaf = name.rpartition(".")
    for group in FUSED:
        paths = [f"{parent}.{part}" if parent else part for part in group]
        if leaf in group and all(path in linears for path in paths):
            return paths
    return []


def _features(checkpoint: Checkpoint, name: str) -> tuple[int, int] | None:
    try:
        return checkpoint.layer_features(name)
    except CheckpointError:
        return None


def _lists_gptqmodel(config: Mapping[str, Any]) -> bool:
    """True for a gptqmodel of 0.9.0 or later among the producers."""
    version = producers(config).get("gptqmodel", "")
    numbers = tuple(int(part) for part in _leading(version.split(".")))
    return numbers >= (0, 9)


def _leading(parts: list[str]) -> Iterator[str]:
    for part in parts:
        if not part.isdecimal():
            return
        yield part
