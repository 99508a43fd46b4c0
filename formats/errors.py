"""Every error eqat raises on purpose.

    EqatError                      one line for the user; exit code 2
    ├── InvalidLayerError          a QuantizedLinear whose tensors contradict each other (also a ValueError)
    ├── UnsupportedSchemeError     a format cannot hold this bits / group_size / shape
    ├── UnknownFormatError         no such format, or none recognised in a folder
    ├── CheckpointError            a checkpoint folder that is missing, truncated or inconsistent
    ├── OutputExistsError          the output is already there and --force was not given
    ├── InputError                 a bad argument, option or data file
    ├── MissingExtraError          an optional package is not installed
    └── TrainingDivergedError      the loss became NaN or infinite

A message states the value, what is allowed and the fix, in one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = [
    "CheckpointError",
    "EqatError",
    "InputError",
    "InvalidLayerError",
    "MissingExtraError",
    "OutputExistsError",
    "TrainingDivergedError",
    "UnknownFormatError",
    "UnsupportedSchemeError",
]


class EqatError(Exception):
    """Base of every error raised on purpose; its text is one line meant for the user."""


class InvalidLayerError(EqatError, ValueError):
    """Codes, zeros, scales, bias or g_idx out of range, or of the wrong shape or dtype."""


class UnsupportedSchemeError(EqatError, ValueError):
    """A format cannot hold the scheme or the shape; the text names what would work.

    Args:
        reason: what is not held, and what else the same format takes.
        instead: ids of formats that hold it; of a whole checkpoint only some of them may.
    """

    def __init__(self, reason: str, *, instead: Iterable[str] = ()) -> None:
        self.reason = reason
        self.instead = tuple(instead)
        ways = " or ".join(f"--to {name}" for name in self.instead)
        super().__init__(f"{reason}; use {ways}" if ways else reason)

    def at(self, place: str) -> UnsupportedSchemeError:
        """The same, saying where."""
        return UnsupportedSchemeError(f"{place}: {self.reason}", instead=self.instead)


class UnknownFormatError(EqatError, ValueError):
    """The format id is not registered, or no registered format recognises the checkpoint."""


class CheckpointError(EqatError):
    """A checkpoint folder that is missing something, truncated, or contradicts itself."""


class OutputExistsError(EqatError):
    """The output path exists; nothing was written."""


class InputError(EqatError, ValueError):
    """An argument, option, configuration or data file that cannot be used."""


class MissingExtraError(EqatError, ImportError):
    """An optional package is needed; the text gives the pip command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install '{_eqat()}[{extra}]'")


def _eqat() -> str:
    """What pip calls this eqat: the folder that it runs in or was installed from, else its name."""
    source = Path(__file__).resolve().parent.parent
    if not (source / "pyproject.toml").exists():  # installed
        try:
            url = urlsplit(json.loads(distribution("eqat").read_text("direct_url.json") or "{}").get("url", ""))
        except (PackageNotFoundError, ValueError):
            return "eqat"
        if url.scheme != "file":
            return "eqat"
        source = Path(unquote(url.path))
    return "." if source == Path.cwd() else str(source)


class TrainingDivergedError(EqatError):
    """A non-finite loss; the text names the block, the step and the learning rates."""
