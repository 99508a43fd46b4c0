"""Settings of single layers: patterns over module paths, and what each says of the layers that it matches.

A pattern is a shell glob over the whole path (``*.down_proj``, ``model.layers.[0-3].*``); its value is ``skip`` (the
layer stays as it is), ``w4g128``, ``w4`` (the model's group size) or ``g128`` (the model's bits). Where several
patterns match a layer, the last one holds. The output head is quantized only where its
path is written in full (``lm_head=w8g128``).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

from formats.errors import InputError
from formats.types import QuantScheme

__all__ = ["choose_schemes", "describe_overrides", "override_scheme", "parse_overrides", "split_override"]

SKIP = "skip"
NOTHING: Mapping[str, str] = MappingProxyType({})
_BITS = (2, 3, 4, 8)
_SCHEME = re.compile(r"(?:w(?P<bits>\d+))?(?:g(?P<group>-1|\d+))?")


def split_override(text: str) -> tuple[str, str]:
    """Pattern and value of ``PATTERN=VALUE``, as typed on the command line.

    Raises:
        InputError: there is no ``=``, or nothing before it.
    """
    pattern, equals, value = text.rpartition("=")
    if not equals or not pattern.strip():
        raise InputError(f"--override is {text!r}; expected PATTERN=VALUE, e.g. --override '*.down_proj=w4g128'")
    return pattern.strip(), value.strip()


def parse_overrides(values: object, label: str) -> dict[str, str]:
    """Checked overrides: pattern -> value.

    Args:
        values: what a YAML file or the command line holds.
        label: what to call it in errors.

    Raises:
        InputError: not an object of patterns and values, or a value that says nothing known.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{label} is {values!r}; expected lines of pattern: value, e.g. '*.down_proj': w4g128")
    for pattern, value in values.items():
        if not isinstance(pattern, str) or not pattern.strip():
            raise InputError(f"{label} has the pattern {pattern!r}; expected a path like '*.down_proj'")
        if not isinstance(value, str) or (value != SKIP and not _means(value)):
            raise InputError(
                f"{label}: {pattern} is {value!r}; allowed are {SKIP}, or bits ({', '.join(map(str, _BITS))}) and "
                "group size like w4g128, w4, g128 or w4g-1"
            )
    return dict(values)


def override_scheme(value: str, scheme: QuantScheme) -> QuantScheme | None:
    """What a checked value makes of the model-wide scheme; None where the layer is not quantized."""
    if value == SKIP:
        return None
    found = _SCHEME.fullmatch(value)
    if found is None:
        raise ValueError(f"the override {value!r} was not checked")
    bits, group = found["bits"], found["group"]
    return QuantScheme(int(bits) if bits else scheme.bits, int(group) if group else scheme.group_size)


def choose_schemes(
    names: Collection[str],
    scheme: QuantScheme,
    overrides: Mapping[str, str],
    *,
    head: str | None = None,
    outside: Mapping[str, str] = NOTHING,
) -> dict[str, QuantScheme | None]:
    """The scheme of every layer, None where it stays in full precision.

    Args:
        names: module paths of the layers that can be quantized.
        scheme: the model-wide scheme.
        overrides: pattern -> value, checked.
        head: module path of an output head that has its own weight. It is chosen where a pattern is that very path.
        outside: other linear, which is never quantized -> why.

    Raises:
        InputError: a pattern matches no layer, or none is left to quantize.
    """
    chosen: dict[str, QuantScheme | None] = dict.fromkeys(names, scheme)
    for pattern, value in overrides.items():
        if pattern == head:
            chosen[head] = override_scheme(value, scheme)
            continue
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise InputError(_unmatched(pattern, names, head, outside))
        chosen.update(dict.fromkeys(matched, override_scheme(value, scheme)))
    if all(chosen[name] is None for name in names):
        raise InputError(f"the overrides skip every one of {len(chosen)} layers; nothing is left to quantize")
    return chosen


def describe_overrides(chosen: Mapping[str, QuantScheme | None], scheme: QuantScheme) -> str:
    """One line on the layers that differ from the model-wide scheme; empty where none does."""
    counts = Counter(found for found in chosen.values() if found != scheme)
    parts = [f"{count} in full precision" if found is None else f"{count} {found}" for found, count in counts.items()]
    return f"of {len(chosen)} layers, {', '.join(parts)}, the others {scheme}" if parts else ""


def _unmatched(pattern: str, names: Iterable[str], head: str | None, outside: Mapping[str, str]) -> str:
    if head is not None and fnmatchcase(head, pattern):
        return f"override {pattern!r} matches only the output head, which is quantized where it is named: {head}"
    kept = next((name for name in outside if fnmatchcase(name, pattern)), None)
    if kept is not None:
        return f"override {pattern!r}: {kept} {outside[kept]} and always stays in full precision"
    # "*.down_proj" is offered as well as whole paths
    known = dict.fromkeys([*(f"*.{name.rpartition('.')[2]}" for name in names), *names])
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0)
    return f"override {pattern!r} matches no layer; the nearest are {', '.join(near)}"


def _means(value: str) -> bool:
    found = _SCHEME.fullmatch(value)
    if found is None or not value:
        return False
    bits, group = found["bits"], found["group"]
    return (bits is None or int(bits) in _BITS) and (group is None or int(group) != 0)
