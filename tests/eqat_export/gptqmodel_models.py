"""Quantizes a model with gptqmodel itself, in a process of its own: it reads its thread counts when imported.

Usage: python gptqmodel_models.py SOURCE (OUT BITS SYM DESC_ACT FORMAT)...
"""

from __future__ import annotations

import os
import sys

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its pools need as many on any machine
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main() -> None:
    source, *jobs = sys.argv[1:]
    ids = torch.randint(1, 257, (8, 1, 24), generator=torch.Generator().manual_seed(0))
    calibration = [{"input_ids": sample, "attention_mask": torch.ones_like(sample)} for sample in ids]
    for out, bits, sym, desc_act, layout in zip(*[iter(jobs)] * 5, strict=True):
        config = QuantizeConfig(
            bits=int(bits),
            group_size=32,
            sym=sym == "True",
            desc_act=desc_act == "True",
            format=layout,
            offload_to_disk=False,
            pack_impl="original",  # its fast packer compiles an extension first
        )
        model = GPTQModel.load(source, config, device="cpu", dtype=torch.float16)
        model.quantize(calibration, batch_size=1)
        model.save(out)


if __name__ == "__main__":
    main()
