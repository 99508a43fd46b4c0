"""What a rule is.

A rule speaks of some formats. Where ``when`` holds it demands ``needs``; both name facts (``facts.py`` lists them) and
what they may be. A fact that is not known neither limits a rule nor breaks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Condition", "Effect", "Engine", "Multiple", "Rule", "Value", "holds"]

Value = str | int | bool
Effect = Literal["refused", "misread", "argument", "cost"]


@dataclass(frozen=True)
class Multiple:
    """An integer that is a multiple of ``of``."""

    of: int


Condition = tuple[Value, ...] | Multiple


@dataclass(frozen=True)
class Rule:
    """One demand of an engine.

    Attributes:
        id: unique within the engine.
        formats: ids of the formats it speaks about; ``dense`` is a full-precision checkpoint.
        effect: of breaking it: ``refused`` will not load, ``misread`` loads and computes something else, ``argument``
            loads and is right with an argument, ``cost`` is right but rounded, slower or in need of something.
        says: what the engine does; ``{fact}`` shows a value of the layer that breaks the rule.
        source: where the engine does it: file of the version named in the engine, or issue or pull request.
        when: fact -> condition; the rule speaks only where all hold.
        needs: alternatives, of which one must hold; none at all is never met.
        routes: formats to export to, best first; empty for the engine's own.
    """

    id: str
    formats: tuple[str, ...]
    effect: Effect
    says: str
    source: str
    when: Mapping[str, Condition] = field(default_factory=dict)
    needs: tuple[Mapping[str, Condition], ...] = ()
    routes: tuple[str, ...] = ()

    def broken_by(self, facts: Mapping[str, Value]) -> bool:
        """True when the rule speaks about these facts and they do not meet it."""
        if facts["format"] not in self.formats or not all(name in facts for name in self.when):
            return False
        return holds(self.when, facts) and not any(holds(needed, facts) for needed in self.needs)


@dataclass(frozen=True)
class Engine:
    """An engine's rules.

    Attributes:
        id: the name users type.
        version: at which its sources were read.
        reads: formats it reads at all; any other is refused.
        routes: formats to export to for it, best first.
        rules: in any order.
        sources: repository or package of the files that rules name.
    """

    id: str
    version: str
    sources: str
    reads: tuple[str, ...]
    routes: tuple[str, ...]
    rules: tuple[Rule, ...] = field(default=())


def holds(conditions: Mapping[str, Condition], facts: Mapping[str, Value]) -> bool:
    """True when every condition whose fact is known is met."""
    return all(_meets(facts[name], condition) for name, condition in conditions.items() if name in facts)


def _meets(value: Value, condition: Condition) -> bool:
    if isinstance(condition, Multiple):
        return isinstance(value, int) and value % condition.of == 0
    return value in condition
