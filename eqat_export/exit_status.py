"""How the command ends: exit codes and one-line errors.

    0    good
    1    verification found a defect or a difference
    2    bad input or usage, an unreadable checkpoint, an I/O error such as a full disk
    70   a bug in eqat (an exception nobody expected)
    130  interrupted with Ctrl-C; 143 when terminated; 141 when the reader of stdout went away

Typer's own exceptions (usage errors, ``typer.Exit``) carry their exit code and are recognised by it: the classes
themselves come from click or from typer's copy of it, depending on typer's version.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType, TracebackType

__all__ = ["BAD_INPUT", "BROKEN_PIPE", "BUG", "DIFFERENCE", "GOOD", "INTERRUPTED", "ErrorBoundary", "exit_on_sigterm"]

GOOD = 0
DIFFERENCE = 1
BAD_INPUT = 2
BUG = 70
INTERRUPTED = 130
BROKEN_PIPE = 141


class ErrorBoundary:
    """Context manager that turns every exception into ``code`` and one line on stderr.

    Args:
        debug: print tracebacks too.
    """

    def __init__(self, debug: bool = False) -> None:
        self.debug = debug
        self.code = GOOD

    def __enter__(self) -> ErrorBoundary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        if isinstance(error, SystemExit):
            self.code = error.code if isinstance(error.code, int) else BAD_INPUT
            return True
        if isinstance(error, BrokenPipeError):
            # nobody reads stdout any more: the interpreter's last flush must not complain either
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.code = BROKEN_PIPE
            return True
        self.code, line = classify(error)
        if self.debug and line:
            traceback.print_exception(error)
        if line:
            print(line, file=sys.stderr, flush=True)
        return True


def classify(error: BaseException) -> tuple[int, str]:
    """Exit code of an exception, and the line for the user (empty when there is nothing to say)."""
    known = sys.modules.get("formats.errors")  # not imported yet: nobody can have raised one
    if known is not None and isinstance(error, known.EqatError):
        return BAD_INPUT, f"error: {one_line(str(error))}"
    if hasattr(error, "exit_code"):
        return _typer_exit(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "error: interrupted; no partial output is left behind"
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return BAD_INPUT, f"error: {one_line((error.strerror or str(error)) + where)}"
    if isinstance(error, MemoryError):
        return BAD_INPUT, "error: out of memory"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return BUG, f"error: unexpected {one_line(text)} (a bug in eqat; run with --debug for the traceback)"


def _typer_exit(error: BaseException) -> tuple[int, str]:
    code = int(getattr(error, "exit_code", BAD_INPUT))
    if not hasattr(error, "format_message"):
        return code, ""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "eqat"
    return code, f"error: {one_line(error.format_message())} (see {path} --help)"


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks included, as one space."""
    return " ".join(text.split())


def exit_on_sigterm() -> None:
    """Lets SIGTERM unwind the stack, so that temporary output is removed as it is on Ctrl-C."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, unwind)
