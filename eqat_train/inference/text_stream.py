"""Text of tokens as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream"]

UNFINISHED = "�"  # what tokenizers decode the first bytes of a character to
CONTEXT = 8  # tokens of the prompt that are decoded along, because a tokenizer drops the space of a first word


class TextStream:
    """Decodes tokens one by one; a character that several tokens make up comes with the last of them.

    Args:
        tokenizer: the model's.
        prompt: ids that came before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT:])
        self._start, self._shown = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that a token completes, perhaps none."""
        self._ids.append(token)
        return self._new_text(unfinished=False)

    def finish(self) -> str:
        """What is left of a character that was not completed."""
        return self._new_text(unfinished=True)

    def _new_text(self, *, unfinished: bool) -> str:
        shown, text = self._decode(self._ids[self._start : self._shown]), self._decode(self._ids[self._start :])
        if len(text) <= len(shown) or (text.endswith(UNFINISHED) and not unfinished):
            return ""
        # what was new becomes the context of what comes next, so that each token is decoded a few times only
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(shown) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
