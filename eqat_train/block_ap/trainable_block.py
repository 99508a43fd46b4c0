"""A decoder block in training, and what becomes of it: "what you trained is what you ship".

Linears are replaced by fake-quant linears, chosen by type. Norms and biases are trained too and are rounded
straight-through, in every forward, to the dtype in which they will be stored; other matrices stay as they are.
``finish_`` turns the block into the shipped one: the same numbers in plain linears, and the tensors to store.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from formats import QuantizedLinear, QuantScheme, dequantize

from ..ops.straight_through import round_to_dtype
from ..starts import Start
from .capture import BlockCall
from .fake_quant_linear import FakeQuantLinear
from .untouched import untouched_parameters

__all__ = ["TrainableBlock", "put_numbers_"]


class TrainableBlock:
    """A block with fp32 parameters whose forward is that of the block as it will be stored.

    Args:
        block: full-precision block, fp32; its linears are replaced in place and their weights are reused.
        schemes: local path of each linear to quantize -> its bits and group_size.
        scale_dtype: dtype in which scales are stored.
        stored_dtypes: local parameter name -> dtype in which it is stored if it is not quantized.
        zero_range: lowest and highest zero-point of every linear; None for all of them.
        rounded: local paths of linears among ``schemes`` that are rounded to the nearest and not trained.
        start: of scales and zero-points, see :mod:`eqat_train.starts`.
    """

    def __init__(
        self,
        block: nn.Module,
        schemes: Mapping[str, QuantScheme],
        scale_dtype: torch.dtype,
        stored_dtypes: Mapping[str, torch.dtype],
        zero_range: tuple[int, int] | None = None,
        rounded: Container[str] = (),
        start: Start = "minmax",
    ) -> None:
        self.block, self._stored_dtypes = block, stored_dtypes
        self.linears: dict[str, FakeQuantLinear] = {}
        self._rounded: dict[str, QuantizedLinear] = {}
        for name, module in list(block.named_modules()):
            if name in schemes and isinstance(module, nn.Linear):
                linear = FakeQuantLinear(module, schemes[name], scale_dtype, zero_range, start)
                if name in rounded:
                    self._rounded[name] = linear.quantized(stored_dtypes.get(f"{name}.bias", torch.float16))
                    block.set_submodule(name, _plain_linear(self._rounded[name]))
                else:
                    self.linears[name] = linear
                    block.set_submodule(name, linear)
        quantized = {id(p) for linear in self.linears.values() for p in (linear.weight, linear.scales, linear.zeros)}
        untouched = set(untouched_parameters(block, {*self.linears, *self._rounded}))
        self.others = {
            name: p
            for name, p in block.named_parameters()
            if id(p) not in quantized and name not in untouched and name.rpartition(".")[0] not in self._rounded
        }
        block.eval()  # dropout stays off, as in the full-precision block that is the target

    def scales(self) -> list[nn.Parameter]:
        """Scales of every linear."""
        return [linear.scales for linear in self.linears.values()]

    def zeros(self) -> list[nn.Parameter]:
        """Zero-points of every linear."""
        return [linear.zeros for linear in self.linears.values()]

    def weights(self) -> list[nn.Parameter]:
        """Weights of every linear, and every other parameter that is trained."""
        return [*(linear.weight for linear in self.linears.values()), *self.others.values()]

    def leaves(self) -> Iterator[Tensor]:
        """What gradients are left in: dequantized weights that are held, else parameters, and every other parameter."""
        for linear in self.linears.values():
            yield from (
                (linear.weight, linear.scales, linear.zeros) if linear.dequantized is None else (linear.dequantized,)
            )
        yield from self.others.values()

    def __call__(self, call: BlockCall, hidden_states: Tensor) -> Tensor:
        """Output hidden states ``[batch, seq, hidden]``, differentiable in every parameter."""
        rounded = {
            name: round_to_dtype(parameter, self._stored_dtypes[name])
            for name, parameter in self.others.items()
            if self._stored_dtypes[name] != parameter.dtype
        }
        args, kwargs = call.arguments(hidden_states)
        output = functional_call(self.block, rounded, args, kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def finish_(self) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
        """Puts plain fp32 linears with the stored numbers back into the block and gives what is to be stored.

        Returns:
            Quantized layers by local name (bias inside), and every other trained parameter in its stored dtype.
        """
        biases = {f"{name}.bias" for name in self.linears}
        layers = self._rounded | {
            name: linear.quantized(self._stored_dtypes.get(f"{name}.bias", torch.float16))
            for name, linear in self.linears.items()
        }
        tensors = {
            name: parameter.detach().to(self._stored_dtypes[name], copy=True)
            for name, parameter in self.others.items()
            if name not in biases
        }
        put_numbers_(self.block, layers, tensors)
        return layers, tensors


@torch.no_grad()
def put_numbers_(block: nn.Module, layers: Mapping[str, QuantizedLinear], tensors: Mapping[str, Tensor]) -> None:
    """Makes a block compute with what is stored of it.

    Args:
        block: fp32, trainable or as loaded.
        layers: quantized layers by local name, on any device; plain fp32 linears take their places.
        tensors: every other stored parameter by local name.
    """
    device = next(block.parameters()).device
    for name, layer in layers.items():
        block.set_submodule(name, _plain_linear(layer).to(device))
    parameters = dict(block.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)
    block.requires_grad_(False)


def _plain_linear(layer: QuantizedLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(dequantize(layer), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
    return linear
