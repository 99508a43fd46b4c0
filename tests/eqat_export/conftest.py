"""Tiny quantized checkpoints and the command run in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eqat_export.cli import run
from formats import QuantizedLinear, QuantScheme, get_format
from formats.affine import minmax_parameters, quantize
from formats.checkpoint import CheckpointWriter
from formats.model import open_checkpoint
from formats.model_writer import write_layer, write_model_config
from tests.tiny_models import save_tiny_model

MakeCheckpoint = Callable[..., Path]


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def eqat(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command in this process."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own history."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def dense_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Full-precision tiny models by architecture, each made once."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_tiny_model(tmp_path_factory.mktemp(architecture) / "dense", architecture)
        return made[architecture]

    return make


@pytest.fixture
def native(tmp_path: Path, dense_models: Callable[[str], Path]) -> MakeCheckpoint:
    """Makes a native checkpoint with zeros of 0 and maxq in a fifth of the groups each."""

    def make(
        name: str = "native",
        bits: int = 2,
        group_size: int = 32,
        architecture: str = "llama",
        scale_dtype: torch.dtype = torch.float16,
        format_id: str = "native",
    ) -> Path:
        scheme = QuantScheme(bits, group_size)
        folder = tmp_path / name
        form = get_format(format_id)
        with open_checkpoint(dense_models(architecture)) as source, CheckpointWriter(folder) as writer:
            layers = []
            for tensor_name in source.passthrough_names:
                tensor = source.get(tensor_name)
                module = tensor_name.removesuffix(".weight")
                if ".layers." not in tensor_name or tensor.dim() != 2:
                    continue
                bias = f"{module}.bias"
                layers += [tensor_name, bias]
                layer = with_extreme_zeros(
                    tensor, scheme, scale_dtype, source.get(bias).half() if bias in source.passthrough_names else None
                )
                write_layer(writer, form, module, layer)
            for tensor_name in source.passthrough_names:
                if tensor_name not in layers:
                    writer.add(tensor_name, source.get(tensor_name))
            ignore = ("model.embed_tokens", "lm_head")
            write_model_config(writer, source.reader.config, form, scheme, ignore)
            writer.copy_companions(source.reader.folder)
        return folder

    return make


def with_extreme_zeros(
    weight: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, bias: torch.Tensor | None
) -> QuantizedLinear:
    """A weight ``[out, in]`` quantized by min-max, but for two fifths of the groups whose zero is 0 or maxq."""
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    scales, zeros = minmax_parameters(weight, scheme, scale_dtype)
    order = torch.arange(rows * groups).view(rows, groups)
    zeros = torch.where(order % 5 == 0, 0, torch.where(order % 5 == 1, scheme.maxq, zeros))
    scales = scales.to(scale_dtype)
    return QuantizedLinear(quantize(weight, scales, zeros, scheme), scales, zeros.int(), scheme, bias=bias)


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Copies a single-file checkpoint and lets a function change its tensors in place."""

    def copy(source: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "edited") -> Path:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy
