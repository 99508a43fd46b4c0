"""What the commands of ``cli.py`` do once their heavy imports are wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from eqat_export import report
from eqat_export.compare import CheckpointComparison, compare_checkpoints
from eqat_export.console import mark, progress, remarks, results
from eqat_export.convert import convert
from eqat_export.diagnosis.survey import Survey
from eqat_export.findings import Finding, error, failed, warning
from eqat_export.format_options import read_options
from eqat_export.format_table import format_rows
from eqat_export.inspect import inspect_checkpoint
from eqat_export.lint import get_engine
from eqat_export.lint.judge import Verdict, judge
from eqat_export.memory import keep_freed_memory
from eqat_export.parallel.ranks import find_group, serve_rank
from eqat_export.runtime_check import RuntimeResult, check_runtime
from eqat_export.runtimes import get_runtime
from eqat_export.verify import verify_checkpoint
from formats import get_format_class, history
from formats.errors import InputError
from formats.model import Checkpoint, open_checkpoint
from formats.sizes import parse_size

__all__ = ["export_command", "formats_command", "inspect_command", "verify_command"]


def export_command(
    checkpoint: Path | None,
    to: str,
    *,
    out: Path | None,
    source_format: str | None,
    options: Sequence[tuple[str, str | None]],
    shard_size: str,
    workers: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """``eqat export``; of several ranks, what rank 0 does, and its part of the work for every other."""
    group = find_group()
    if group is not None and group.rank:
        serve_rank(group)
        return
    silent = quiet or as_json
    chosen, size = read_options(options, to), parse_size(shard_size)
    if checkpoint is None:
        checkpoint = history.last_native()
        if checkpoint is None:
            raise InputError("no native checkpoint was made in this directory; name one, or make one with eqat train")
        if not silent:
            remarks().print(f"exporting {checkpoint}, the last native checkpoint made here", soft_wrap=True)
    suffix = get_format_class(to).suffix
    if out is not None and suffix and out.suffix != suffix:
        raise InputError(f"--out is {out}; {to} is one file, named *{suffix}")
    out = out if out is not None else _beside(checkpoint, to)
    keep_freed_memory()
    with ExitStack() as stack:

        def start(total: int) -> Callable[[str], None]:
            return stack.enter_context(progress(f"exporting to {to}", total, quiet=silent))

        conversion = convert(
            checkpoint,
            out,
            to,
            source_format=source_format,
            options=chosen,
            shard_size=size,
            force=force,
            workers=workers,
            group=group,
            start=start,
        )
    found_again = _remember(conversion.out, checkpoint, to)
    if as_json:
        _print_json(conversion.as_json())
    elif not quiet:
        report.show_conversion(conversion, results())
        print(f"next: {report.next_command(conversion, found_again)}")


def verify_command(
    checkpoint: Path | None,
    *,
    against: Path | None,
    runtime: str | None,
    engine: str | None,
    source_format: str | None,
    as_json: bool,
    quiet: bool,
) -> bool:
    """``eqat verify``; False when anything is wrong or different."""
    pairs = [(checkpoint, against)] if checkpoint is not None else _last_exports(against)
    documents = [
        _verify_one(
            path,
            truth,
            asked=checkpoint is not None,
            runtime=runtime,
            engine=engine,
            source_format=source_format,
            as_json=as_json,
            quiet=quiet,
        )
        for path, truth in pairs
    ]
    if as_json:
        _print_json(documents[0] if checkpoint is not None else {"checkpoints": documents})
    return all(document["ok"] for document in documents)


def inspect_command(checkpoint: Path, *, layer: str | None, source_format: str | None, as_json: bool) -> None:
    """``eqat inspect``."""
    with open_checkpoint(checkpoint, source_format) as opened:
        total = 1 if layer else len(opened.layer_names)
        with progress("reading", total, quiet=as_json) as step:
            inspection = inspect_checkpoint(opened, layer, step)
    if as_json:
        _print_json(inspection.as_json())
    else:
        report.show_inspection(inspection, results())


def formats_command(name: str | None, as_json: bool) -> None:
    """``eqat formats``."""
    rows = format_rows(name)
    if as_json:
        _print_json({"formats": [row.as_json() for row in rows]})
    else:
        report.show_formats(rows, results())
    if name and not as_json:
        report.show_options(rows[0], results())


def _verify_one(
    path: Path,
    truth: Path | None,
    *,
    asked: bool,
    runtime: str | None,
    engine: str | None,
    source_format: str | None,
    as_json: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Verifies one checkpoint, shows the result, and returns it as JSON values.

    A runtime that does not read a checkpoint asked for by name is an error; among the last exports it is skipped.
    """
    silent = quiet or as_json
    reader = get_runtime(runtime) if runtime else None
    rules = get_engine(engine) if engine else None
    survey = Survey()
    comparison: CheckpointComparison | None = None
    outcome: RuntimeResult | None = None
    with open_checkpoint(path, source_format) as checkpoint, ExitStack() as stack:
        stored = checkpoint.format.id if checkpoint.format else None
        unread = reader is not None and not asked and stored not in reader.formats
        if reader is not None and not unread:
            reader.check(stored)
        other = stack.enter_context(open_checkpoint(truth)) if truth is not None else None
        with _bar("checking", checkpoint, silent) as step:
            findings = verify_checkpoint(checkpoint, step, survey)
        broken = failed(findings)
        verdict = judge(rules, checkpoint, survey, findings) if rules is not None else None
        if other is not None and not broken:
            with _bar("comparing", checkpoint, silent) as step:
                comparison = compare_checkpoints(checkpoint, other, step)
            findings += comparison.findings
        if reader is not None and unread:
            findings.append(warning(reader.id, f"does not read {stored or 'dense'}, so it was not run"))
        elif reader is not None and not broken:
            if not silent:
                remarks().print(f"running it in {reader.id}", soft_wrap=True)
            outcome = check_runtime(checkpoint, reader)
            if outcome.refusal:
                findings.append(error(reader.id, f"does not load it: {outcome.refusal}"))
            elif not outcome.ok:
                findings.append(error(reader.id, "computes something else than the dequantized weights give"))
        layers = len(checkpoint.layer_names)
        scheme = str(checkpoint.scheme) if checkpoint.scheme else "full precision"
        form = checkpoint.format.id if checkpoint.format else "dense"
    sound = not failed(findings) and (comparison is None or all(row.ok for row in comparison.rows))
    good = sound and (verdict is None or verdict.good)
    findings += verdict.findings() if verdict is not None else []
    if not silent or (quiet and not good):
        what = f"{path}: {form}, {layers} layers, {scheme}"
        if quiet:
            _show_failure(what, sound, findings, verdict)
        else:
            _show_verification(what, sound, findings, comparison, outcome, verdict)
    return {
        "checkpoint": str(path),
        "ok": good,
        "format": form,
        "layers": layers,
        "scheme": scheme,
        "findings": [vars(finding) for finding in findings],
        "comparison": comparison.as_json() if comparison else None,
        "runtime": outcome.as_json() if outcome else None,
        "engine": verdict.as_json() if verdict else None,
    }


