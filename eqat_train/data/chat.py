"""Conversations to token ids, with the loss on what the assistant says and nowhere else.

Two ways to know what the assistant says. Templates with ``{% generation %}`` blocks tell it themselves. For the others,
the conversation is rendered up to each assistant turn, with the generation prompt, and up to its end: what lies between
is the answer, its end-of-turn token included. That holds only while each rendering is a prefix of the whole, which is
checked; templates that rewrite earlier turns are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from formats.errors import InputError

from .windows import NO_LOSS

__all__ = ["encode_conversation"]

Messages = list[dict[str, str]]
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and its labels, -100 outside assistant turns.

    Args:
        messages: ``{"role": ..., "content": ...}`` each.
        tokenizer: a fast tokenizer with a chat template.
        where: file and row, for error messages.

    Raises:
        InputError: not a conversation, no chat template, or a template that rewrites earlier turns.
    """
    _check_messages(messages, where)
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: the tokenizer has no chat template for messages; "
            "give instruction and output columns, or a model whose tokenizer has one"
        )
    if GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        encoded: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, spoken = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [token if mask else NO_LOSS for token, mask in zip(ids, spoken, strict=True)]
    return _encode_by_prefixes(messages, tokenizer, where)


def _encode_by_prefixes(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    whole = _render(messages, tokenizer)
    answers: list[tuple[int, int]] = []  # [begin, end) characters
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:index], tokenizer, add_generation_prompt=True)
        through = _render(messages[: index + 1], tokenizer)
        if not (whole.startswith(through) and through.startswith(before)):
            raise InputError(
                f"{where}: the chat template rewrites earlier turns, so the answer in message {index + 1} cannot be "
                "told apart; mark answers in the template with {% generation %}, or keep one answer a conversation"
            )
        answers.append((len(before), len(through)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        token if any(begin <= first < end for begin, end in answers) else NO_LOSS
        for token, (first, _) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return cast(str, text)


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(f"{where}: messages is not a non-empty list of role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: message {number} has no role and content")
