"""The demo that ships with eqat: a small story-telling Llama, and text to calibrate and measure it with.

``stories`` writes the text, ``build`` trained the model; neither is needed to use the assets.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from formats.errors import InputError

__all__ = ["DEMO_PROMPT", "demo_folder", "demo_text"]

DEMO_PROMPT = "Once upon a time, a curious girl named Mina lived in a small house near the sea."
SPLITS = ("calibration", "heldout")


def demo_folder() -> Path:
    """The demo model as a Hugging Face folder: configuration, bf16 weights, tokenizer."""
    return Path(str(resources.files(__name__) / "assets"))


def demo_text(split: str) -> Path:
    """The xz text of a split, documents separated by a line ``<|endoftext|>``.

    Args:
        split: "calibration" (to quantize with) or "heldout" (to measure with).

    Raises:
        InputError: another split.
    """
    if split not in SPLITS:
        raise InputError(f"demo split is {split!r}; allowed are {', '.join(SPLITS)}")
    return demo_folder() / f"{split}.txt.xz"
