"""Writes a task for lm-eval from a text: which of four continuations is the document's own, as HellaSwag asks.

The wrong ones are continuations of other places of the same document. ``eqat eval --tasks continuations`` then runs it
without a hub:

    python -m benchmarks.recipes.continuations --data heldout.txt.xz --tokenizer ref-28m --out tasks
    eqat eval CHECKPOINT --tasks continuations --include-path tasks
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from eqat_train.data import open_source
from eqat_train.models.loading import load_tokenizer

__all__ = ["questions"]

CHOICES = 4
TASK = """\
task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""


def questions(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int, start: int, length: int, seed: int
) -> list[dict[str, object]]:
    """Questions of all documents that are long enough for as many places as there are choices.

    Args:
        texts: documents.
        tokenizer: counts their tokens; they are cut into starts and continuations where a token begins.
        count: of questions, at most.
        start: tokens before the continuation.
        length: tokens of a continuation.
        seed: of the places and of the order of the choices.

    Returns:
        ``start``, ``choices`` and ``answer``, the index of the right choice.
    """
    draw = random.Random(seed)
    found: list[dict[str, object]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = [
            ids[first : first + start + length] for first in range(0, len(ids) - start - length + 1, start + length)
        ]
        ends = [tokenizer.decode(piece[start:]) for piece in pieces]
        if len(set(ends)) < CHOICES:
            continue
        for piece, right in zip(pieces, ends, strict=True):
            wrong = [end for end in draw.sample(sorted(set(ends)), CHOICES) if end != right]
            choices = [right, *wrong[: CHOICES - 1]]
            draw.shuffle(choices)
            found.append({"start": tokenizer.decode(piece[:start]), "choices": choices, "answer": choices.index(right)})
    return draw.sample(found, min(count, len(found)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a model")
    parser.add_argument("--out", type=Path, required=True, help="folder for the task")
    parser.add_argument("--count", type=int, default=1500, help="questions")
    parser.add_argument("--start", type=int, default=48, help="tokens before the continuation")
    parser.add_argument("--length", type=int, default=16, help="tokens of a continuation")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    texts = open_source(given.data).texts()
    tokenizer = load_tokenizer(given.tokenizer)
    found = questions(texts, tokenizer, given.count, given.start, given.length, given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    data = given.out / "continuations.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in found), encoding="utf-8")
    (given.out / "continuations.yaml").write_text(TASK.format(data=data.absolute()), encoding="utf-8")
    print(f"{len(found)} questions in {given.out}")


if __name__ == "__main__":
    main()
