"""Messages between the processes of one export: JSON objects, each sent and received whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from eqat_export.encoding import PartReport
from eqat_export.rounding import Rounding
from formats import errors
from formats.base import Exactness
from formats.pieces import Choice, Header, Place
from formats.safetensors_header import DTYPE_NAMES

__all__ = [
    "Channel",
    "ChannelClosedError",
    "WorkerBugError",
    "error_of",
    "error_text",
    "header_of",
    "header_text",
    "place_of",
    "place_text",
    "ready",
    "report_of",
    "report_text",
]

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ROUNDINGS = ("rounded", "read", "casts")
C = TypeVar("C", bound="Channel")


class ChannelClosedError(Exception):
    """The process at the other end is gone."""


class WorkerBugError(RuntimeError):
    """An exception nobody expected, in another process; the text is its traceback."""


class Channel:
    """One end of a connection.

    Attributes:
        name: the process at the other end, for people.
    """

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message.

        Raises:
            ChannelClosedError: nobody is there to receive it.
        """
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError as exc:
            raise ChannelClosedError(self.name) from exc

    def receive(self) -> dict[str, Any]:
        """The next message, waited for.

        Raises:
            ChannelClosedError: none will come.
        """
        try:
            return json.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as exc:
            raise ChannelClosedError(self.name) from exc

    def close(self) -> None:
        """Ends it; the other end notices."""
        self.connection.close()


def ready(channels: Iterable[C]) -> list[C]:
    """Channels with a message, or whose other end is gone; waited for."""
    by_connection = {channel.connection: channel for channel in channels}
    return [by_connection[connection] for connection in wait(list(by_connection))]  # type: ignore[index]


def header_text(header: Header) -> dict[str, Any]:
    """A header as JSON values."""
    return asdict(header) | {"dtype": DTYPE_NAMES.get(header.dtype, str(header.dtype))}


def header_of(text: dict[str, Any]) -> Header:
    """Inverse of ``header_text``."""
    choice = text["choice"]
    changed = {
        "dtype": _DTYPES.get(text["dtype"]) or getattr(torch, text["dtype"].removeprefix("torch.")),
        "shape": tuple(text["shape"]),
        "choice": None if choice is None else Choice(**choice),
    }
    return Header(**(text | changed))


def place_text(place: Place) -> list[Any]:
    """A place as JSON values."""
    return [str(place.path), place.offset]


def place_of(text: list[Any]) -> Place:
    """Inverse of ``place_text``."""
    return Place(Path(text[0]), text[1])


def report_text(report: PartReport) -> dict[str, Any]:
    """A report as JSON values."""
    kind = report.exactness
    fields = {key: getattr(report, key) for key in ("name", "in_format", "weights", "nbytes")}
    return (
        fields
        | {"exactness": None if kind is None else kind.value}
        | {key: vars(getattr(report, key)) for key in _ROUNDINGS}
    )


def report_of(text: dict[str, Any]) -> PartReport:
    """Inverse of ``report_text``."""
    kind = text["exactness"]
    changed = {"exactness": None if kind is None else Exactness(kind)}
    return PartReport(**(text | changed | {key: Rounding(**text[key]) for key in _ROUNDINGS}))


def error_text(error: Exception, trace: str) -> dict[str, Any]:
    """An exception as JSON values, with its traceback for the unexpected ones."""
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "reason": getattr(error, "reason", None),
        "instead": list(getattr(error, "instead", ())),
        "trace": trace,
    }


def error_of(text: dict[str, Any]) -> Exception:
    """The exception, if it is one meant for users; otherwise one that shows its traceback."""
    if text["kind"] == "UnsupportedSchemeError":
        return errors.UnsupportedSchemeError(text["reason"], instead=text["instead"])
    if text["kind"] == "MemoryError":
        return MemoryError(text["text"])
    kind = getattr(errors, text["kind"], None) if text["kind"] in errors.__all__ else None
    if kind is None:
        return WorkerBugError(text["trace"])
    error = kind.__new__(kind)  # some of them build their text from other things
    error.args = (text["text"],)
    return error
