"""Layers that look as if they came from two exports."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from eqat_export.diagnosis.survey import Survey
from eqat_export.findings import Finding, error, warning
from formats.model import Checkpoint

__all__ = ["check_mixtures"]


def check_mixtures(checkpoint: Checkpoint, survey: Survey) -> Iterator[Finding]:
    """Properties that are one throughout a sound export and differ between layers here."""
    files = {name: values.file for name, values in survey.layers.items()}
    yield from _differing("scales", {name: values.scale_dtype for name, values in survey.layers.items()}, files)
    if checkpoint.format is not None and "g_idx" in checkpoint.format.local_names:
        stored = {
            name: "with g_idx" if f"{name}.g_idx" in checkpoint.reader.tensors else "without g_idx" for name in files
        }
        yield from _differing("layers", stored, files)
    if survey.zeros is not None and len(set(survey.zeros.by_file.values())) > 1:
        said = ", ".join(f"{follows} in {file}" for file, follows in survey.zeros.by_file.items())
        yield error("qzeros", f"follow {said}: shards of two exports; export the model again in one piece")


def _differing(what: str, values: Mapping[str, str], files: Mapping[str, str]) -> Iterator[Finding]:
    counts = Counter(values.values())
    if len(counts) < 2:
        return
    by_file = defaultdict(set)
    for name, value in values.items():
        by_file[files[name]].add(value)
    if all(len(found) == 1 for found in by_file.values()):
        said = ", ".join(f"{next(iter(found))} in {file}" for file, found in by_file.items())
        yield error(what, f"are {said}: shards of two exports; export the model again in one piece")
        return
    rare, few = counts.most_common()[-1]
    usual, many = counts.most_common()[0]
    example = next(name for name, value in values.items() if value == rare)
    yield warning(what, f"are {usual} in {many} layers and {rare} in {few}, e.g. {example}; one export writes one kind")
