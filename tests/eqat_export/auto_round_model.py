"""Quantizes a model with auto-round itself, in a process of its own: it starts workers that import the main module.

Usage: python auto_round_model.py SOURCE (OUT BITS SYM PACKING)...
"""

from __future__ import annotations

import sys

from auto_round import AutoRound


def main() -> None:
    source, *jobs = sys.argv[1:]
    for out, bits, sym, packing in zip(*[iter(jobs)] * 4, strict=True):
        quantizer = AutoRound(
            source,
            bits=int(bits),
            group_size=32,
            sym=sym == "True",
            iters=0,  # round to nearest
            disable_opt_rtn=True,
            device_map="cpu",
            enable_torch_compile=False,
            disable_model_free=True,
        )
        quantizer.quantize_and_save(output_dir=out, format=packing)


if __name__ == "__main__":
    main()
