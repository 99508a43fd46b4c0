"""All the data of a training run, read before anything is trained, so that bad data fails at once."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from formats.errors import InputError

from ..data import (
    TokenWindows,
    evaluation_windows,
    instruction_windows,
    open_source,
    token_stream,
    training_windows,
)
from ..options import TrainConfig
from ..reporting.progress import Reporter

__all__ = ["TrainingData", "prepare_data"]

# Tokens of the evaluation text that samples continue when no prompt is given.
PROMPT_TOKENS = 24
# E2E-QP draws other windows than Block-AP from the same text.
E2E_SEED_OFFSET = 1


@dataclass(frozen=True)
class TrainingData:
    """Windows for every stage of a run; None for a stage that needs none.

    Attributes:
        block_ap: training and validation windows of Block-AP.
        e2e: training windows of E2E-QP.
        e2e_validation: its validation windows; None when the data is too small to spare any.
        evaluation: windows for the closing table.
        prompt: what samples continue; None when there is nothing to take it from.
    """

    block_ap: tuple[TokenWindows, TokenWindows] | None
    e2e: TokenWindows | None
    e2e_validation: TokenWindows | None
    evaluation: TokenWindows | None
    prompt: str | None


def prepare_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> TrainingData:
    """Reads, tokenizes and cuts everything that the stages of ``config`` need.

    Raises:
        InputError: data that is missing, unreadable, of a wrong kind or too short.
    """
    trained = config.stage in ("all", "block-ap") and config.epochs > 0  # rounding to the nearest looks at no data
    block_ap = _block_ap_windows(config, tokenizer, reporter) if trained else None
    e2e, e2e_validation = _e2e_windows(config, tokenizer, reporter) if config.stage != "block-ap" else (None, None)
    evaluation, prompt = None, config.prompt
    if config.eval_data is not None:
        stream = token_stream(open_source(config.eval_data, default_split="test"), tokenizer, reporter)
        evaluation = evaluation_windows(stream, _known(config.seq_len), config.eval_tokens)
        if prompt is None:
            prompt = str(tokenizer.decode(evaluation.input_ids[0, :PROMPT_TOKENS], skip_special_tokens=True))
    return TrainingData(block_ap, e2e, e2e_validation, evaluation, prompt)


def _block_ap_windows(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> tuple[TokenWindows, TokenWindows]:
    if config.data is None:
        raise InputError("training a model of your own needs --data: a .txt, .jsonl or .parquet file or a datasets id")
    source = open_source(config.data)
    if not source.has_text:
        raise InputError(
            f"--data {config.data} holds instructions; Block-AP needs text: give that as --data, and this as --e2e-data"
        )
    stream = token_stream(source, tokenizer, reporter)
    train, validation = training_windows(
        stream, _known(config.seq_len), config.samples, config.val_samples, config.seed
    )
    _report(reporter, "Block-AP", config.data, train, validation, text_tokens=len(stream))
    return train, validation


def _e2e_windows(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> tuple[TokenWindows, TokenWindows | None]:
    spec = config.e2e_data or config.data
    if spec is None:
        raise InputError("E2E-QP needs --e2e-data or --data: a .txt, .jsonl or .parquet file or a datasets id")
    source = open_source(spec)
    text_tokens = None
    seq_len, seed = _known(config.e2e_seq_len), config.seed + E2E_SEED_OFFSET
    # A file with both columns is instructions when it was given for E2E-QP, and text when it is Block-AP's.
    if source.has_instructions and (config.e2e_data is not None or not source.has_text):
        found = instruction_windows(
            source,
            tokenizer,
            seq_len,
            samples=config.e2e_samples,
            validation_samples=config.val_samples,
            seed=seed,
            reporter=reporter,
        )
        if found.dropped or found.truncated:
            reporter.message(
                f"{spec}: {found.dropped} examples left out, their answers lie beyond {seq_len} tokens; "
                f"{found.truncated} answers cut there"
            )
        train, validation = found.train, found.validation
    else:
        stream = token_stream(source, tokenizer, reporter)
        text_tokens = len(stream)
        train, validation = training_windows(stream, seq_len, config.e2e_samples, config.val_samples, seed)
    _report(reporter, "E2E-QP", spec, train, validation, text_tokens=text_tokens)
    return train, validation


def _report(
    reporter: Reporter,
    stage: str,
    spec: str,
    train: TokenWindows,
    validation: TokenWindows | None,
    *,
    text_tokens: int | None,
) -> None:
    reporter.event(
        "data",
        stage=stage,
        data=spec,
        windows=len(train),
        seq_len=train.seq_len,
        loss_tokens=train.loss_tokens,
        validation_windows=0 if validation is None else len(validation),
        text_tokens=text_tokens,
    )


def _known(seq_len: int | None) -> int:
    if seq_len is None:
        raise ValueError("the configuration is not resolved")
    return seq_len
