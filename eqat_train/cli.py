"""``eqat train``, ``eqat eval`` and ``eqat generate``, mounted by the root command.

Importing this module loads typer and nothing heavy: commands import what they need when they run. The options of
``train`` are the fields of ``TrainConfig``.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from .options import TrainConfig
from .quiet import quiet_bars, quiet_imports

__all__ = ["app"]

app = typer.Typer(name="eqat_train", add_completion=False, pretty_exceptions_enable=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON objects, one a line, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only, and the result on one line.")]

# One line a paragraph: the help keeps line breaks.
TRAIN_HELP = (
    "Quantize a model by EfficientQAT: Block-AP, then E2E-QP. The result is a native checkpoint.\n\n"
    "Without MODEL: a small demo model and text that ship with eqat. "
    "Settings come from the command line, then from --config, then from the defaults, which are the paper's."
)
EVAL_HELP = (
    "Measure perplexity on non-overlapping windows of a text, or score downstream tasks.\n\n"
    "Perplexity (--data): documents are tokenized without special tokens, each followed by the end-of-text token, "
    "and concatenated; the first token of a window is not predicted.\n\n"
    "Tasks (--tasks): run by the lm-eval harness (pip install 'eqat\\[eval]') with its own prompts, few-shot "
    "examples and metrics. Their data comes from the hub, or from a file that a task file of your own names."
)
GENERATE_HELP = (
    "Continue a prompt, and print the text as it is generated.\n\n"
    "CHECKPOINT may be in any format that eqat reads from a folder, or in full precision. On a GPU quantized layers "
    "stay packed; on a CPU they are dequantized when loaded unless --impl says reference. "
    "The text alone goes to stdout, the speed to stderr. Ctrl-C ends it with the text so far and exit code 130."
)
INTERRUPTED = 130


def train(
    config: Path | None = None,
    recipe: str | None = None,
    dry_run: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    **given: Any,
) -> None:
    """Runs ``eqat train``; ``given`` holds the settings by name, None where nothing was said."""
    quiet_imports()
    from .commands import train_command  # noqa: PLC0415

    train_command(given, config=config, recipe=recipe, dry_run=dry_run, as_json=as_json, quiet=quiet)


def _train_parameters() -> list[inspect.Parameter]:
    """The parameters of ``train``: the fields of TrainConfig, and what is not a setting of the run itself."""
    hints = get_type_hints(TrainConfig)
    made = [_parameter(item, hints[item.name]) for item in fields(TrainConfig)]
    file = typer.Option(
        "--config", metavar="FILE", help="YAML file with the same names, e.g. seq_len: 1024.", rich_help_panel="Data"
    )
    recipe = typer.Option(
        "--recipe",
        metavar="paper|best",
        help="Settings that ship with eqat: the paper's (the default), or the best found for 2 bits (docs/recipes.md).",
        rich_help_panel="Quantization",
    )
    dry = typer.Option(
        "--dry-run",
        help="Print memory, disk and time of the run, from a few real steps of one block, and write nothing.",
        rich_help_panel="Output",
    )
    extra: dict[str, tuple[Any, Any]] = {
        "recipe": (Annotated[str | None, recipe], None),
        "config": (Annotated[Path | None, file], None),
        "dry_run": (Annotated[bool, dry], False),
        "as_json": (Json, False),
        "quiet": (Quiet, False),
    }
    made += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in extra.items()
    ]
    return made


def _parameter(item: Field[Any], hint: Any) -> inspect.Parameter:
    kind = next(arg for arg in get_args(hint) if arg is not type(None)) if isinstance(hint, types.UnionType) else hint
    repeated = item.name == "overrides"
    kind = list[str] if repeated else kind
    rule = item.metadata
    info: Any
    if item.name == "model":
        info = typer.Argument(metavar=rule["metavar"], help=rule["help"], show_default=False)
    else:
        default = item.default
        shown = "" if default is None or default is False else f" [default: {default}]"
        info = typer.Option(
            "--override" if repeated else f"--{item.name.replace('_', '-')}",
            help=rule["help"] + shown.replace("[", r"\["),
            metavar=None if kind is bool else rule["metavar"],
            rich_help_panel=rule["panel"],
            show_default=False,
        )
    annotation = Annotated[kind | None, info]  # type: ignore[valid-type]
    return inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_parameters = _train_parameters()
train.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
train.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters}
app.command("train", help=TRAIN_HELP)(train)


@app.command("eval", help=EVAL_HELP)
def evaluate(
    *,
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_CHECKPOINT", help="Folder in any known format, or a hub id.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DATASET",
            help="Text: .txt, .txt.xz, .jsonl or .parquet file, or datasets id name\\[:config\\[:split]] (split test).",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Read only this many tokens of the text.")] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens in a window. Default 2048, or the model's context if shorter."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Windows a forward pass, by default by their length; of tasks 16.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks, groups or tags of lm-eval, or task files (.yaml).",
            rich_help_panel="Tasks",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="More task files; Python functions that they name are run.",
            rich_help_panel="Tasks",
        ),
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt. Default: the task's.", rich_help_panel="Tasks")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only a task's first so many documents.", rich_help_panel="Tasks")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Keep quantized layers packed: less memory, for models that need it.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="Write a sample text that begins so.")] = None,
    sample_tokens: Annotated[int, typer.Option(min=1, help="Length of the sample text.")] = 60,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the sample text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let Python files of the folder run.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Runs ``eqat eval``."""
    quiet_imports()
    if tasks is not None:
        quiet_bars()
    from .commands import EvalOptions, eval_command  # noqa: PLC0415

    options = EvalOptions(
        model=model,
        data=data,
        tokens=tokens,
        tasks=tasks,
        include_path=include_path,
        few_shot=few_shot,
        limit=limit,
        seq_len=seq_len,
        batch=batch,
        packed=packed,
        prompt=prompt,
        sample_tokens=sample_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    eval_command(options, as_json=as_json, quiet=quiet)


@app.command("generate", help=GENERATE_HELP)
def generate(
    *,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder in any known format, or a hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The text ends after so many tokens at the latest.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Keep the likeliest tokens that together have this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="The same seed gives the same text.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.")
    ] = "auto",
    impl: Annotated[
        str, typer.Option(help="auto, triton or reference: who computes packed layers; auto is triton on a GPU.")
    ] = "auto",
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph/--no-cuda-graph", help="Replay decoding steps from a CUDA graph.")
    ] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let Python files of the folder run.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text and errors only.")] = False,
) -> None:
    """Runs ``eqat generate``."""
    quiet_imports()
    from .commands import GenerationOptions, generate_command  # noqa: PLC0415

    options = GenerationOptions(
        checkpoint=checkpoint,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        impl=impl,
        cuda_graph=cuda_graph,
        trust_remote_code=trust_remote_code,
    )
    if not generate_command(options, device=device, dtype=dtype, quiet=quiet):
        raise typer.Exit(INTERRUPTED)
