"""Layers and folders the format tests share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from formats import QuantizedLinear, QuantScheme

LayerFactory = Callable[..., QuantizedLinear]


@pytest.fixture
def make_layer() -> LayerFactory:
    """Random layers; ``zeros`` is "random", "low" (all 0), "high" (all maxq) or "mixed" (every value occurs)."""

    def build(
        bits: int = 4,
        group_size: int = 32,
        out_features: int = 64,
        in_features: int = 128,
        *,
        zeros: str = "mixed",
        scale_dtype: torch.dtype = torch.float16,
        bias: bool = False,
        act_order: bool = False,
        seed: int = 0,
    ) -> QuantizedLinear:
        generator = torch.Generator().manual_seed(seed)
        scheme = QuantScheme(bits, group_size, desc_act=act_order)
        shape = (out_features, scheme.groups(in_features))
        values = {
            "low": torch.zeros(shape, dtype=torch.int32),
            "high": torch.full(shape, scheme.maxq, dtype=torch.int32),
            "random": torch.randint(0, scheme.maxq + 1, shape, generator=generator, dtype=torch.int32),
            "mixed": torch.arange(shape[0] * shape[1], dtype=torch.int32).view(shape) % (scheme.maxq + 1),
        }[zeros]
        order = torch.randperm(in_features, generator=generator)
        return QuantizedLinear(
            torch.randint(0, scheme.maxq + 1, (out_features, in_features), generator=generator, dtype=torch.uint8),
            (torch.rand(shape, generator=generator) * 0.1 + 0.001).to(scale_dtype),
            values,
            QuantScheme(bits, group_size, sym=bool((values == 2 ** (bits - 1)).all()), desc_act=act_order),
            bias=torch.randn(out_features, generator=generator).half() if bias else None,
            g_idx=(order // scheme.width(in_features)).to(torch.int32) if act_order else None,
        )

    return build


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint folder with the safetensors library itself."""

    def build(tensors: dict[str, torch.Tensor], config: dict | None = None, name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
        return folder

    return build
