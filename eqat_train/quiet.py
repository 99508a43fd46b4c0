"""Keeps what libraries remark while they are imported out of eqat's output."""

from __future__ import annotations

import logging
import os

__all__ = ["quiet_bars", "quiet_imports"]


def quiet_imports() -> None:
    """To be called before transformers is imported.

    torchao, which transformers imports where it is installed, and torch remark on each other's versions; eqat uses
    neither part.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_bars() -> None:
    """To be called before anything imports tqdm: lm-eval draws bars that nothing else turns off."""
    os.environ.setdefault("TQDM_DISABLE", "1")
