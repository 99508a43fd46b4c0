"""Instruction data: the loss is on the answers, all of them and nothing else."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import PreTrainedTokenizerBase

from eqat_train.data import NO_LOSS, InstructionWindows, instruction_windows, open_source
from eqat_train.models.loading import load_tokenizer
from formats.errors import InputError

PLAIN_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# Shows only the last answer in full, as templates that drop earlier reasoning do.
REWRITING_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' and not loop.last %}...{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Sum of 1 and 2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And é?"},
    {"role": "assistant", "content": "é is a letter."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """One token a byte; 0 ends a text; no chat template."""
    return load_tokenizer(save_tiny_model(tmp_path / "model"))


def load(
    tmp_path: Path,
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int = 400,
    samples: int = 100,
    validation: int = 0,
    seed: int = 0,
) -> InstructionWindows:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return instruction_windows(
        open_source(str(file)), tokenizer, seq_len, samples=samples, validation_samples=validation, seed=seed
    )


def learned(found: InstructionWindows, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> str:
    """The text of the labels."""
    labels = found.train.labels[row]
    return tokenizer.decode(labels[labels != NO_LOSS])


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_labels_of_a_conversation_are_exactly_the_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    tokenizer.chat_template = template
    found = load(tmp_path, [{"messages": CONVERSATION}], tokenizer)
    assert learned(found, tokenizer) == "3</s>é is a letter.</s>"
    counted = found.train.labels != NO_LOSS
    assert torch.equal(found.train.labels[counted], found.train.input_ids[counted])
    assert tokenizer.decode(found.train.input_ids[0]) == "".join(
        f"<{turn['role']}>{turn['content']}</s>" for turn in CONVERSATION
    )


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_answers_only(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = REWRITING_TEMPLATE
    found = load(tmp_path, [{"messages": CONVERSATION[:3]}], tokenizer)
    assert learned(found, tokenizer) == "3</s>"
    with pytest.raises(InputError, match=r"row 1: the chat template rewrites earlier turns.*message 3"):
        load(tmp_path, [{"messages": CONVERSATION}], tokenizer)


def test_messages_without_a_chat_template_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="no chat template"):
        load(tmp_path, [{"messages": CONVERSATION}], tokenizer)


ALPACA_ROW = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}


def test_columns_use_the_alpaca_prompt_and_end_with_the_end_of_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = load(tmp_path, [ALPACA_ROW], tokenizer)
    text = tokenizer.decode(found.train.input_ids[0])
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 2\n\n### Response:\n3<|endoftext|>"
    )
    assert learned(found, tokenizer) == "3<|endoftext|>"


def test_a_row_without_input_uses_the_shorter_alpaca_prompt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = load(tmp_path, [{"instruction": "Say yes.", "output": "yes"}], tokenizer)
    text = tokenizer.decode(found.train.input_ids[0])
    assert "### Input" not in text and "further context" not in text
    assert text.endswith("### Instruction:\nSay yes.\n\n### Response:\nyes<|endoftext|>")


def test_columns_use_the_chat_template_when_there_is_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    found = load(tmp_path, [ALPACA_ROW], tokenizer)
    assert tokenizer.decode(found.train.input_ids[0]) == "<user>Add the numbers.\n\n1 2</s><assistant>3</s>"
    assert learned(found, tokenizer) == "3</s>"


def test_windows_are_padded_without_loss_to_the_longest_example(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    rows = [{"instruction": "q", "output": "a" * count} for count in (3, 9)]
    found = load(tmp_path, rows, tokenizer)
    lengths = [len(f"<user>q</s><assistant>{row['output']}</s>") for row in rows]
    assert found.train.seq_len == max(lengths)
    short = min(range(2), key=lambda row: len(learned(found, tokenizer, row)))
    assert (found.train.labels[short, min(lengths) :] == NO_LOSS).all()
    assert (found.train.input_ids[short, min(lengths) :] == 0).all()
    assert sorted(learned(found, tokenizer, row) for row in range(2)) == ["aaa</s>", "aaaaaaaaa</s>"]


def test_answers_beyond_the_window_are_cut_or_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    rows = [
        {"instruction": "q", "output": "fits"},
        {"instruction": "q", "output": "a" * 100},
        {"instruction": "q" * 100, "output": "never seen"},
    ]
    found = load(tmp_path, rows, tokenizer, seq_len=40)
    assert (len(found.train), found.dropped, found.truncated) == (2, 1, 1)
    assert found.train.seq_len == 40
    assert all(found.train.take(torch.tensor([row])).loss_tokens for row in range(2))


def test_no_answer_within_the_window_at_all_names_the_option(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(InputError, match="--e2e-seq-len"):
        load(tmp_path, [ALPACA_ROW], tokenizer, seq_len=10)


def test_examples_are_drawn_without_repeating_and_validation_is_apart(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    rows = [{"instruction": "q", "output": f"answer {number:03d}"} for number in range(60)]
    found = load(tmp_path, rows, tokenizer, samples=20, validation=3)
    assert found.validation is not None
    answers = [learned(found, tokenizer, row) for row in range(len(found.train))]
    labels = found.validation.labels
    held_out = {tokenizer.decode(row[row != NO_LOSS]) for row in labels}
    assert len(set(answers)) == len(answers) == 20
    assert len(held_out) == 2 and not held_out & set(answers)  # a tenth of the 23 drawn
    other = load(tmp_path, rows, tokenizer, samples=20, validation=3, seed=1)
    assert {learned(other, tokenizer, row) for row in range(20)} != set(answers)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "output": ""}, "row 1: output is ''"),
        ({"instruction": 5, "output": "a"}, "row 1: instruction is 5"),
        ({"messages": []}, "row 1: messages is not a non-empty list"),
        ({"messages": [{"role": "user"}]}, "row 1: message 1 has no role and content"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        load(tmp_path, [row], tokenizer)


def test_a_truncated_cache_entry_is_made_again(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"instruction": "say {i}", "output": "{i}"}}\n' for i in range(20)), encoding="utf-8")

    def windows() -> torch.Tensor:
        source = open_source(str(file))
        found = instruction_windows(source, tokenizer, 400, samples=10, validation_samples=2, seed=0)
        return found.train.input_ids

    whole = windows()
    (entry,) = (tmp_path / "cache").iterdir()
    os.truncate(entry, entry.stat().st_size - 100)
    assert torch.equal(windows(), whole)
