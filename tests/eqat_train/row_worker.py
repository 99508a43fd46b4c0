"""What each of three ranks does for ``test_qat_ranks.py``: a linear layer in rows beside a whole one, in float64.

    torchrun --nproc-per-node 3 row_worker.py

Prints, on rank 0, the largest difference for every number of rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from eqat_train.e2e_qat.row_linear import linear_of_rows
from eqat_train.ranks.rows import Rows

TOKENS = (4, 0, 3)  # of each rank


def difference(count: int, rank: int, ranks: int) -> float:
    draw = torch.Generator().manual_seed(count)
    weight, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((count, 5), (count,)))
    inputs = [torch.randn(tokens, 5, generator=draw, dtype=torch.float64) for tokens in TOKENS]
    rows = Rows(count, rank, ranks)
    x, own, b = (tensor.clone().requires_grad_() for tensor in (inputs[rank], weight[rows.own], bias))
    y = linear_of_rows(x, own, b, rows)
    y.square().sum().backward()
    expected_y, expected = _whole(inputs[rank], weight, bias)
    summed = sum(_whole(each, weight, bias)[1][1] for each in inputs)
    assert isinstance(summed, Tensor) and x.grad is not None and own.grad is not None and b.grad is not None
    pairs = [(y, expected_y), (x.grad, expected[0]), (own.grad, summed[rows.own]), (b.grad, expected[2])]
    assert all(one.shape == other.shape for one, other in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs if one.numel())


def _whole(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = F.linear(*leaves)
    return y, torch.autograd.grad(y.square().sum(), leaves)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    worst = torch.tensor([difference(count, dist.get_rank(), dist.get_world_size()) for count in (6, 7, 4, 2)])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(worst.tolist())
    dist.destroy_process_group()
