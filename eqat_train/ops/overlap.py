"""Kernels that start while the one before them still runs (programmatic dependent launch, compute capability 9.0 on).

In a decoding step hundreds of kernels of a few microseconds follow each other, and the gap between two of them is a
good part of each. A kernel launched with ``launch_pdl=OVERLAP`` begins as soon as the one before has let it, reads
weights, and waits before it touches anything else. CUDA graphs keep the overlap. :mod:`.launches` says when it is used.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["begin", "wait_for_inputs"]


@triton.jit
def begin(OVERLAP: tl.constexpr):  # noqa: N803
    """Lets the next kernel start. It will wait for this one to end, so this may come first of all."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):  # noqa: N803
    """Returns when the kernels before have ended and their results can be read; before any write as well."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
