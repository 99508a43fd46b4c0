"""Compiles the decode kernels of some layers for an NVIDIA GPU without one, runs their PTX, prints relative errors.

A process of its own: under Triton's interpreter, as the other tests run, nothing is compiled.

    python decode_programs.py '[[bits, group_size, in, out, rows, dtype, scales_dtype, plan or null], ...]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eqat_train.ops.dequant_matmul import decode
from tests.packed_reference import make_case
from tests.ptx_machine import Machine

NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


class Launch:
    """Stands where a kernel stood, and takes its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.programs = grid[0]

        def launch(*arguments: Any, num_warps: int, maxnreg: int | None, launch_pdl: bool, **constants: Any) -> None:
            self.arguments = arguments
            names = self.kernel.arg_names
            given = dict(zip(names, arguments, strict=False))
            fixed = constants | {name: None for name, value in given.items() if value is None}
            kinds = {n: NAMES[v.dtype] if isinstance(v, Tensor) else "i32" for n, v in given.items() if v is not None}
            signature = {name: kinds.get(name, "constexpr") for name in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, v in enumerate(arguments) if isinstance(v, Tensor)}
            source = ASTSource(self.kernel, signature, fixed, aligned)
            options = {"num_warps": num_warps, "maxnreg": maxnreg, "launch_pdl": launch_pdl}
            self.ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

        return launch


def error(
    bits: int, group: int, in_features: int, out: int, rows: int, dtype: str, scales_dtype: str, plan: list[int] | None
) -> float:
    """Relative error of a layer with a bias, to float64."""
    case = make_case(bits, group, out, in_features)
    x = torch.randn(rows, in_features).to(getattr(torch, dtype))
    bias = torch.randn(out).to(x.dtype)
    scales = case.scales.to(getattr(torch, scales_dtype))
    name = "decode_row_kernel" if rows == 1 else "decode_rows_kernel"
    kernel = getattr(decode, name)
    launch = Launch(kernel)
    setattr(decode, name, launch)
    y = decode.decode_matmul(x, case.packed, scales, bias, decode.Plan(*plan) if plan else None)
    setattr(decode, name, kernel)
    y.fill_(torch.nan)
    passed = [a for a in launch.arguments if a is not None]
    machine = Machine(launch.ptx, [array(a) if isinstance(a, Tensor) else a for a in passed])
    for program in range(launch.programs):
        machine.run(program)
    written = machine.bytes_of(5, y.nbytes).view(np.int16)
    y = torch.from_numpy(written).view(y.dtype).view(y.shape).double()
    expected = x.double() @ case.weight(scales.double()).t() + bias.double()
    return float((y - expected).norm() / expected.norm())


def array(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32).numpy()


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps([error(*case) for case in json.loads(sys.argv[1])]))
