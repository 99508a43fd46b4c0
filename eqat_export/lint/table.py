"""The tables of ``docs/runtimes.md``, from the rules alone.

``python -m eqat_export.lint.table`` prints them; with ``--write PAGE`` they replace what stands below the page's mark.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from . import ENGINES, get_engine
from .judge import broken_rules
from .rules import Engine, Rule, Value
from .written import BITS, WRITTEN, as_written

__all__ = ["tables"]

_BITS = (2, 3, 4, 8)
_SIZE, _GROUP = 4096, 128  # a layer that no rule about shapes or groups minds
_FORMATS = ("dense", *WRITTEN)
_MARK = "<!-- made -->\n"


def tables() -> str:
    """Markdown: what each engine makes of eqat's exports, then every rule."""
    return "\n".join([*_matrix(), "", *_rules()]) + "\n"


def _matrix() -> Iterator[str]:
    engines = [get_engine(engine_id) for engine_id in ENGINES]
    yield "| format | " + " | ".join(f"{engine.id} {engine.version}" for engine in engines) + " |"
    yield "|---" * (len(engines) + 1) + "|"
    for form in _FORMATS:
        yield f"| {form} | " + " | ".join(_cell(engine, form) for engine in engines) + " |"
    yield "| **export to** | " + " | ".join(", ".join(engine.routes) for engine in engines) + " |"


def _cell(engine: Engine, form: str) -> str:
    """Bits that are loaded and read right, without zero-points in brackets where only symmetric layers are."""
    if form == "dense":
        return "yes" if _outcome(engine, form, 4, sym=False) in ("right", "argument") else "-"
    parts = []
    for bits in BITS.get(form, _BITS):
        any_zeros, symmetric = (_outcome(engine, form, bits, sym=sym) for sym in (False, True))
        if any_zeros in ("right", "argument"):
            parts.append(f"{bits}" + ("\\*" if any_zeros == "argument" else ""))
        elif symmetric in ("right", "argument"):
            parts.append(f"({bits})" + ("\\*" if symmetric == "argument" else ""))
    if parts:
        return " ".join(parts)
    wrong = {_outcome(engine, form, bits, sym=False) for bits in BITS.get(form, _BITS)}
    return "**wrong**" if "misread" in wrong else "-"


def _outcome(engine: Engine, form: str, bits: int, *, sym: bool) -> str:
    layer: dict[str, Value] = {
        "format": "native",
        "tokenizer": True,
        "kept": False,
        "bits": bits,
        "group_size": _GROUP,
        "sym": sym,
        "symmetric": sym,
        "in_features": _SIZE,
        "out_features": _SIZE,
        "in_bits": _SIZE * bits,
        "out_bits": _SIZE * bits,
        "grouped": True,
        "whole_groups": True,
        "fused": True,
        "fused_out": _SIZE,
        "fused_bits": _SIZE * bits,
        "override": False,
        "fused_override": False,
        "fused_alike": True,
        "head": False,
        "expert": False,
    }
    effects = {item.rule.effect for item in broken_rules(engine, as_written({"layer": layer}, form))}
    return next((effect for effect in ("refused", "misread", "argument") if effect in effects), "right")


def _rules() -> Iterator[str]:
    for engine_id in ENGINES:
        engine = get_engine(engine_id)
        yield f"### {engine.id} {engine.version}"
        yield ""
        yield f"Read in {engine.sources}."
        yield ""
        yield "| rule | formats | broken | what it does | where |"
        yield "|---|---|---|---|---|"
        for rule in engine.rules:
            yield f"| {rule.id} | {', '.join(rule.formats)} | {rule.effect} | {_text(rule)} | {rule.source} |"
        yield ""


def _text(rule: Rule) -> str:
    """What a rule says, with the names of facts where a layer's values would stand."""
    return rule.says.replace("|", "\\|")


def write(page: Path) -> None:
    """Puts the tables below the mark of a page."""
    head, mark, _ = page.read_text(encoding="utf-8").partition(_MARK)
    page.write_text(f"{head}{mark}\n{tables()}", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]))
    else:
        print(tables(), end="")
