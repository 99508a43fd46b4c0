"""Trains the second model that recipes are tried on: a small Qwen3, another family than the reference model's Llama.

It has what a Llama lacks (norms of queries and keys, tied embeddings) and reads the reference model's tokens. It is
trained from scratch on the calibration text. That text is too short to learn much from its next tokens, and a model
that knows little loses little by quantization: ``--teacher`` learns from the reference model's predictions instead.
One seed gives one model on one machine.

    cd shared/data
    python -m benchmarks.recipes.second_model --tokenizer ../models/ref-28m --teacher ../models/ref-28m \
        --data calibration.txt.xz --evaluate wikitext2_test_raw.txt.xz heldout.txt.xz --epochs 6 --out qwen3-21m
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from eqat_train.data import evaluation_windows, open_source, token_stream
from eqat_train.evaluation.perplexity import perplexity

__all__ = ["build", "learning_rate", "train_"]

WINDOW = 1024
EVALUATED = 600_000  # tokens of a text, at most
WARMUP = 0.05  # of the steps
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
REPORTED = 100  # steps between two lines


def build(vocabulary: int, end: int, hidden: int = 512, layers: int = 6, seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 of fp32 parameters as transformers initializes it: 18.9M in the blocks and 2.1M shared embeddings.

    Args:
        vocabulary: entries of the tokenizer.
        end: id that ends a document.
        hidden: a multiple of 128, so that groups of 128 divide every linear.
        layers: decoder blocks.
        seed: of the initialization.
    """
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def train_(
    model: PreTrainedModel,
    windows: torch.Tensor,
    *,
    epochs: int,
    batch: int,
    peak: float,
    seed: int = 0,
    limit: int | None = None,
    teacher: PreTrainedModel | None = None,
) -> list[float]:
    """Training in bf16 autocast with fp32 parameters, on next tokens or on a teacher's predictions of them.

    Args:
        model: on its device; trained in place.
        windows: int64 token ids ``[windows, seq_len]`` on the same device.
        epochs: passes over the windows, each in an order of its own.
        batch: windows a step; the ragged rest of an epoch is left out.
        peak: learning rate.
        seed: of the order.
        limit: stop after so many steps; the schedule is that of the whole run.
        teacher: of the same vocabulary, on the same device; the loss is the divergence from it (KL).

    Returns:
        The loss of every step, nats a token.
    """
    norms = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    groups = [{"params": others, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=BETAS, fused=True)
    order = torch.Generator().manual_seed(seed)
    steps_of_epoch = len(windows) // batch
    losses: list[torch.Tensor] = []
    model.train()
    for _ in range(epochs):
        rows = torch.randperm(len(windows), generator=order)[: steps_of_epoch * batch].view(-1, batch)
        for chosen in rows[: None if limit is None else limit - len(losses)]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(len(losses), epochs * steps_of_epoch, peak)
            ids = windows[chosen.to(windows.device)]
            with torch.autocast(ids.device.type, torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits  # [batch, seq_len, vocabulary]
            student = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
            if teacher is None:
                loss = F.nll_loss(student, ids[:, 1:].flatten())
            else:
                with torch.no_grad():
                    wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
                loss = F.kl_div(student, wanted.float().log_softmax(-1), log_target=True, reduction="batchmean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            if len(losses) % REPORTED == 0:
                print(f"step {len(losses)} of {epochs * steps_of_epoch}: loss {losses[-1].item():.3f}", flush=True)
    model.eval()
    return torch.stack(losses).tolist()


def main() -> None:
    """Trains, saves in bf16, and prints the loss, the time and the perplexities."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder with the tokenizer to use")
    parser.add_argument("--teacher", help="folder of a model to learn from")
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--evaluate", nargs="*", default=[], help="texts to measure perplexity on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="windows of 1024 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many, to try the script")
    parser.add_argument("--tokens", type=int, default=EVALUATED, help="of each text that is evaluated, at most")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} exists")

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    stream = token_stream(open_source(given.data), tokenizer)
    windows = evaluation_windows(stream, WINDOW).input_ids.to(given.device)
    print(f"{len(windows)} windows of {WINDOW} tokens", flush=True)
    model = build(len(tokenizer), tokenizer.eos_token_id, given.hidden, given.layers, given.seed).to(given.device)
    teacher = None
    if given.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=torch.bfloat16).to(given.device)
    started = time.perf_counter()
    losses = train_(
        model,
        windows,
        epochs=given.epochs,
        batch=given.batch,
        peak=given.lr,
        seed=given.seed,
        limit=given.steps,
        teacher=teacher,
    )
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    digest = hashlib.sha256((given.out / "model.safetensors").read_bytes()).hexdigest()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters, {len(losses)} steps of {given.batch} x {WINDOW} tokens in {seconds:.1f} s")
    print(f"loss {losses[0]:.3f} -> {sum(losses[-20:]) / len(losses[-20:]):.3f}; sha256 {digest[:16]}")
    model.to(torch.float32)
    for text in given.evaluate:
        ids = evaluation_windows(token_stream(open_source(text), tokenizer), WINDOW, given.tokens)
        print(f"{Path(text).name.partition('.')[0]}: perplexity {perplexity(model, ids):.3f}", flush=True)


if __name__ == "__main__":
    main()
