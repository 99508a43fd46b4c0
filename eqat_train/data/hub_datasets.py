"""Data from the ``datasets`` library: hub ids and local folders of data files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from formats.errors import InputError

from ..error_text import first_line

__all__ = ["open_dataset"]

Rows = Callable[[], Iterable[Mapping[str, Any]]]


def open_dataset(spec: str, default_split: str = "train") -> tuple[tuple[str, ...], str, Rows]:
    """Columns, content fingerprint and rows of ``name[:config[:split]]``.

    Raises:
        InputError: no such dataset, config or split, or no network and no local copy.
    """
    import datasets  # noqa: PLC0415  (a second to import, and local files do without it)

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    split = split or default_split
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except ConnectionError as error:
        raise InputError(
            f"dataset {name!r} cannot be reached ({first_line(error)}); give a local file, or connect and try again"
        ) from error
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"no dataset {name!r} here or on the hub ({first_line(error)}); "
            "--data takes a .txt, .jsonl or .parquet file or a datasets id"
        ) from error
    except (ValueError, OSError) as error:
        raise InputError(f"dataset {name!r} with split {split!r} cannot be loaded: {first_line(error)}") from error
    return tuple(data.column_names), data._fingerprint, lambda: iter(data)
