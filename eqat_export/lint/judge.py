"""Rules applied to facts: what is broken, the verdict in one sentence, and the way out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqat_export.diagnosis.survey import Survey
from eqat_export.findings import Finding, error, note, warning
from formats import available_formats, get_format
from formats.base import Format
from formats.errors import EqatError
from formats.model import Checkpoint

from .facts import Facts, facts_of
from .rules import Engine, Rule
from .written import as_written, split_route

__all__ = ["Broken", "Verdict", "broken_rules", "judge"]

_WRONG = ("refused", "misread")


@dataclass(frozen=True)
class Broken:
    """A rule that a checkpoint breaks.

    Attributes:
        rule: the rule.
        where: the first layer that breaks it, empty where the whole model does.
        layers: how many layers do.
        text: what the rule says, with this layer's values.
    """

    rule: Rule
    where: str
    layers: int
    text: str


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a checkpoint.

    Attributes:
        engine: its id.
        version: at which its rules were read.
        loads, right: whether it loads the checkpoint, and computes what the checkpoint holds.
        broken: rules that are broken, worst first.
        remedy: a command that writes what the engine reads right; None where none is needed or known.
        text: one sentence.
    """

    engine: str
    version: str
    loads: bool
    right: bool
    broken: tuple[Broken, ...]
    remedy: str | None
    text: str

    @property
    def good(self) -> bool:
        """True when it loads and is right, perhaps with an argument."""
        return self.loads and self.right

    def findings(self) -> list[Finding]:
        """The broken rules, for the list of findings; of the one that the verdict tells, where it stands."""
        tell = {"refused": error, "misread": error, "argument": warning, "cost": note}
        found = []
        for item in self.broken:
            told = item is self.broken[0] and item.rule.effect != "cost"
            text = f"rule {item.rule.id}" if told else f"{item.text}; rule {item.rule.id}"
            found.append(tell[item.rule.effect](self.engine, f"{text}, read in {item.rule.source}"))
        return found

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            "engine": self.engine,
            "version": self.version,
            "loads": self.loads,
            "right": self.right,
            "verdict": self.text,
            "remedy": self.remedy,
            "rules": [
                {
                    "id": item.rule.id,
                    "effect": item.rule.effect,
                    "text": item.text,
                    "source": item.rule.source,
                    "where": item.where,
                    "layers": item.layers,
                }
                for item in self.broken
            ],
        }


def judge(engine: Engine, checkpoint: Checkpoint, survey: Survey, findings: Sequence[Finding]) -> Verdict:
    """What an engine makes of a checkpoint that was verified.

    A damaged checkpoint is not judged. A label that contradicts the zeros is no damage here: what comes of it is the
    engine's affair.

    Args:
        engine: whose rules.
        checkpoint: open.
        survey: what ``verify_checkpoint`` filled.
        findings: what it returned.
    """
    if any(item.severity == "error" and item.where != "qzeros" for item in findings):
        text = f"{engine.id} {engine.version} is not judged: the checkpoint is damaged"
        return Verdict(engine.id, engine.version, False, False, (), None, text)
    facts = facts_of(checkpoint, survey)
    broken = broken_rules(engine, facts)
    loads = all(item.rule.effect != "refused" for item in broken)
    right = loads and all(item.rule.effect != "misread" for item in broken)
    remedy = None if right else _remedy(engine, checkpoint, survey, facts, broken)
    return Verdict(engine.id, engine.version, loads, right, broken, remedy, _sentence(engine, broken, remedy))


def broken_rules(engine: Engine, facts: Mapping[str, Facts]) -> tuple[Broken, ...]:
    """The rules that any layer breaks, worst first."""
    first = next(iter(facts.values()))
    if first["format"] not in engine.reads and not any(first["format"] in rule.formats for rule in engine.rules):
        reads = ", ".join(engine.reads)
        rule = Rule("format", (str(first["format"]),), "refused", f"reads {reads}, not {{format}}", engine.sources)
        return (_broken(rule, [""], facts),)
    found = []
    for rule in engine.rules:
        layers = [name for name, layer in facts.items() if rule.broken_by(layer)]
        if layers:
            found.append(_broken(rule, layers, facts))
    order = ("refused", "misread", "argument", "cost")
    return tuple(sorted(found, key=lambda item: order.index(item.rule.effect)))


def _broken(rule: Rule, layers: list[str], facts: Mapping[str, Facts]) -> Broken:
    values = facts.get(layers[0]) or next(iter(facts.values()))
    text = rule.says.format_map({**values, "format": values["format"]})
    everywhere = len(layers) == len(facts) or not layers[0]
    if everywhere:
        return Broken(rule, "", len(layers), text)
    return Broken(rule, layers[0], len(layers), f"{text} (in {len(layers)} of {len(facts)} layers, e.g. {layers[0]})")


def _sentence(engine: Engine, broken: tuple[Broken, ...], remedy: str | None) -> str:
    name = f"{engine.id} {engine.version}"
    worst = broken[0] if broken else None
    if worst is None or worst.rule.effect == "cost":
        return f"{name} loads it and reads it right"
    if worst.rule.effect == "argument":
        return f"{name} loads it and reads it right with an argument: {worst.text}"
    verb = "does not load it" if worst.rule.effect == "refused" else "loads it and computes something else"
    return f"{name} {verb}: {worst.text}" + (f"; use: {remedy}" if remedy else "")


def _remedy(
    engine: Engine, checkpoint: Checkpoint, survey: Survey, facts: Mapping[str, Facts], broken: tuple[Broken, ...]
) -> str | None:
    """The first route whose format holds every layer and that the engine then reads right."""
    if checkpoint.format is None:
        return None
    wrong = next(item.rule for item in broken if item.rule.effect in _WRONG)
    for route in wrong.routes or engine.routes:
        target, options = split_route(route)
        if target not in available_formats() or not _holds(get_format(target, **options), checkpoint):
            continue
        exported = broken_rules(engine, as_written(facts, route))
        if all(item.rule.effect not in _WRONG for item in exported):
            source = f" --from {survey.zeros.follows}" if survey.zeros is not None and survey.zeros.contradicted else ""
            return f"eqat export {shlex.quote(str(_path(checkpoint)))}{source} --to {route}"
    return None


def _holds(form: Format, checkpoint: Checkpoint) -> bool:
    try:
        for name in checkpoint.layer_names:
            form.check(checkpoint.layer_scheme(name), *checkpoint.layer_features(name))
    except EqatError:
        return False
    return True


def _path(checkpoint: Checkpoint) -> Path:
    return checkpoint.reader.folder
