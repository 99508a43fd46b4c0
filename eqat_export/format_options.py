"""``--name value`` pairs that belong to the target format rather than to ``eqat export`` itself.

Formats declare their options (``Format.options``), so a new format brings its own without touching the command line.
The command sets aside whatever it does not know; what that means is asked of the format when the command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

__all__ = ["ExportCommand", "read_options", "set_aside"]

_META = "eqat.format_options"


class ExportCommand(TyperCommand):
    """A command that leaves unknown ``--name value`` pairs in ``context.meta`` for :func:`read_options`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Sets the pairs aside, then parses the rest as usual."""
        own = {name: parameter for parameter in self.get_params(ctx) for name in parameter.opts}
        rest: list[str] = []
        pairs: list[tuple[str, str | None]] = []
        waiting = list(args)
        while waiting:
            word = waiting.pop(0)
            name, equals, value = word.partition("=")
            if not word.startswith("--") or word == "--" or name in own:
                rest.append(word)
                takes_value = name in own and not equals and not getattr(own[name], "is_flag", False)
                if takes_value and waiting:
                    rest.append(waiting.pop(0))
                elif word == "--":
                    rest += waiting
                    break
            elif equals:
                pairs.append((name, value))
            else:
                pairs.append((name, waiting.pop(0) if waiting and not waiting[0].startswith("--") else None))
        ctx.meta[_META] = pairs
        return super().parse_args(ctx, rest)


def read_options(pairs: Sequence[tuple[str, str | None]], format_id: str) -> dict[str, str]:
    """Constructor arguments of a format.

    Args:
        pairs: option as typed, dashes included, and its value; None where none followed.
        format_id: the target format, which declares what it takes.

    Raises:
        UnknownFormatError: the format is not registered.
        InputError: an option that the format does not have, or a value it does not allow.
    """
    from formats import get_format_class  # noqa: PLC0415
    from formats.errors import InputError  # noqa: PLC0415

    known = {f"--{option.name}": option for option in get_format_class(format_id).options}
    chosen: dict[str, str] = {}
    for name, value in pairs:
        if name not in known:
            raise InputError(
                f"eqat export --to {format_id} has no option {name}; {format_id} takes "
                f"{', '.join(known) or 'none of its own'} (see eqat formats {format_id})"
            )
        choices = known[name].choices
        if value is None:
            raise InputError(f"{name} needs a value: {', '.join(choices) or known[name].help}")
        if choices and value not in choices:
            raise InputError(f"{name} is {value!r}; allowed are {', '.join(choices)}")
        chosen[known[name].name.replace("-", "_")] = value
    return chosen


def set_aside(context: Any) -> list[tuple[str, str | None]]:
    """The pairs that the command line set aside."""
    return context.meta.get(_META, [])
