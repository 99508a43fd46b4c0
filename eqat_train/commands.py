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

from .config import build_config, context_window
from .data import evaluation_windows, open_source, token_stream
from .evaluate import generate_sample, perplexity
from .hardware import resolve_device, resolve_dtype
from .inference.session import GenerationOptions, start_generation
from .models.loading import load_config, load_dense_model, load_tokenizer, resolve_model
from .pipeline.following import follow
from .pipeline.train import train
from .ranks.together import run_together
from .reporting.progress import Reporter
from .reporting.reporters import JsonReporter, LineReporter, TerminalReporter

__all__ = ["EvalOptions", "GenerationOptions", "eval_command", "generate_command", "train_command"]


def train_command(
    given: Mapping[str, Any], *, config: Path | None, recipe: str | None, as_json: bool, quiet: bool
) -> None:
    """``eqat train``."""
    silence_libraries()
    settings = build_config(given, config, recipe)

    def lead() -> None:
        result = train(settings, choose_reporter(as_json, quiet))
        if quiet and not as_json:
            print(result.out)

    run_together(settings.device, lead, lambda: follow(settings))


@dataclass(frozen=True)
class EvalOptions:
    """Options of ``eqat eval``; its help says what they are."""

    model: str
    data: str
    tokens: int | None = None
    seq_len: int | None = None
    batch: int | None = None
    prompt: str | None = None
    sample_tokens: int = 60
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False


def eval_command(options: EvalOptions, *, as_json: bool, quiet: bool) -> None:
    """``eqat eval``."""
    silence_libraries()
    reporter = choose_reporter(as_json, quiet)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    folder = resolve_model(options.model, trust_remote_code=options.trust_remote_code)
    architecture = load_config(folder, trust_remote_code=options.trust_remote_code).get_text_config()
    notes: list[str] = []
    seq_len = context_window("seq_len", options.seq_len, getattr(architecture, "max_position_embeddings", None), notes)
    tokenizer = load_tokenizer(folder, trust_remote_code=options.trust_remote_code)
    for note in notes:
        reporter.message(note)
    stream = token_stream(open_source(options.data, default_split="test"), tokenizer, reporter)
    windows = evaluation_windows(stream, seq_len, options.tokens)
    model = load_dense_model(folder, dtype, device, trust_remote_code=options.trust_remote_code)
    started = time.perf_counter()
    value = perplexity(model, windows, reporter, batch_size=options.batch)
    seconds = time.perf_counter() - started
    sample = None
    if options.prompt is not None:
        sample = generate_sample(model, tokenizer, options.prompt, options.sample_tokens, options.seed)
    reporter.event(
        "eval",
        model=options.model,
        data=options.data,
        perplexity=value,
        tokens=windows.loss_tokens,
        windows=len(windows),
        seq_len=seq_len,
        seconds=seconds,
        prompt=options.prompt,
        sample=sample,
    )
    if quiet and not as_json:
        print(value)


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
