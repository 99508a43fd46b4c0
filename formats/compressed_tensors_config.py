"""The ``quantization_config`` of compressed-tensors checkpoints: config groups, targets and ignore.

Plain dictionaries in, plain dictionaries out; nothing here touches tensors. A config group says how the modules that
its ``targets`` match are quantized. A target is a module path, a pattern (``re:`` and a regex matched from the start
of the path) or a class name. Where several groups match, a path wins over a pattern and a pattern over a class name.

Sources: compressed-tensors 0.20.0 ``quantization/{quant_args,quant_scheme,quant_config}.py``, ``utils/match.py``
(``match_targets``) and ``quantization/lifecycle/apply.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError, InvalidLayerError
from .types import QuantScheme

__all__ = ["LAYOUT", "METHOD", "ConfigGroup", "config_groups", "group_for", "matches", "model_group", "written_config"]

METHOD = "compressed-tensors"
LAYOUT = "pack-quantized"
# What a class-name target can mean for a packed matrix; other classes (attention) hold none.
_LINEAR, _EMBEDDING = "Linear", "Embedding"
_DENSE_FIRST = "make a full-precision model of it with transformers (CompressedTensorsConfig(dequantize=True))"
_ACT_ORDERS = {"group": True, "dynamic": True, True: True, "weight": False, "static": False, False: False, None: False}


@dataclass(frozen=True)
class ConfigGroup:
    """One config group that quantizes weights.

    Attributes:
        name: its key in ``config_groups``.
        targets: paths, patterns and class names.
        scheme: what it makes of the modules they match.
    """

    name: str
    targets: tuple[str, ...]
    scheme: QuantScheme


def config_groups(config: Mapping[str, Any]) -> list[ConfigGroup]:
    """The groups that quantize weights, in the order of the file.

    Raises:
        CheckpointError: the configuration is damaged, or asks for something other than packed integer weights.
    """
    for key, what in (("sparsity_config", "sparse"), ("transform_config", "rotated"), ("kv_cache_scheme", "cached")):
        value = config.get(key)
        if value and not (key == "sparsity_config" and value.get("format", "dense") == "dense"):
            raise CheckpointError(f"{key} is set: {what} values are not read; {_DENSE_FIRST}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"config_groups is {groups!r}; expected an object of quantization groups")
    found = []
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise CheckpointError(f"config group {name!r} is {group!r}; expected an object with targets and weights")
        if group.get("weights") is not None:
            found.append(_group(name, group, config.get("format")))
    if not found:
        raise CheckpointError("no config group quantizes weights")
    return found


def _group(name: str, group: Mapping[str, Any], layout: Any) -> ConfigGroup:
    layout = group.get("format") or layout
    if layout != LAYOUT:
        raise CheckpointError(f"config group {name!r} has format {layout!r}; only {LAYOUT} is read; {_DENSE_FIRST}")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise CheckpointError(f"config group {name!r} has {key}; only weights are read; {_DENSE_FIRST}")
    targets = tuple(str(target) for target in group["targets"])
    for target in targets:
        _compiled(target)
    try:
        return ConfigGroup(name, targets, _scheme(group["weights"]))
    except (CheckpointError, InvalidLayerError) as exc:
        raise CheckpointError(f"config group {name!r}: {exc}") from exc


def _scheme(weights: Any) -> QuantScheme:
    if not isinstance(weights, dict):
        raise CheckpointError(f"weights is {weights!r}; expected an object")
    kind, size = str(weights.get("type", "int")).lower(), weights.get("group_size")
    if kind != "int":
        raise CheckpointError(f"type is {kind!r}; only int weights are read; {_DENSE_FIRST}")
    if weights.get("dynamic"):
        raise CheckpointError(f"dynamic is {weights['dynamic']!r}; only weights with stored scales are read")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = str(weights.get("strategy") or inferred).lower()
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"strategy is {strategy!r}; group and channel are read; {_DENSE_FIRST}")
    order = weights.get("actorder")
    order = order.lower() if isinstance(order, str) else order
    if not isinstance(order, str | bool | None) or order not in _ACT_ORDERS:
        raise CheckpointError(f"actorder is {order!r}; allowed are group, weight and null")
    width = -1 if strategy == "channel" else size
    if width is None:
        raise CheckpointError("strategy is 'group' without a group_size")
    return QuantScheme(
        weights.get("num_bits", 8),
        width,
        sym=bool(weights.get("symmetric", True)),
        desc_act=_ACT_ORDERS[order],
    )


def matches(target: str, name: str) -> bool:
    """True when a path or pattern target matches a module path; class names match no path."""
    pattern = _compiled(target)
    return target == name if pattern is None else pattern.match(name) is not None


def _compiled(target: str) -> re.Pattern[str] | None:
    if not target.startswith("re:"):
        return None
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as exc:
        raise CheckpointError(f"target {target!r} is no regular expression: {exc}") from exc


def group_for(groups: Iterable[ConfigGroup], ignore: Collection[str], name: str) -> ConfigGroup:
    """The group of one module that holds packed weights.

    Raises:
        CheckpointError: no target matches it, or it is ignored.
    """
    ignored = next((target for target in ignore if matches(target, name)), None)
    if ignored is not None:
        raise CheckpointError(f"ignore names it ({ignored!r}) although its weight is packed")
    owners = {target: group for group in groups for target in group.targets}  # the last group of a target wins
    for target in sorted(owners, key=lambda target: (target.startswith("re:"), target)):
        if matches(target, name):
            return owners[target]
    kind = _EMBEDDING if "embed" in name.rpartition(".")[2] else _LINEAR
    if kind not in owners:
        raise CheckpointError(f"no config group targets it; their targets are {', '.join(owners)}")
    return owners[kind]


def model_group(groups: list[ConfigGroup]) -> ConfigGroup:
    """The group that stands for the model: the one that targets Linear, or else the first."""
    return next((group for group in groups if _LINEAR in group.targets), groups[0])


def written_config(
    scheme: QuantScheme, ignore: Collection[str], overrides: Mapping[str, QuantScheme]
) -> dict[str, Any]:
    """What compressed-tensors, vLLM and humming read.

    The model's scheme targets Linear; every other scheme is a further group with the paths of its layers. vLLM's
    lm_head is no Linear, so that a quantized one is named.
    """
    by_scheme: dict[QuantScheme, list[str]] = {}
    for name, override in overrides.items():
        by_scheme.setdefault(override, []).append(name)
    head = [] if "lm_head" in ignore or "lm_head" in overrides else ["lm_head"]
    groups = [(scheme, [_LINEAR, *head]), *by_scheme.items()]
    return {
        "quant_method": METHOD,
        "format": LAYOUT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": _weights(group)} for i, (group, targets) in enumerate(groups)
        },
        "ignore": list(ignore),
    }


def _weights(scheme: QuantScheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
    }
