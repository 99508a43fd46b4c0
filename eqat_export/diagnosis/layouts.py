"""3-bit layouts under another layout's label."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from eqat_export.findings import Finding, error
from formats.errors import CheckpointError
from formats.model import Checkpoint
from formats.qweight import QweightFormat
from formats.three_bit import Layout, layout_by_shape, layout_by_values

__all__ = ["check_layouts"]

_BITS = 3
_NAMES: dict[Layout, str] = {
    "dense": "GPTQ's dense stream",
    "planar": "gptqmodel's planar gptq_p",
    "native": "EfficientQAT's own ten codes a word",
}
_MOST_LAYERS = 4  # decoded to compare values


def check_layouts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Compares what the shapes and codes of 3-bit layers say with how the checkpoint is read."""
    form = checkpoint.format
    if not isinstance(form, QweightFormat):
        return
    expected: Layout = "native" if form.per_word(_BITS) else "dense"
    wrong: dict[Layout, list[str]] = defaultdict(list)
    compared = 0
    for name in checkpoint.layer_names:
        in_features = _in_features(checkpoint, name)
        if in_features is None:
            continue
        possible = layout_by_shape(checkpoint.layer_shapes(name)["qweight"][0], in_features)
        if possible and expected not in possible and "native" in (expected, *possible):
            wrong[possible[0]].append(name)
        elif possible == ("dense", "planar") and compared < _MOST_LAYERS:
            compared += 1
            found = layout_by_values(checkpoint.get(f"{name}.qweight"), _groups(checkpoint, name, in_features))
            if found not in (None, expected):
                wrong[found].append(name)
    for layout, names in wrong.items():
        read_as = f"{form.id}, {_NAMES[expected]}"
        if layout == "planar":
            said = f"their codes look uniform as {read_as}, and like weights as {_NAMES[layout]}"
            fix = "set checkpoint_format and format to 'gptq_p', and let gptqmodel save it as 'gptq_v2' for others"
        else:
            rows = checkpoint.layer_shapes(names[0])["qweight"][0]
            said = (
                f"their shapes are {_NAMES[layout]}, not {read_as}; {names[0]} has {rows} rows for "
                f"{_in_features(checkpoint, names[0])} in_features"
            )
            fix = f"read it with --from {'native' if layout == 'native' else 'gptq_v2'}"
        yield error("qweight", f"{len(names)} 3-bit layers are mislabelled: {said}; {fix}")


def _in_features(checkpoint: Checkpoint, name: str) -> int | None:
    """From g_idx, or groups times group_size; None for a layer that is not 3-bit or has no such shapes."""
    try:
        scheme = checkpoint.layer_scheme(name)
    except CheckpointError:
        return None
    shapes = checkpoint.layer_shapes(name)
    if scheme.bits != _BITS or len(shapes.get("qweight", ())) != 2:
        return None
    if len(shapes.get("g_idx", ())) == 1:
        return shapes["g_idx"][0]
    if scheme.group_size > 0 and len(shapes.get("scales", ())) == 2:
        return shapes["scales"][0] * scheme.group_size
    return None


def _groups(checkpoint: Checkpoint, name: str, in_features: int) -> torch.Tensor:
    if f"{name}.g_idx" in checkpoint.reader.tensors:
        return checkpoint.get(f"{name}.g_idx").long().clamp(min=0)
    return torch.arange(in_features) // checkpoint.layer_scheme(name).width(in_features)
