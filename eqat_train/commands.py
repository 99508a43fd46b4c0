"""What the commands of ``cli.py`` do once their heavy imports are wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import transformers
from rich.console import Console

from formats.errors import InputError
from formats.model import open_checkpoint

from .config import build_config, context_window
from .data import evaluation_windows, open_source, token_stream
from .evaluation.perplexity import generate_sample, perplexity
from .evaluation.tasks import TaskSettings, check_harness, run_tasks
from .hardware import resolve_device, resolve_dtype
from .inference.loading import load_model
from .inference.session import GenerationOptions, start_generation
from .models.loading import load_config, load_dense_model, load_tokenizer, resolve_model
from .pipeline.dry_run import dry_run as estimate
from .pipeline.following import follow
from .pipeline.train import train
from .ranks.group import joined
from .ranks.together import run_together
from .reporting.progress import Reporter
from .reporting.reporters import JsonReporter, LineReporter, TerminalReporter

__all__ = ["EvalOptions", "GenerationOptions", "eval_command", "generate_command", "train_command"]


def train_command(
    given: Mapping[str, Any], *, config: Path | None, recipe: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """``eqat train``."""
    silence_libraries()
    settings = build_config(given, config, recipe)

    def lead() -> None:
        if dry_run and joined() is not None:
            raise InputError("--dry-run plans a run of one process; run it without torchrun")
        if dry_run:
            estimate(settings, choose_reporter(as_json, quiet))
            return
        result = train(settings, choose_reporter(as_json, quiet))
        if quiet and not as_json:
            print(result.out)

    run_together(settings.device, lead, lambda: follow(settings))


@dataclass(frozen=True)
class EvalOptions:
    """Options of ``eqat eval``; its help says what they are."""

    model: str
    data: str | None = None
    tokens: int | None = None
    tasks: str | None = None
    include_path: Path | None = None
    few_shot: int | None = None
    limit: int | None = None
    seq_len: int | None = None
    batch: int | None = None
    packed: bool = False
    prompt: str | None = None
    sample_tokens: int = 60
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


def eval_command(options: EvalOptions, *, as_json: bool, quiet: bool) -> None:
    """``eqat eval``."""
    silence_libraries()
    tasks = _task_settings(options)
    if options.data is None and tasks is None and options.prompt is None:
        raise InputError("nothing to evaluate: give --data for perplexity, --tasks, or --prompt for a sample")
    reporter = choose_reporter(as_json, quiet)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    trust = options.trust_remote_code
    folder = resolve_model(options.model, trust_remote_code=trust)
    architecture = load_config(folder, trust_remote_code=trust).get_text_config()
    notes: list[str] = []
    seq_len = context_window("seq_len", options.seq_len, getattr(architecture, "max_position_embeddings", None), notes)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust)
    windows = None
    if options.data is not None:
        for note in notes:
            reporter.message(note)
        stream = token_stream(open_source(options.data, default_split="test"), tokenizer, reporter)
        windows = evaluation_windows(stream, seq_len, options.tokens)
    if options.packed:
        with open_checkpoint(folder) as checkpoint:
            model = load_model(checkpoint, dtype, device, trust_remote_code=trust)
    else:
        model = load_dense_model(folder, dtype, device, trust_remote_code=trust)
    value = sample = None
    started = time.perf_counter()
    if windows is not None:
        value = perplexity(model, windows, reporter, batch_size=options.batch)
    seconds = time.perf_counter() - started
    if options.prompt is not None:
        sample = generate_sample(model, tokenizer, options.prompt, options.sample_tokens, options.seed)
    if windows is not None or sample is not None:
        reporter.event(
            "eval",
            model=options.model,
            data=options.data,
            perplexity=value,
            tokens=windows.loss_tokens if windows else None,
            windows=len(windows) if windows else None,
            seq_len=seq_len,
            seconds=seconds,
            prompt=options.prompt,
            sample=sample,
        )
    if quiet and not as_json and (value is not None or sample is not None):
        print(sample if value is None else value)
    results = run_tasks(model, tokenizer, tasks, reporter) if tasks else []
    if quiet and not as_json:
        for result in results:
            print(result.task, result.metric, result.value)


def _task_settings(options: EvalOptions) -> TaskSettings | None:
    """What ``--tasks`` and its companions say; None without it."""
    if options.tasks is None:
        alone = {"include_path": "--include-path", "few_shot": "--few-shot", "limit": "--limit"}
        for name, option in alone.items():
            if getattr(options, name) is not None:
                raise InputError(f"{option} says how to run tasks; give --tasks too")
        return None
    check_harness()
    if options.include_path is not None and not options.include_path.is_dir():
        raise InputError(f"--include-path {options.include_path} is not a folder")
    return TaskSettings(
        names=tuple(name.strip() for name in options.tasks.split(",") if name.strip()),
        include_path=options.include_path,
        few_shot=options.few_shot,
        limit=options.limit,
        batch=options.batch,
        seq_len=options.seq_len,
    )


def generate_command(options: GenerationOptions, *, device: str, dtype: str, quiet: bool) -> bool:
    """``eqat generate``; False when it was interrupted.

    The text goes to stdout and nothing else does, so that it can be piped; remarks and figures go to stderr.
    """
    silence_libraries()
    place = resolve_device(device)
    if options.prompt == "-":
        options = replace(options, prompt=sys.stdin.read())
    generation, remark = start_generation(options, resolve_dtype(dtype, place), place)
    if remark and not quiet:
        print(remark, file=sys.stderr)
    complete = True
    try:
        for text in generation:
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        complete = False
    print(generation.rest(), flush=True)
    if not quiet:
        rate = f": {generation.tokens_per_second:.1f} tokens/s" if generation.tokens_per_second else ""
        print(
            f"{generation.prompt_tokens} prompt tokens in {generation.prompt_seconds:.2f} s, "
            f"{generation.new_tokens} new ones in {generation.seconds:.2f} s{rate}",
            file=sys.stderr,
        )
    return complete


def choose_reporter(as_json: bool, quiet: bool) -> Reporter:
    """JSON lines, silence, bars on a terminal, or plain lines."""
    if as_json:
        return JsonReporter(sys.stdout)
    if quiet:
        return Reporter()
    console = Console(highlight=False)
    return TerminalReporter(console) if console.is_terminal else LineReporter(console)


def silence_libraries() -> None:
    """Keeps the libraries' own bars and remarks out of eqat's output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
