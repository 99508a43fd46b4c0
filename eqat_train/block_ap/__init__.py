"""Block-AP: every parameter of one decoder block at a time, trained against the full-precision block."""

from .run import check_block_ap, run_block_ap
from .settings import BlockApReport, BlockApSettings, BlockReport

__all__ = ["BlockApReport", "BlockApSettings", "BlockReport", "check_block_ap", "run_block_ap"]
