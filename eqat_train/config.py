"""Settings from the command line, a YAML file and the demo's preset, and their resolved form.

Precedence: command line, then ``--config`` file, then ``--recipe``, then the demo's preset (only without a model), then
the defaults.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from formats.errors import InputError
from formats.types import QuantScheme

from .options import TrainConfig
from .overrides import parse_overrides, split_override

__all__ = [
    "TrainConfig",
    "build_config",
    "context_window",
    "read_config",
    "read_recipe",
    "recipes",
    "resolve_config",
    "save_config",
]

PAPER_SEQ_LEN = {"seq_len": 2048, "e2e_seq_len": 4096}
PAPER_SCHEME = QuantScheme(2, 64)

_FIELDS: dict[str, Field[Any]] = {item.name: item for item in fields(TrainConfig)}
# Permissions for one run, not properties of what was trained.
_NOT_SAVED = ("force", "restart")
_MAY_BE_EMPTY = ("prompt",)
_MAY_BE_INFINITE = ("max_grad_norm", "min_lr_factor")
# What torch's and numpy's generators both take, with room for the stages' offsets.
LARGEST_SEED = 2**62


def build_config(given: Mapping[str, Any], file: Path | None = None, recipe: str | None = None) -> TrainConfig:
    """Settings of a run.

    Args:
        given: what the command line says, by field name; None where it says nothing. Overrides may be lines
            ``PATTERN=VALUE``.
        file: YAML file.
        recipe: name of one that ships with eqat, see :func:`recipes`.

    Raises:
        InputError: an unknown name, or a value of a wrong type or outside its range.
    """
    chosen = read_recipe(recipe) if recipe is not None else {}
    chosen |= read_config(file) if file is not None else {}
    if isinstance(given.get("overrides"), list):
        given = {**given, "overrides": _typed(given["overrides"])}
    typed = {name: _checked(name, value, option_name(name)) for name, value in given.items() if value is not None}
    if "overrides" in typed:  # adds to the file's, and comes after them
        before = {name: value for name, value in chosen.get("overrides", {}).items() if name not in typed["overrides"]}
        typed["overrides"] = before | typed["overrides"]
    chosen |= typed
    if chosen.get("model") is None:
        chosen = demo_preset() | chosen
    return TrainConfig(**chosen)


def demo_preset() -> dict[str, Any]:
    """Settings of the demo, small enough for two CPU cores."""
    text = resources.files("eqat_train").joinpath("presets", "demo.yaml").read_text(encoding="utf-8")
    return _parse(text, "the demo preset")


def recipes() -> list[str]:
    """Names of the recipes that ship with eqat: files of settings, each explained by docs/recipes.md."""
    folder = resources.files("eqat_train").joinpath("recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """Settings of a recipe.

    Raises:
        InputError: there is none of that name.
    """
    if name not in recipes():
        raise InputError(f"--recipe is {name!r}; allowed are {', '.join(recipes())}")
    text = resources.files("eqat_train").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    return _parse(text, f"the recipe {name}")


def read_config(file: Path) -> dict[str, Any]:
    """Settings of a YAML file, checked.

    Raises:
        InputError: the file cannot be read or parsed, or holds an unknown name or a wrong value.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --config {file}: {getattr(error, 'strerror', None) or error}") from error
    return _parse(text, str(file))


def save_config(config: TrainConfig, file: Path) -> None:
    """Writes settings as YAML, in the order of the fields; ``--config`` reads them back."""
    values = {name: getattr(config, name) for name in _FIELDS if name not in _NOT_SAVED}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    file.write_text(f"# eqat train --config {file.name} repeats this run\n{text}", encoding="utf-8")


