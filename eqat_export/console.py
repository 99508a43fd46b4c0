"""The terminal: results on stdout, progress and remarks on stderr.

rich drops colours by itself when a stream is not a terminal or NO_COLOR is set; marks and bars fall back to ASCII
where the stream's encoding lacks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["bar", "mark", "progress", "remarks", "results", "size_text"]

EIGHTHS = " ▏▎▍▌▋▊▉█"


class _Terminal(Console):
    """A console that leaves a closed pipe to the caller; rich itself would exit with 1, our code for a difference."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def results() -> Console:
    """The console of stdout, built when asked for so that it follows redirections."""
    return _Terminal(highlight=False)


def remarks() -> Console:
    """The console of stderr."""
    return _Terminal(stderr=True, highlight=False)


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps on stderr while the block runs; nothing when quiet or not on a terminal.

    Yields:
        A function that moves one step on and shows a text, e.g. the layer's name.
    """
    console = remarks()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[current]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as display:
        task = display.add_task(title, total=total, current="")

        def step(current: str) -> None:
            display.update(task, advance=1, current=current)

        yield step


def mark(good: bool, console: Console) -> str:
    """A check mark or a cross, with colour where there is colour."""
    if _encodes("✓✗", console):
        return "[green]✓[/]" if good else "[red]✗[/]"
    return "[green]ok:[/]" if good else "[red]FAILED:[/]"


def bar(fraction: float, width: int, console: Console) -> str:
    """A horizontal bar of at most ``width`` characters; any count above zero shows at least a sliver."""
    eighths = max(round(fraction * width * 8), 1 if fraction > 0 else 0)
    if not _encodes(EIGHTHS, console):
        return "#" * -(-eighths // 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def size_text(nbytes: int) -> str:
    """Bytes for a person, in powers of 1000: ``1.23 GB``."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _encodes(text: str, console: Console) -> bool:
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return False
    return True
