"""MLX's affine quantization: the dense bit stream along in_features, ``w = q * scale + bias``.

There is no zero-point: ``bias = -s * z`` stands in its place, in the dtype of the scales. In 16 bits that product is
exact only for some z, so a group whose product is not is stored as its complement ``(maxq - q, -s, maxq - z)``
where that comes out nearer. Which z are exact, layout, readers and sources: ``mlx.md``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .affine import dequantize, expand_groups
from .base import NO_OVERRIDES, EncodedLayer, Exactness, FormatOption, PackedFormat
from .container import SourceModel
from .errors import CheckpointError, InputError, InvalidLayerError, UnsupportedSchemeError
from .packed import PackedLinear
from .qweight import config_integer
from .rounding import holds_scales
from .types import SCALE_DTYPES, GroupedLayer, QuantizedLinear, QuantScheme, all_equal, by_group, negated

__all__ = ["MlxFormat"]

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_SLACK = 1 + 2.0**-10  # a divisor rounded in fp32 before it is rounded to the stored dtype


class MlxFormat(PackedFormat):
    """Weights for mlx-lm: ``weight``, ``scales`` and ``biases``.

    Args:
        scale_dtype: dtype of scales and biases: float16, bfloat16 or float32.
    """

    id: ClassVar[str] = "mlx"
    title: ClassVar[str] = "MLX affine, for mlx-lm and LM Studio on Apple silicon"
    marker: ClassVar[str] = "scales"
    local_names: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases", "bias")
    rounds_zeros: ClassVar[bool] = True
    embeddings: ClassVar[bool] = True
    config_keys: ClassVar[tuple[str, ...]] = ("quantization", "quantization_config")
    options: ClassVar[tuple[FormatOption, ...]] = (
        FormatOption("scale-dtype", tuple(_DTYPES), "float16", "dtype of scales and biases; float32 slows activations"),
    )

    def __init__(self, scale_dtype: torch.dtype | str = torch.float16) -> None:
        name = str(scale_dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise InputError(f"mlx scale-dtype is {name!r}; allowed are {', '.join(_DTYPES)}")
        self.scale_dtype = _DTYPES[name]

    def as_stored(self, dtypes: Mapping[str, torch.dtype]) -> MlxFormat:
        """With the dtype that a checkpoint's scales have."""
        found = dtypes.get("scales")
        return MlxFormat(found) if found in SCALE_DTYPES else self

    def check(self, scheme: QuantScheme, out_features: int, in_features: int) -> None:
        """2, 3, 4, 5, 6 or 8 bits and groups of 32, 64 or 128 consecutive input features."""
        if scheme.bits not in _BITS:
            raise UnsupportedSchemeError(
                f"mlx holds 2, 3, 4, 5, 6 and 8 bits, not {scheme.bits}; use one of those or --to native"
            )
        if scheme.desc_act:
            raise UnsupportedSchemeError("mlx has no g_idx, which desc_act needs", instead=("gptq",))
        if scheme.group_size not in _GROUPS or in_features % scheme.group_size:
            fitting = [str(size) for size in _GROUPS if in_features % size == 0]
            way_out = f"; these fit: {', '.join(fitting)}" if fitting else ""
            raise UnsupportedSchemeError(
                f"group_size is {scheme.group_size} and in_features {in_features}; mlx takes groups of 32, 64 or 128 "
                f"that divide in_features{way_out}",
                instead=("gptq_v2",),
            )

    def encode_packed(self, layer: PackedLinear) -> EncodedLayer:
        """weight uint32 ``[out, words]``, scales and biases ``[out, groups]``, and bias if there is one.

        Raises:
            UnsupportedSchemeError: a scale, or both of a group's biases, beyond the stored dtype's largest number.
        """
        stored = self._parameters(layer)
        words, scales = layer.words, stored.scales
        if stored.mirrored is not None:
            words, scales = layer.complement(stored.mirrored).words, negated(scales, stored.mirrored)
        tensors = EncodedLayer(
            weight=words.T.contiguous().view(torch.uint32),
            scales=scales.contiguous(),
            biases=stored.biases.contiguous(),
        )
        tensors.exactness = self._exactness(layer, stored)
        if tensors.exactness is Exactness.ROUNDED and stored.error is not None and self._only_biases_rounded(layer):
            tensors.group_error = stored.error
        if layer.bias is not None:
            bias = layer.bias.to(self.scale_dtype)  # another dtype would promote the layer's outputs
            tensors["bias"] = bias if torch.equal(bias.to(layer.bias.dtype), layer.bias) else layer.bias.contiguous()
        return tensors

    def decode_packed(self, tensors: Mapping[str, Tensor], scheme: QuantScheme) -> PackedLinear:
        """The canonical layer with ``z = -bias / scale``.

        Raises:
            CheckpointError: also a bias that is no whole number of scales within the stored dtype's rounding, or one
                whose zero-point lies outside of 0..maxq: no zero-point says what such a file says.
        """
        out_features, in_features = self.features(_shapes(tensors), scheme)
        _check_tensors(tensors, scheme, out_features, in_features)
        zeros = _zeros(tensors["scales"], tensors["biases"], scheme)
        symmetric = all_equal(zeros, 2 ** (scheme.bits - 1))
        found = QuantScheme(scheme.bits, scheme.group_size, sym=symmetric)
        words = tensors["weight"].view(torch.int32).T
        try:
            return PackedLinear(words, tensors["scales"], zeros, found, in_features, bias=tensors.get("bias"))
        except InvalidLayerError as exc:
            raise CheckpointError(str(exc)) from exc

    def stored_weight(self, tensors: Mapping[str, Tensor], layer: QuantizedLinear, rows: slice = slice(None)) -> Tensor:
        """``q * scale + bias`` in fp32, as MLX computes it there."""
        weight = layer.codes[rows].float()
        scales, biases = tensors["scales"][rows].float(), tensors["biases"][rows].float()
        for view, groups in by_group(weight, layer.scheme.width(layer.in_features)):
            view.mul_(scales[:, groups, None]).add_(biases[:, groups, None])
        return weight

    def zero_error(self, tensors: Mapping[str, Tensor], layer: GroupedLayer) -> Tensor | None:
        """``|bias + s * z|``: all codes of a group are shifted alike, unless fp32 rounds their products."""
        if tensors["scales"].dtype == torch.float32 and not _products_exact(layer):
            return None
        return (tensors["biases"].double() + layer.scales.double() * layer.zeros).abs()

    def features(self, shapes: Mapping[str, tuple[int, ...]], scheme: QuantScheme) -> tuple[int, int]:
        """Rows of weight, and the codes that a row's words hold."""
        for name in ("weight", "scales", "biases"):
            if len(shapes.get(name, ())) != 2:
                found = f"has shape {list(shapes[name])}" if name in shapes else "is missing"
                raise CheckpointError(f"{name} {found}; a layer has two-dimensional weight, scales and biases")
        rows, words = shapes["weight"]
        return rows, words * 32 // scheme.bits

    def quantization_config(
        self,
        scheme: QuantScheme,
        ignore: Collection[str] = ("lm_head",),
        overrides: Mapping[str, QuantScheme] = NO_OVERRIDES,
    ) -> dict[str, Any]:
        """The model-wide fields, False for each module in full precision, an object for each override."""
        own = {name: _fields(override) for name, override in overrides.items()}
        return _fields(scheme) | dict.fromkeys(ignore, False) | own

    def create(self, out: Path, source: SourceModel, *, shard_size: int, force: bool) -> None:
        """A folder, as ever.

        Raises:
            UnsupportedSchemeError: the model is a mixture of experts.
        """
        expert = next((name for name in source.layer_names if ".experts." in name), None)
        if expert is not None:
            raise UnsupportedSchemeError(
                f"layer {expert}: mlx-lm takes a layer's experts stacked in one (switch_mlp), which is not written",
                instead=("gptq_v2", "compressed-tensors"),
            )

    def adapted_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """With the rotary embedding's fields at the top as well, where most of mlx-lm's models look for them.

        transformers 5 writes them into ``rope_parameters`` alone; mlx-lm would take its defaults and say nothing.
        """
        rope = config.get("rope_parameters")
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            return dict(config)
        found = {key: rope[key] for key in _ROPE_KEYS if key in rope}
        kind = rope.get("rope_type", "default")
        if kind != "default":
            found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"} | {"type": kind}
        return found | dict(config)

    def parse_config(self, config: Mapping[str, Any]) -> QuantScheme:
        """bits and group_size; any mode but affine is refused."""
        mode = config.get("mode", "affine")
        if mode != "affine":
            raise CheckpointError(
                f"mode is {mode!r}; only affine is read, the others hold floating-point codes and no zero-points"
            )
        try:
            return QuantScheme(config_integer(config, "bits"), config_integer(config, "group_size"))
        except InvalidLayerError as exc:
            raise CheckpointError(f"quantization configuration: {exc}") from exc

    def layer_scheme(self, config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]]) -> QuantScheme:
        """The layer's own object, or the model-wide scheme."""
        own = config.get(name, True)
        if own is False:
            raise CheckpointError("the configuration says False, not quantized, but it has scales")
        if own is not True and not isinstance(own, dict):
            raise CheckpointError(f"the configuration says {own!r}; expected an object, true or false")
        return self.parse_config({**config, **own} if isinstance(own, dict) else config)

    def detect(self, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """A configuration of mlx-lm's, which has no quant_method, beside scales."""
        told = {"group_size", "bits"} <= set(config) and not {"quant_method", "checkpoint_format"} & set(config)
        return told and any(name.endswith(".scales") for name in names)

    def exactness(self, layer: QuantizedLinear | PackedLinear) -> Exactness:
        """EXACT when every bias is exact as it is, EXACT_WEIGHTS when it takes complements, otherwise ROUNDED."""
        return self._exactness(layer, self._parameters(layer))

    def exact_option(self) -> str | None:
        """fp32."""
        return None if self.scale_dtype == torch.float32 else "--scale-dtype float32"

    def bound(self, layer: QuantizedLinear) -> Tensor:
        """``|s' - s| * |q - z| + |b + s' * z|`` with stored s' and b, plus fp32's rounding of products and sum."""
        stored = self._parameters(layer)
        scales = layer.scales.double()
        off = (stored.scales.double() - scales).abs()
        error = torch.zeros_like(scales) if stored.error is None else stored.error.double()
        limits = torch.finfo(torch.float32)
        # no |q * s|, |z * s| or |w| is larger than maxq * |s|
        slack = 3 * limits.eps / 2 * layer.scheme.maxq * scales.abs() + limits.smallest_normal
        rounded = (off > 0) | (error > 0)
        if self.scale_dtype == torch.float32:
            rounded |= ~_group_products_exact(layer)
        limit = torch.where(rounded, error + slack, 0.0).float()
        bound = expand_groups(limit, layer.in_features, layer.scheme.group_size)  # [out, in]
        if bool((off > 0).any()):
            steps = dequantize(replace(layer, scales=torch.ones_like(layer.scales))).abs_()
            bound += expand_groups(off.float(), layer.in_features, layer.scheme.group_size) * steps
        return bound

    def _parameters(self, layer: GroupedLayer) -> _Stored:
        scales = layer.scales.to(self.scale_dtype)
        low, high = scales.aminmax()
        if not (math.isfinite(low) and math.isfinite(high)):
            self._refuse("scale", float(layer.scales.abs().max()))
        # a product of a 16-bit number and an integer of 8 bits is exact in fp32
        wide = torch.float64 if self.scale_dtype == torch.float32 else torch.float32
        exact, zeros = scales.to(wide), layer.zeros.to(wide)
        plain = torch.rsub(exact * zeros, 0.0)  # biases of the groups as they are; 0 - 0 has no sign
        biases = plain.to(self.scale_dtype)
        error = biases.to(wide).sub_(plain).abs_()
        if not bool(error.any()):
            return _Stored(None, scales, biases, None)
        mirrored = exact * (layer.scheme.maxq - zeros)  # and of their complements
        others = mirrored.to(self.scale_dtype)
        other_error = others.to(wide).sub_(mirrored).abs_()
        where = other_error < error
        error = torch.where(where, other_error, error)
        largest = float(error.max())
        if not math.isfinite(largest):
            self._refuse("bias", float(plain.double().abs().max()))
        return _Stored(where, scales, torch.where(where, others, biases), error if largest else None)

    def _exactness(self, layer: GroupedLayer, stored: _Stored) -> Exactness:
        if stored.error is not None or not holds_scales(layer.scales, self.scale_dtype):
            return Exactness.ROUNDED
        if self.scale_dtype == torch.float32 and not _products_exact(layer):
            return Exactness.ROUNDED
        if stored.mirrored is not None:
            return Exactness.EXACT_WEIGHTS
        lost = bool((layer.scales == 0).any()) and bool(((layer.scales == 0) & (layer.zeros != 0)).any())
        return Exactness.EXACT_WEIGHTS if lost else Exactness.EXACT  # 0 * z keeps nothing of z

    def _only_biases_rounded(self, layer: GroupedLayer) -> bool:
        """False where scales are rounded as well, or fp32 rounds their products with codes."""
        return holds_scales(layer.scales, self.scale_dtype) and self.scale_dtype != torch.float32

    def _refuse(self, what: str, value: float) -> None:
        name = str(self.scale_dtype).removeprefix("torch.")
        raise UnsupportedSchemeError(
            f"a {what} is {value:g}; {name} ends at {torch.finfo(self.scale_dtype).max:g}; use --scale-dtype float32"
        )


@dataclass(frozen=True)
class _Stored:
    """How a layer's parameters are written, ``[out, groups]`` each.

    Attributes:
        mirrored: groups that are written as their complement; None where none is.
        scales: in the stored dtype, before their sign is changed where mirrored.
        biases: in the stored dtype, signs changed already.
        error: ``|bias - exact product|``; None where all are 0.
    """

    mirrored: Tensor | None
    scales: Tensor
    biases: Tensor
    error: Tensor | None


def _zeros(scales: Tensor, biases: Tensor, scheme: QuantScheme) -> Tensor:
    """int32 ``[out, groups]`` zero-points.

    ``mx.quantize`` divides an edge e of the group by the whole number z, and stores ``scale = e / z`` and ``bias = -e``
    rounded: ``|bias + scale * z|`` is then at most half a unit in the last place of bias and z times one of scale.
    """
    s, b = scales.double(), biases.double()
    steps = torch.where(s == 0, 0.0, -b / torch.where(s == 0, 1.0, s))
    zeros = steps.round()
    limit = (_half_ulp(b, biases.dtype) + zeros.abs() * _half_ulp(s, scales.dtype)) * _SLACK
    free = ~((b + s * zeros).abs() <= limit) | ((s == 0) & (b != 0))
    if bool(free.any()):
        row, group = (int(index) for index in free.nonzero()[0])
        raise CheckpointError(
            f"{int(free.sum())} of {free.numel()} biases are no whole number of scales (output {row}, group {group}: "
            f"{float(steps[row, group]):.4f} scales); without zero-points no other format holds this layer, and "
            "mlx_lm.convert --dequantize makes ordinary weights of it"
        )
    outside = (zeros < 0) | (zeros > scheme.maxq)
    if bool(outside.any()):
        row, group = (int(index) for index in outside.nonzero()[0])
        raise CheckpointError(
            f"{int(outside.sum())} of {outside.numel()} biases give zero-points outside of 0..{scheme.maxq} (output "
            f"{row}, group {group}: {float(zeros[row, group]):.0f}): its weights all have one sign; no other format "
            "holds this layer, and mlx_lm.convert --dequantize makes ordinary weights of it"
        )
    return zeros.to(torch.int32)


def _half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance from each float64 value to the next larger one of ``dtype``."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent  # value = m * 2 ** exponent, 0.5 <= |m| < 1
    return torch.ldexp(torch.full_like(values, limits.eps / 4), exponent).clamp(
        min=limits.smallest_normal * limits.eps / 2
    )


def _group_products_exact(layer: GroupedLayer) -> Tensor:
    """bool ``[out, groups]``: codes times scale, and what is added to it, need no rounding in fp32.

    So it is for significands of at most ``24 - bits`` bits, and for z = 0, where nothing is added.
    """
    low = layer.scales.float().contiguous().view(torch.int32) & layer.scheme.maxq
    return (low == 0) | (layer.zeros == 0)


def _products_exact(layer: GroupedLayer) -> bool:
    return bool(_group_products_exact(layer).all())


def _fields(scheme: QuantScheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_tensors(tensors: Mapping[str, Tensor], scheme: QuantScheme, out_features: int, in_features: int) -> None:
    parameters = (out_features, scheme.groups(max(in_features, 1)))
    for name in ("scales", "biases"):
        if tuple(tensors[name].shape) != parameters:
            raise CheckpointError(
                f"{name} has shape {list(tensors[name].shape)}; {scheme} with {out_features} x {in_features} features "
                f"takes {list(parameters)}"
            )
        if tensors[name].dtype not in SCALE_DTYPES:
            raise CheckpointError(
                f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}; allowed are {', '.join(_DTYPES)}"
            )
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{name} hold NaN or infinity; every one must be finite")
    if tensors["weight"].dtype != torch.uint32:
        raise CheckpointError(f"weight is {str(tensors['weight'].dtype).removeprefix('torch.')}; allowed is uint32")
