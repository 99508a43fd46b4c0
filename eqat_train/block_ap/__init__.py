"""Block-AP: every parameter of one decoder block at a time, trained against the full-precision block."""

from .run import run_block_ap
from .settings import BlockApReport, BlockApSettings, BlockReport

__all__ = ["BlockApReport", "BlockApSettings", "BlockReport", "run_block_ap"]
