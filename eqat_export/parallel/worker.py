"""What a worker process does: it encodes what it is told to, says what came of it, and writes it where it is told.

Messages to a worker, and its answers:

    {"open": settings}             opens the source; said once, at the start
    {"encode": i, "name", "kind"}  {"encoded": i, "report", "headers"}  or {"failed": i, "error"}
    {"write": i, "places"}         {"written": i}                       or {"failed": i, "error"}
    {"copy": i, "name", "place"}   the same, for a tensor whose bytes stay as they are
    {"end": true}                  {"ended": true}, with all of its bytes on disk where settings say durable

The process ends when its channel does. It makes no files: a worker that outlives its parent cannot bring back a folder
that somebody has removed since.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from eqat_export.encoding import copy_tensor, encode_part, passed_through
from eqat_export.memory import keep_freed_memory, return_freed_memory
from eqat_export.parallel.channel import (
    Channel,
    ChannelClosedError,
    error_text,
    header_text,
    place_of,
    report_text,
)
from formats import get_format
from formats.atomic_output import writing
from formats.model import Checkpoint, open_checkpoint
from formats.pieces import Piece, Place, write_bytes
from formats.writeback import Writeback

__all__ = ["main", "serve"]

_OPEN_FILES = 4


class _Files:
    """Output files that this process writes to, each opened once.

    Args:
        durable: on disk before they are closed.
    """

    def __init__(self, *, durable: bool) -> None:
        self.durable = durable
        self._open: dict[Path, tuple[int, Writeback]] = {}

    def at(self, path: Path) -> tuple[int, Writeback]:
        """Descriptor of a file that exists; at most a few stay open, the latest."""
        if path not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._close(next(iter(self._open)))
            descriptor = os.open(path, os.O_WRONLY)
            self._open[path] = descriptor, Writeback(descriptor)
        return self._open[path]

    def close(self) -> None:
        """Closes all of them."""
        for path in list(self._open):
            self._close(path)

    def _close(self, path: Path) -> None:
        descriptor, _ = self._open.pop(path)
        try:
            if self.durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Worker:
    def __init__(self, checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._format = get_format(settings["target"], **settings["options"])
        self._pieces = self._format.pieces(checkpoint)
        self._out = Path(settings["out"])
        self._keeps = settings["keep_memory"]
        self._encoded: dict[int, list[Piece]] = {}
        self._files = _Files(durable=settings["durable"])

    def encode(self, index: int, name: str, kind: str) -> dict[str, Any]:
        make = encode_part if kind == "layer" else passed_through
        part = make(self._checkpoint, self._format, name)
        pieces = self._encoded[index] = part.pieces(self._pieces)
        return {
            "encoded": index,
            "report": report_text(part),
            "headers": [header_text(piece.header) for piece in pieces],
        }

    def write(self, index: int, places: list[Place]) -> dict[str, Any]:
        pieces = self._encoded.pop(index)
        with writing(self._out):
            for piece, place in zip(pieces, places, strict=True):
                file, writeback = self._files.at(place.path)
                write_bytes(file, place.offset, piece.data)
                writeback.begin(place.offset, piece.header.nbytes)
        del pieces
        if not self._keeps:
            return_freed_memory()
        return {"written": index}

    def end(self) -> dict[str, Any]:
        with writing(self._out):
            self._files.close()
        return {"ended": True}

    def drop(self) -> None:
        """Closes what is still open, whatever is on disk."""
        self._files.durable = False
        self._files.close()

    def copy(self, index: int, name: str, place: Place) -> dict[str, Any]:
        with writing(self._out):
            file, _ = self._files.at(place.path)
        copy_tensor(self._checkpoint, name, file, place.offset, self._out)
        return {"written": index}


def serve(channel: Channel) -> bool:
    """Does what the other end asks for, until it says that all is done (True) or is gone (False)."""
    try:
        with ExitStack() as stack:
            settings = channel.receive()["open"]
            worker: _Worker | None = None
            while True:
                message = channel.receive()
                try:
                    if worker is None:
                        source = open_checkpoint(settings["source"], settings["source_format"])
                        worker = _Worker(stack.enter_context(source), settings)
                        stack.callback(worker.drop)
                    answer = _answer(worker, message)
                except Exception as error:  # for the other end to raise
                    index = next((message[key] for key in ("encode", "write", "copy") if key in message), None)
                    answer = {"failed": index, "error": error_text(error, traceback.format_exc())}
                channel.send(answer)
                if "end" in message:
                    return True
    except ChannelClosedError:
        return False


def _answer(worker: _Worker, message: dict[str, Any]) -> dict[str, Any]:
    if "encode" in message:
        return worker.encode(message["encode"], message["name"], message["kind"])
    if "write" in message:
        return worker.write(message["write"], [place_of(place) for place in message["places"]])
    if "copy" in message:
        return worker.copy(message["copy"], message["name"], place_of(message["place"]))
    return worker.end()


def main() -> None:
    """Entry of a worker process, whose only argument is the descriptor of its channel."""
    torch.set_num_threads(1)
    keep_freed_memory()
    serve(Channel(Connection(int(sys.argv[1])), "the export"))
