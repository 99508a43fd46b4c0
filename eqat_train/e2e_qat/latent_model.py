"""A model in training: fp32 weights behind fake quantization, and the tensors of its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from formats import QuantScheme, get_format
from formats.checkpoint import CheckpointReader, CheckpointWriter
from formats.model_writer import encode_layer, write_model_config

from ..block_ap.fake_quant_linear import FakeQuantLinear
from ..data import TokenWindows
from ..models.targets import Targets
from ..ranks.rows import Rows
from .fake_quant_rows import FakeQuantRows
from .input_powers import input_powers
from .row_linear import RowLinear
from .settings import QatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LatentModel", "build_latent_model"]


@dataclass(frozen=True)
class _Rounded:
    """A parameter that is not quantized: the model computes with it as it is stored, training moves its master."""

    parameter: nn.Parameter
    master: nn.Parameter
    stored: torch.dtype


class LatentModel:
    """A model whose quantized linears compute with the weights that would be stored now.

    Attributes:
        model: in evaluation mode, so dropout is off.
        layers: the decoder layers.
        linears: module path -> fake-quant linear.
        groups: optimizer's parameter groups, each with its peak learning rate as ``peak``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        linears: dict[str, FakeQuantLinear],
        settings: QatSettings,
    ) -> None:
        self.model, self.layers, self.linears, self.settings = model, layers, linears, settings
        self._rounded: dict[str, _Rounded] = {}
        self.groups: list[dict[str, object]] = []
        model.requires_grad_(False)
        self._train([linear.weight for linear in linears.values()], settings.lr_weight)
        self._train([linear.scales for linear in linears.values()], settings.lr_scale)
        self._train([linear.zeros for linear in linears.values()], settings.lr_zero)

    def _train(self, parameters: list[nn.Parameter], lr: float) -> None:
        if lr and parameters:
            for parameter in parameters:
                parameter.requires_grad_(True)
            self.groups.append({"params": parameters, "lr": lr, "peak": lr})

    def train_others(self, reader: CheckpointReader) -> None:
        """Trains norms and biases too: everything of one axis."""
        if not self.settings.lr_norm:
            return
        quantized = {f"{name}.{local}" for name in self.linears for local in ("scales", "zeros")}
        for name, parameter in self.model.named_parameters():
            if parameter.dim() == 1 and name not in quantized and name in reader.tensors:
                parameter.requires_grad_(True)
                master = nn.Parameter(parameter.detach().clone())
                self._rounded[name] = _Rounded(parameter, master, reader.tensors[name].dtype)
        masters = [rounded.master for rounded in self._rounded.values()]
        if masters:
            lr = self.settings.lr_norm
            self.groups.append({"params": masters, "lr": lr, "peak": lr})

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that the optimizer moves, in the order of the groups."""
        return [parameter for group in self.groups for parameter in group["params"]]  # type: ignore[attr-defined]

    @property
    def rows(self) -> dict[Tensor, Rows]:
        """Of the parameters that ranks share, this rank's rows; empty in a process alone."""
        shared = [layer for layer in self.linears.values() if isinstance(layer, FakeQuantRows)]
        return {parameter: layer.rows for layer in shared for parameter in (layer.weight, layer.scales, layer.zeros)}

    @property
    def masters(self) -> dict[str, nn.Parameter]:
        """Norms and biases by name, whole on every rank."""
        return {name: rounded.master for name, rounded in self._rounded.items()}

    def hand_gradients_over(self) -> None:
        """Gives the masters the gradients of what the model computed with: rounding is straight-through."""
        for rounded in self._rounded.values():
            rounded.master.grad, rounded.parameter.grad = rounded.parameter.grad, None

    @torch.no_grad()
    def take_masters(self) -> None:
        """Rounds the masters to their stored dtype into the model; after every optimizer step."""
        for rounded in self._rounded.values():
            rounded.parameter.copy_(rounded.master.to(rounded.stored))

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """Module path -> the codes that would be stored now, of this rank's rows, uint8 on the CPU."""
        return {name: layer.stored()[0].cpu() for name, layer in self.linears.items()}

    @torch.no_grad()
    def follow_writing(self, reader: CheckpointReader) -> None:
        """Takes part in rank 0's ``write``, which gathers one layer after the other."""
        for name in reader.tensors:
            if (layer := self.linears.get(name.removesuffix(".weight"))) is not None:
                layer.quantized()

    @torch.no_grad()
    def write(self, writer: CheckpointWriter, reader: CheckpointReader, targets: Targets, scheme: QuantScheme) -> None:
        """Writes the native checkpoint: quantized layers, trained norms and biases, everything else as it was.

        Of several ranks the first does; the others call ``follow_writing``.
        """
        native = get_format("native")
        own = {f"{name}.{local}": name for name in self.linears for local in ("weight", "bias")}
        for name in reader.tensors:
            layer = own.get(name)
            if layer is None:
                rounded = self._rounded.get(name)
                writer.add(
                    name, reader.get(name) if rounded is None else rounded.master.detach().to("cpu", rounded.stored)
                )
            elif name.endswith(".weight"):
                bias = reader.tensors.get(f"{layer}.bias")
                quantized = self.linears[layer].quantized(torch.float16 if bias is None else bias.dtype)
                encoded = encode_layer(native, layer, quantized)
                writer.add_layer(layer, {local: tensor.cpu() for local, tensor in encoded.items()})
        write_model_config(writer, reader.config, native, scheme, targets.ignore, overrides=targets.overrides(scheme))
        writer.copy_companions(reader.folder)


def build_latent_model(
    model: PreTrainedModel, reader: CheckpointReader, targets: Targets, settings: QatSettings, data: TokenWindows
) -> LatentModel:
    """Puts fake quantization in front of the weights of a full-precision model's targets.

    Args:
        model: fp32, on the device to train on; becomes the latent model's. Of several ranks one with rows, see
            :mod:`eqat_train.e2e_qat.row_model`.
        reader: of the same model.
        targets: its layers to quantize.
        settings: see :class:`QatSettings`.
        data: training windows; the start ``activations`` looks at the first of them.
    """
    names = [name for name, scheme in targets.schemes.items() if scheme is not None]
    powers = input_powers(model, names, data, settings) if settings.start == "activations" else {}
    linears: dict[str, FakeQuantLinear] = {}
    for name, scheme in targets.schemes.items():
        if scheme is not None:
            dense = model.get_submodule(name)
            if not isinstance(dense, nn.Linear):
                raise TypeError(f"{name} is no linear layer")
            start = scheme, settings.scale_dtype, settings.zero_range, settings.start, powers.get(name)
            linears[name] = (
                FakeQuantRows(dense, *start) if isinstance(dense, RowLinear) else FakeQuantLinear(dense, *start)
            )
            model.set_submodule(name, linears[name])
    layers = model.get_submodule(targets.path)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{targets.path} is no list of layers")
    latent = LatentModel(model, layers, linears, settings)
    latent.train_others(reader)
    latent.take_masters()
    return latent
