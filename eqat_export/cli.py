"""The ``eqat`` command.

Importing this module loads typer and nothing heavy: every command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from eqat_export.exit_status import DIFFERENCE, ErrorBoundary, exit_on_sigterm
from eqat_export.format_options import ExportCommand, set_aside
from eqat_train.cli import app as train_app

__all__ = ["app", "main", "run"]

EPILOG = (
    "Exit codes: 0 good, 1 verification found a difference, 2 bad input or usage, 70 a bug in eqat, 130 interrupted."
)

# One line a paragraph: the help keeps line breaks.
EXPORT_HELP = (
    "Convert a quantized checkpoint to another format, layer by layer.\n\n"
    "Without CHECKPOINT: the last native checkpoint made in this directory. Every layer is checked against FORMAT "
    "before anything is written; the closing lines say whether weights are exact or rounded, and by how much.\n\n"
    "Formats have options of their own, e.g. --dtype float32 for dense: eqat formats FORMAT lists them."
)
VERIFY_HELP = (
    "Check a checkpoint on its own, against another, or in a real runtime.\n\n"
    "Without CHECKPOINT: the last exports made in this directory, each on its own and against its source. "
    "A checkpoint that opens but is defective or different ends with exit code 1, one that cannot be opened with 2. "
    "Against a full-precision model the quantization error is shown, and never fails."
)

app = typer.Typer(
    name="eqat",
    help="2-, 3- and 4-bit language models by EfficientQAT, exported exactly to the layouts people run.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.registered_commands += train_app.registered_commands

OptionalCheckpoint = Annotated[
    Path | None, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, or a .gguf file.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only, on stderr.")]
SourceFormat = Annotated[
    str | None,
    typer.Option("--from", metavar="FORMAT", help="Read CHECKPOINT as this format, whatever its label says."),
]


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            print(f"eqat {version('eqat')}")
        except PackageNotFoundError:
            print("eqat, run from its source folder without being installed")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may also follow the command.")] = False,
) -> None:
    """2-, 3- and 4-bit language models by EfficientQAT, exported exactly to the layouts people run."""


@app.command(cls=ExportCommand, help=EXPORT_HELP, epilog=EPILOG)
def export(
    context: typer.Context,
    *,
    checkpoint: OptionalCheckpoint = None,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="What to write; eqat formats lists them.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Output folder, or file for gguf; named after CHECKPOINT without it.", show_default=False
        ),
    ] = None,
    source_format: SourceFormat = None,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest file, e.g. 500MB or 5GB.")] = "5GB",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Processes that encode and write the same bytes. Default 1, which encodes in threads.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Runs ``eqat export``."""
    from eqat_export.commands import export_command  # noqa: PLC0415

    export_command(
        checkpoint,
        to,
        out=out,
        source_format=source_format,
        options=set_aside(context),
        shard_size=shard_size,
        workers=workers,
        force=force,
        as_json=as_json,
        quiet=quiet,
    )


@app.command(help=VERIFY_HELP, epilog=EPILOG)
def verify(
    *,
    checkpoint: OptionalCheckpoint = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="CHECKPOINT", help="Compare every layer with this checkpoint."),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="Compare weights and logits with this real reader; eqat formats lists them.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="ENGINE",
            help="Say whether this engine loads it and reads it right: vllm, sglang, llama.cpp, mlx, transformers, "
            "gptqmodel or onnxruntime.",
        ),
    ] = None,
    source_format: SourceFormat = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Runs ``eqat verify``."""
    from eqat_export.commands import verify_command  # noqa: PLC0415

    good = verify_command(
        checkpoint,
        against=against,
        runtime=runtime,
        engine=engine,
        source_format=source_format,
        as_json=as_json,
        quiet=quiet,
    )
    if not good:
        raise typer.Exit(DIFFERENCE)


@app.command(epilog=EPILOG)
def inspect(
    *,
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder.")],
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="NAME", help="Only this layer, e.g. model.layers.0.mlp.up_proj.")
    ] = None,
    source_format: SourceFormat = None,
    as_json: Json = False,
) -> None:
    """Show scheme, sizes, bits per weight, and histograms of zeros and scales."""
    from eqat_export.commands import inspect_command  # noqa: PLC0415

    inspect_command(checkpoint, layer=layer, source_format=source_format, as_json=as_json)


@app.command("formats", epilog=EPILOG)
def list_formats(
    *,
    name: Annotated[
        str | None, typer.Argument(metavar="FORMAT", help="Only this one, with its export options.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the formats, what each holds, and who reads it."""
    from eqat_export.commands import formats_command  # noqa: PLC0415

    formats_command(name, as_json)


def run(arguments: list[str]) -> int:
    """Runs the command line and returns the exit code; errors become one line on stderr."""
    debug = "--debug" in arguments
    given = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    with ErrorBoundary(debug) as boundary:
        command = typer.main.get_command(app)
        with command.make_context("eqat", given) as context:
            command.invoke(context)
        sys.stdout.flush()
    return boundary.code


def main() -> NoReturn:
    """Entry point of the ``eqat`` command."""
    exit_on_sigterm()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
