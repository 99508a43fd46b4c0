"""Builds the demo's assets: trains a small Llama from scratch on generated stories.

    python -m eqat_train.demo.build --out eqat_train/demo/assets --device cuda

Writes a complete Hugging Face folder (bf16 weights, byte-level BPE tokenizer) and two texts the model was not trained
on: ``calibration.txt.xz`` to quantize with and ``heldout.txt.xz`` to measure with. Prints held-out perplexity and a
sample, in full precision and after 2-bit round-to-nearest.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from formats.affine import dequantize, round_to_nearest
from formats.types import QuantScheme

from . import DEMO_PROMPT
from .stories import DOCUMENT_END, stories, write_stories

__all__ = ["BuildSettings", "build", "main"]

TRAIN_SEED, CALIBRATION_SEED, HELDOUT_SEED = 1, 2, 3
CALIBRATION_STORIES, HELDOUT_STORIES = 3000, 500
CHUNK = 2000
DEMO_SCHEME = QuantScheme(bits=2, group_size=64)


@dataclass(frozen=True)
class BuildSettings:
    """Everything that determines the assets. The defaults are the shipped model's.

    Attributes:
        stories: training stories; each is seen ``steps * batch_size * sequence_length / tokens`` times.
        tokenizer_stories: how many of them the tokenizer is trained on.
        steps: optimizer steps.
        batch_size: windows a step.
        sequence_length: tokens a window.
        lr: peak learning rate; linear warm-up, then cosine to a twentieth.
        weight_decay: of matrices; vectors have none.
        seed: of the initial weights and of the order of windows.
        device: torch device.
        workers: processes that write stories.
    """

    stories: int = 300_000
    tokenizer_stories: int = 20_000
    steps: int = 4500
    batch_size: int = 96
    sequence_length: int = 512
    lr: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "cpu"
    workers: int = 2
    vocab_size: int = 1536
    hidden_size: int = 256
    intermediate_size: int = 640
    layers: int = 4
    calibration_stories: int = CALIBRATION_STORIES
    heldout_stories: int = HELDOUT_STORIES


def build(out: Path, settings: BuildSettings) -> dict[str, float]:
    """Trains the model and writes the folder.

    Returns:
        Held-out perplexity of the written bf16 model (``full``) and of its round-to-nearest weights (``rtn``).
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(stories(settings.tokenizer_stories, TRAIN_SEED), settings.vocab_size)
    started = time.perf_counter()
    tokens = generate_tokens(tokenizer, settings)
    print(f"{settings.stories} stories, {tokens.numel()} tokens in {time.perf_counter() - started:.1f} s", flush=True)
    heldout = list(stories(settings.heldout_stories, HELDOUT_SEED))
    windows = token_windows(tokenizer, heldout, settings.sequence_length).to(settings.device)  # [windows, T]

    model = train(tokens.to(settings.device), windows, settings).bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=True, temperature=0.7, top_p=0.95
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_stories(out / "calibration.txt.xz", stories(settings.calibration_stories, CALIBRATION_SEED))
    write_stories(out / "heldout.txt.xz", iter(heldout))

    model = model.float()
    results = {"full": perplexity(model, windows)}
    print(f"held-out perplexity {results['full']:.4f}\n{sample(model, tokenizer)}\n", flush=True)
    round_weights_(model, DEMO_SCHEME)
    results["rtn"] = perplexity(model, windows)
    print(f"{DEMO_SCHEME} round-to-nearest {results['rtn']:.4f}\n{sample(model, tokenizer)}", flush=True)
    return results


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose id 0 ends a document; decoding is lossless for any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[DOCUMENT_END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=DOCUMENT_END, eos_token=DOCUMENT_END, pad_token=DOCUMENT_END,
        model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def generate_tokens(tokenizer: PreTrainedTokenizerFast, settings: BuildSettings) -> Tensor:
    """The training stories as one stream of token ids, each followed by id 0: int16 ``[tokens]``."""
    starts = range(0, settings.stories, CHUNK)
    counts = [min(CHUNK, settings.stories - start) for start in starts]
    with ProcessPoolExecutor(settings.workers) as pool:
        chunks = pool.map(partial(_encode_stories, tokenizer.backend_tokenizer), counts, starts)
        return torch.cat([torch.from_numpy(chunk) for chunk in chunks])


def _encode_stories(tokenizer: Tokenizer, count: int, start: int) -> np.ndarray:
    return encode(tokenizer, list(stories(count, TRAIN_SEED, start)))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids of documents, each followed by id 0: int16 ``[tokens]``."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, 0], dtype=np.int16) for encoding in encodings])


def token_windows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> Tensor:
    """Non-overlapping windows, int64 ``[windows, length]``."""
    stream = torch.from_numpy(encode(tokenizer.backend_tokenizer, texts)).long()
    return stream[: len(stream) // length * length].view(-1, length)


def train(tokens: Tensor, heldout: Tensor, settings: BuildSettings) -> LlamaForCausalLM:
    """Next-token training with fp32 weights, and bf16 autocast on CUDA."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size, num_hidden_layers=settings.layers,
        intermediate_size=settings.intermediate_size, num_attention_heads=settings.hidden_size // 64,
        num_key_value_heads=settings.hidden_size // 128, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(settings.device)  # type: ignore[arg-type]  # transformers hides the signature
    cuda = torch.device(settings.device).type == "cuda"
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=cuda)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_lr_factor, steps=settings.steps))

    # Windows are drawn in a fresh random order, and from a fresh offset, each time the stream is used up.
    generator = torch.Generator().manual_seed(settings.seed)
    started, length = time.perf_counter(), settings.sequence_length
    positions = torch.arange(length, device=settings.device)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, settings.steps + 1):
        if len(order) < settings.batch_size:
            offset = int(torch.randint(length, (1,), generator=generator))
            count = (len(tokens) - offset) // length
            order = torch.randperm(count, generator=generator) * length + offset
        chosen, order = order[: settings.batch_size].to(settings.device), order[settings.batch_size :]
        batch = tokens[chosen[:, None] + positions].long()  # [batch, T]
        with torch.autocast(settings.device, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % max(1, settings.steps // 20) == 0:
            speed = step * batch.numel() / (time.perf_counter() - started)
            print(f"step {step}: loss {loss.item():.4f}, {speed:.0f} tokens/s", flush=True)
        if step % max(1, settings.steps // 4) == 0:
            print(f"step {step}: held-out perplexity {perplexity(model, heldout):.4f}", flush=True)
    return model.eval()


def _lr_factor(step: int, steps: int) -> float:
    warmup = max(1, min(200, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Exponential of the mean cross-entropy of tokens 1 to T-1 of every window ``[windows, T]``."""
    total = sum(model(input_ids=batch, labels=batch).loss.double() * len(batch) for batch in windows.split(16))
    return math.exp(float(total) / len(windows))


@torch.no_grad()
def round_weights_(model: LlamaForCausalLM, scheme: QuantScheme) -> None:
    """Replaces the weight of every linear of the decoder blocks by its round-to-nearest value."""
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.copy_(dequantize(round_to_nearest(module.weight, scheme)))


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int = 200) -> str:
    """A continuation of the demo's prompt, up to the end of the document."""
    torch.manual_seed(0)
    prompt = tokenizer(DEMO_PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**prompt, max_new_tokens=tokens)  # type: ignore[misc]  # a protocol Llama fulfils at run time
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: builds the assets."""
    default = BuildSettings()
    parser = argparse.ArgumentParser(prog="python -m eqat_train.demo.build", description="Build the demo's assets.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stories", type=int, default=default.stories)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--weight-decay", type=float, default=default.weight_decay)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = vars(parser.parse_args(arguments))
    build(options.pop("out"), BuildSettings(**options))


if __name__ == "__main__":
    main()
