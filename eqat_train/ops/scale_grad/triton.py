"""Scale gradients by one tiled GEMM whose tiles are reduced in registers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..packed import PackedWeight
from .tile_kernel import scale_grad_tile

__all__ = ["refusal", "scale_grad"]

# (BLOCK_N, BLOCK_K, BLOCK_T, warps, stages)
WIDE = (128, 256, 64, 8, 3)
SMALL = (64, 128, 32, 4, 3)
PANEL = 16
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def refusal(x: Tensor, grad_output: Tensor, packed: PackedWeight) -> str | None:
    """Why these arguments cannot be computed here, or None."""
    if x.dtype not in FLOATS or grad_output.dtype != x.dtype:
        return f"x is {x.dtype} and grad_output {grad_output.dtype}; the kernel takes one of float16, bfloat16, float32"
    if packed.bits not in (2, 3, 4, 8):
        return f"bits is {packed.bits}; the kernel takes 2, 3, 4 and 8"
    if packed.g_idx is not None:
        return "groups are in act-order; the kernel takes consecutive groups"
    if packed.group_size != -1 and packed.group_size not in (32, 64, 128) and packed.group_size % 256:
        return f"group_size is {packed.group_size}; the kernel takes 32, 64, 128, multiples of 256 and -1"
    return None


def scale_grad(x: Tensor, grad_output: Tensor, packed: PackedWeight) -> Tensor:
    """See :func:`eqat_train.ops.scale_grad.scale_grad`; the products' sums are not rounded to the dtype of ``x``."""
    x = x.reshape(-1, packed.in_features).contiguous()
    grad_output = grad_output.reshape(-1, packed.out_features).contiguous()
    return launch(x, grad_output, packed, SMALL if x.dtype == torch.float32 else WIDE)


def launch(
    x: Tensor, grad_output: Tensor, packed: PackedWeight, blocks: tuple[int, int, int, int, int], panel: int = PANEL
) -> Tensor:
    """The kernel with blocks of a given size: x ``[tokens, in]``, grad_output ``[tokens, out]``, both contiguous."""
    block_n, block_k, block_t, warps, stages = blocks
    tokens, out_features, in_features = x.shape[0], packed.out_features, packed.in_features
    tiles_n, tiles_k = triton.cdiv(out_features, block_n), triton.cdiv(in_features, block_k)
    group = in_features if packed.group_size == -1 else packed.group_size
    reach = min(group, block_k) if packed.group_size != -1 else block_k
    tiles_a_group = tiles_k if packed.group_size == -1 else triton.cdiv(group, block_k)
    rows = packed.groups * tiles_a_group
    # a last group that ends before its last tile leaves rows that nobody writes
    make = torch.empty if rows * reach - in_features < reach else torch.zeros
    partial = make((rows, out_features), dtype=torch.float32, device=x.device)
    descriptors = all(t.shape[1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, grad_output))
    descriptors = descriptors and tokens > 0
    scale_grad_tile[(tiles_n * tiles_k,)](
        TensorDescriptor.from_tensor(x, [block_t, block_k]) if descriptors else x,
        TensorDescriptor.from_tensor(grad_output, [block_t, block_n]) if descriptors else grad_output,
        packed.qweight,
        packed.qzeros,
        partial,
        tokens,
        in_features,
        out_features,
        packed.qzeros.shape[1],
        panel,
        BITS=packed.bits,
        REACH=reach,
        TILES_A_GROUP=tiles_a_group,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        DESCRIPTORS=descriptors,
        EXACT=x.dtype == torch.float32,
        num_warps=warps,
        num_stages=stages,
    )
    return partial if tiles_a_group == 1 else partial.unflatten(0, (packed.groups, tiles_a_group)).sum(dim=1)
