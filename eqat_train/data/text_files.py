"""Plain text files: documents between separator lines.

A line that holds only ``<|endoftext|>`` separates documents; a file without one is a single document. A document is its
lines joined by line feeds, without the line break that ends its last line; empty documents are skipped.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from formats.errors import InputError

__all__ = ["SEPARATOR", "iterate_documents", "open_text"]

SEPARATOR = "<|endoftext|>"


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a UTF-8 text file, decompressing ``.xz``.

    Raises:
        InputError: the file cannot be read, is damaged, or is not UTF-8.
    """
    try:
        with (
            lzma.open(path, "rt", encoding="utf-8-sig")
            if path.suffix == ".xz"
            else path.open(encoding="utf-8-sig") as file
        ):
            yield file
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8"
        ) from error
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path} is a damaged xz file ({error}); test it with: xz -t {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def iterate_documents(path: Path) -> Iterator[str]:
    """The documents of a ``.txt`` or ``.txt.xz`` file, one in memory at a time.

    Raises:
        InputError: the file cannot be read, is damaged, or is not UTF-8.
    """
    lines: list[str] = []
    with open_text(path) as file:
        for line in file:
            if line.rstrip("\n") == SEPARATOR:
                yield from _document(lines)
                lines = []
            else:
                lines.append(line)
        yield from _document(lines)


def _document(lines: list[str]) -> Iterator[str]:
    text = "".join(lines).removesuffix("\n")
    if text:
        yield text