def _show_verification(
    what: str,
    good: bool,
    findings: list[Finding],
    comparison: CheckpointComparison | None,
    outcome: RuntimeResult | None,
    engine: Verdict | None,
) -> None:
    console = results()
    proofs = ["sound"]
    if comparison is not None:
        proofs.append(f"{_relation(comparison)} {comparison.against}")
    if outcome is not None:
        proofs.append(f"runs in {outcome.runtime}")
    verdict = ", ".join(proofs) if good else "verification FAILED"
    console.print(f"{mark(good, console)} {report.escape(f'{what}: {verdict}')}", soft_wrap=True)
    if engine is not None:
        console.print(f"{mark(engine.good, console)} {report.escape(engine.text)}", soft_wrap=True)
    report.show_findings(findings, console)
    if comparison is not None:
        report.show_comparison(comparison, console)
    if outcome is not None:
        report.show_runtime(outcome, console)


def _show_failure(what: str, sound: bool, findings: list[Finding], engine: Verdict | None) -> None:
    """All that ``--quiet`` lets through."""
    console = remarks()
    if not sound:
        console.print(f"{mark(False, console)} {report.escape(what)}: verification FAILED", soft_wrap=True)
    if engine is not None and not engine.good:
        console.print(f"{mark(False, console)} {report.escape(engine.text)}", soft_wrap=True)
    report.show_findings([finding for finding in findings if finding.severity == "error"], console)


def _relation(comparison: CheckpointComparison) -> str:
    if comparison.informational:
        return "compared with"
    return "equals" if comparison.exact else "within the declared rounding of"


def _last_exports(against: Path | None) -> list[tuple[Path, Path | None]]:
    exports = history.last_exports()
    if not exports:
        native = history.last_native()
        fix = f"make one with eqat export {native} --to gptq" if native else "name a checkpoint"
        raise InputError(f"nothing was exported in this directory yet; {fix}")
    return [(path, against or history.source_of(path)) for path in exports]


def _beside(checkpoint: Path, to: str) -> Path:
    """The output's name where none is given; ``.`` and ``..`` have no name of their own."""
    suffix = get_format_class(to).suffix
    named = checkpoint if checkpoint.name not in ("", "..") else checkpoint.resolve()
    name = named.resolve().name if checkpoint.is_dir() else named.stem  # a file leaves its own suffix behind
    ending = suffix or f"-{to}"
    return named.with_name(f"{name}{ending}") if named.name else named / f"checkpoint{ending}"


def _remember(out: Path, source: Path, to: str) -> bool:
    """Records an export; True when ``eqat verify`` without arguments will find it."""
    try:
        history.record("export", out, source=source, format=to)
    except OSError as exc:
        remarks().print(
            f"warning: {exc.filename} cannot be written ({exc.strerror}); eqat verify will need arguments",
            soft_wrap=True,
        )
        return False
    return out.resolve() in [path.resolve() for path in history.last_exports()]


def _bar(title: str, checkpoint: Checkpoint, silent: bool) -> AbstractContextManager[Callable[[str], None]]:
    return progress(title, len(checkpoint.layer_names), quiet=silent)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))