def option_name(name: str) -> str:
    """How a field is written on the command line."""
    if name == "overrides":
        return "--override"
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def resolve_config(
    config: TrainConfig, *, context: int | None, scheme: QuantScheme | None, scale_dtype: str = "float16"
) -> tuple[TrainConfig, list[str]]:
    """Fills in what depends on the model.

    Args:
        config: settings with None where the run decides.
        context: tokens the model can attend to; None if its configuration does not say.
        scheme: of the checkpoint that E2E-QP starts from; None in full precision.
        scale_dtype: of that checkpoint, or the default.

    Returns:
        The settings, and notes about choices that are not the paper's.

    Raises:
        InputError: a sequence longer than the context, or bits, group or overrides other than the checkpoint's.
    """
    notes: list[str] = []
    base = scheme or PAPER_SCHEME
    bits = config.bits if config.bits is not None else base.bits
    group = config.group if config.group is not None else base.group_size
    if scheme is not None and (bits, group) != (scheme.bits, scheme.group_size):
        raise InputError(
            f"bits {bits} and group {group} were asked for, but the checkpoint is {scheme} and E2E-QP keeps that; "
            "leave --bits and --group out, or start from full precision"
        )
    if scheme is not None and config.overrides:
        raise InputError(
            f"overrides were asked for, but the checkpoint is {scheme} already and E2E-QP keeps every layer's scheme; "
            "leave them out, or start from full precision"
        )
    lr = 2e-5 if bits <= 2 else 1e-5
    seq_len_notes = notes if config.stage in ("all", "block-ap") or config.eval_data is not None else []
    e2e_notes = notes if config.stage != "block-ap" else []
    filled = replace(
        config,
        bits=bits,
        group=group,
        scale_dtype=config.scale_dtype or scale_dtype,
        seq_len=context_window("seq_len", config.seq_len, context, seq_len_notes),
        e2e_seq_len=context_window("e2e_seq_len", config.e2e_seq_len, context, e2e_notes),
        lr_weight=lr if config.lr_weight is None else config.lr_weight,
        lr_e2e=lr if config.lr_e2e is None else config.lr_e2e,
    )
    return filled, notes


def context_window(name: str, chosen: int | None, context: int | None, notes: list[str]) -> int:
    """A sequence length within the model's context.

    Args:
        name: ``seq_len`` or ``e2e_seq_len``.
        chosen: the user's; None takes the paper's, or the context if that is shorter.
        context: tokens the model can attend to; None if unknown.
        notes: is told when the paper's is cut.

    Raises:
        InputError: the user's is longer than the context.
    """
    option, paper = option_name(name), PAPER_SEQ_LEN[name]
    if chosen is not None:
        if context is not None and chosen > context:
            raise InputError(f"{option} is {chosen}; the model's context is {context} tokens, give {context} at most")
        return chosen
    if context is not None and context < paper:
        notes.append(f"{option} is {context}, the model's context (the paper's is {paper})")
        return context
    return paper


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{where} holds a {type(values).__name__}; expected lines of name: value")
    for name in values:
        if name not in _FIELDS:
            near = difflib.get_close_matches(str(name).replace("-", "_"), _FIELDS, n=1, cutoff=0)
            raise InputError(f"{where}: unknown name {name!r}; the nearest is {near[0]!r}")
    return {name: _checked(name, value, f"{where}: {name}") for name, value in values.items() if value is not None}


def _checked(name: str, value: Any, label: str) -> Any:
    if name == "overrides":
        return parse_overrides(value, label)
    kind = _kind(name)
    rule = _FIELDS[name].metadata
    if kind is float and not isinstance(value, bool):
        value = _as_float(value)  # YAML reads 2e-5, without a point, as a string
    elif kind is str and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # shard_size: 500000000
    _check_kind(value, kind, label)
    if rule["choices"] is not None and value not in rule["choices"]:
        raise InputError(f"{label} is {value!r}; allowed are {', '.join(map(str, rule['choices']))}")
    if rule["least"] is not None and not value >= rule["least"]:
        raise InputError(f"{label} is {value!r}; allowed are numbers from {rule['least']}")
    if rule["above"] is not None and not value > rule["above"]:
        raise InputError(f"{label} is {value!r}; allowed are numbers above {rule['above']}")
    if kind is float and math.isinf(value) and name not in _MAY_BE_INFINITE:
        raise InputError(f"{label} is {value!r}; allowed are finite numbers")
    if kind is str and not value.strip() and name not in _MAY_BE_EMPTY:
        raise InputError(f"{label} is empty; give a value or leave it out")
    if name == "seed" and value > LARGEST_SEED:
        raise InputError(f"{label} is {value!r}; allowed are integers from 0 to 2**62")
    if name == "group" and value < 1 and value != -1:
        raise InputError(f"{label} is {value!r}; allowed are -1 (one group a row) and positive integers, e.g. 64")
    if name in ("warmup_ratio", "distill") and value > 1:
        raise InputError(f"{label} is {value!r}; allowed are numbers from 0 to 1")
    return value


def _typed(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern, value in map(split_override, lines):
        found.pop(pattern, None)  # said again, it comes last
        found[pattern] = value
    return found


def _check_kind(value: object, kind: type, label: str) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
        raise InputError(f"{label} is {value!r}; expected {words[kind]}")


def _as_float(value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return value if math.isnan(number) else number


def _kind(name: str) -> type:
    hint = get_type_hints(TrainConfig)[name]
    if isinstance(hint, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint
