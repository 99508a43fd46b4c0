"""Training and evaluation data: texts and conversations to windows of token ids."""

from .instructions import InstructionWindows, instruction_windows
from .sources import DataSource, open_source
from .streams import evaluation_windows, token_stream, training_windows
from .windows import NO_LOSS, TokenWindows

__all__ = [
    "NO_LOSS",
    "DataSource",
    "InstructionWindows",
    "TokenWindows",
    "evaluation_windows",
    "instruction_windows",
    "open_source",
    "token_stream",
    "training_windows",
]
