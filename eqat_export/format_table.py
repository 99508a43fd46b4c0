"""The rows of ``eqat formats``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eqat_export.runtimes import RUNTIMES, get_runtime
from formats import QuantizedLinear, QuantScheme, available_formats, get_format
from formats.base import Exactness, Format, FormatOption
from formats.errors import UnsupportedSchemeError

__all__ = ["FormatRow", "format_rows", "markdown_table", "ranges"]

# A shape that every divisibility rule and every group size below accepts.
PROBE = 256
GROUPS = (32, 64, 128, -1)


@dataclass(frozen=True)
class FormatRow:
    """One format.

    Attributes:
        bits, groups: what its own ``check`` accepts at a shape that suits every layout.
        direction: ``read, write`` or ``write``.
        readers: runtimes that ``eqat verify --runtime`` can prove it with.
        extra: eqat's extra that brings those runtimes; empty when none is needed.
        options: what ``eqat export`` takes for it besides its own options.
    """

    id: str
    title: str
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    direction: str
    exactness: str
    readers: tuple[str, ...]
    extra: str
    options: tuple[FormatOption, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {**vars(self), "options": [vars(option) for option in self.options]}


def format_rows(name: str | None = None) -> list[FormatRow]:
    """Every registered format, or the one named, asked itself.

    Raises:
        UnknownFormatError: the name is not registered.
    """
    return [_row(get_format(format_id)) for format_id in ([name] if name else available_formats())]


def markdown_table(rows: list[FormatRow]) -> str:
    """The table as the README shows it."""
    lines = ["| id | bits | groups | holds | real reader (`--runtime`) | extra |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [
            f"`{row.id}`",
            ranges(row.bits),
            " ".join(map(str, row.groups)),
            row.exactness,
            ", ".join(row.readers),
            row.extra,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ranges(values: tuple[int, ...]) -> str:
    """``1-8`` for consecutive numbers, else ``2 3 4 8``."""
    if len(values) > 2 and values == tuple(range(values[0], values[-1] + 1)):
        return f"{values[0]}-{values[-1]}"
    return " ".join(map(str, values))


def _row(form: Format) -> FormatRow:
    bits = tuple(bits for bits in range(1, 9) if any(_takes(form, bits, group) for group in GROUPS))
    groups = tuple(group for group in GROUPS if any(_takes(form, number, group) for number in bits))
    runtimes = [get_runtime(runtime_id) for runtime_id in RUNTIMES]
    stored = form.id if form.readable else None
    readers = [runtime for runtime in runtimes if stored in runtime.formats]
    extras = sorted({runtime.needs(form.id)[1] for runtime in readers}) if form.readable else []
    return FormatRow(
        form.id,
        form.title,
        bits,
        groups,
        "read, write" if form.readable else "write",
        _exactness(form, bits, groups),
        tuple(runtime.id for runtime in readers),
        ", ".join(extras),
        form.options,
    )


def _exactness(form: Format, bits: tuple[int, ...], groups: tuple[int, ...]) -> str:
    """The class of layers with every zero-point, by the dtype of their scales, and by bits where those differ."""
    half, single = (_classes(form, bits, groups, dtype) for dtype in (torch.float16, torch.float32))
    return half if half == single else f"{half} (fp32 scales: {single})"


def _classes(form: Format, bits: tuple[int, ...], groups: tuple[int, ...], dtype: torch.dtype) -> str:
    found: dict[Exactness, list[int]] = {}
    for number in bits:
        scheme = QuantScheme(number, next(group for group in groups if _takes(form, number, group)))
        shape = (PROBE, scheme.groups(PROBE))
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(0, scheme.maxq + 1, (PROBE, PROBE), generator=generator, dtype=torch.uint8)
        zeros = torch.arange(PROBE, dtype=torch.int32)[:, None].expand(shape) % (scheme.maxq + 1)
        scales = (torch.rand(shape, generator=generator) + 0.5).to(dtype)
        kind = form.exactness(QuantizedLinear(codes, scales, zeros, scheme))
        found.setdefault(kind, []).append(number)
    if len(found) == 1:
        return next(iter(found)).value
    told = (f"{kind.value} at {ranges(tuple(numbers))} bit{'s'[: numbers != [1]]}" for kind, numbers in found.items())
    return ", ".join(told)


def _takes(form: Format, bits: int, group: int) -> bool:
    try:
        form.check(QuantScheme(bits, group), PROBE, PROBE)
    except UnsupportedSchemeError:
        return False
    return True
