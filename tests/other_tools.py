"""Checkpoints of tiny models made by the tools that other people make theirs with.

Nothing of ``formats`` writes any of them, but for the GGUF file that lends the gguf package its metadata.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eqat_export.convert import convert
from formats import QuantScheme
from formats.affine import minmax_parameters
from tests.gguf_files import rewritten
from tests.tiny_checkpoints import quantize_folder

__all__ = ["SOURCES", "Source", "Workshop"]

GROUP = 32


@dataclass(frozen=True)
class Source:
    """A checkpoint that another tool makes.

    Attributes:
        name: of the test.
        tool: which of ``Workshop``'s methods makes it.
        arguments: what that method is told.
        runtime: id of the runtime that has the tool's own reader.
        architecture: key of ``tests.tiny_models.ARCHITECTURES``.
        requires: modules that must be importable.
    """

    name: str
    tool: str
    arguments: tuple[Any, ...]
    runtime: str
    requires: tuple[str, ...]
    architecture: str = "llama"

    @property
    def missing(self) -> list[str]:
        """Those of the modules that are not installed."""
        return [module for module in self.requires if importlib.util.find_spec(module) is None]


def _sources() -> dict[str, Source]:
    gptq, rounding, compressed = ("gptqmodel",), ("auto_round",), ("compressed_tensors",)
    listed = [
        # bits, sym, desc_act, layout
        Source("gptqmodel-w4-sym-act-order", "gptqmodel", (4, True, True, "gptq"), "gptqmodel", gptq),
        Source("gptqmodel-w4-sym", "gptqmodel", (4, True, False, "gptq"), "gptqmodel", gptq),
        Source("gptqmodel-w3-v2-act-order", "gptqmodel", (3, False, True, "gptq_v2"), "gptqmodel", gptq),
        Source("gptqmodel-w2-v1", "gptqmodel", (2, False, False, "gptq"), "gptqmodel", gptq),
        Source("gptqmodel-awq", "awq", (), "gptqmodel", gptq, "qwen2"),
        # bits, sym, packing
        Source("auto-round-w2-sym", "auto_round", (2, True, "auto_round:auto_gptq"), "auto-round", rounding),
        Source("auto-round-w4", "auto_round", (4, False, "auto_round:auto_awq"), "auto-round", rounding),
        # bits, sym, group_size, actorder
        Source("compressed-tensors-w4-sym", "compressed", (4, True, GROUP, None), "transformers", compressed, "qwen2"),
        Source("compressed-tensors-w3", "compressed", (3, False, GROUP, None), "transformers", compressed),
        Source("compressed-tensors-w2", "compressed", (2, False, 64, None), "transformers", compressed),
        Source("compressed-tensors-w8-channel", "compressed", (8, False, None, None), "transformers", compressed),
        # bits, dtype
        Source("mlx-lm-w2", "mlx", (2, "float16"), "mlx", ("mlx_lm",)),
        Source("mlx-lm-w3", "mlx", (3, "float32"), "mlx", ("mlx_lm",), "qwen2"),
        Source("mlx-lm-w4", "mlx", (4, "bfloat16"), "mlx", ("mlx_lm",)),
        # block type of the layers
        Source("gguf-q4_0", "gguf", ("Q4_0",), "transformers", ("gguf",)),
        Source("gguf-q8_0", "gguf", ("Q8_0",), "transformers", ("gguf",), "qwen2"),
    ]
    return {source.name: source for source in listed}


SOURCES = _sources()


@dataclass
class Workshop:
    """Makes sources in a folder, each once; those of one tool in one process where that has to be its own."""

    folder: Path
    dense: Callable[[str], Path]
    _made: dict[str, Path] = field(default_factory=dict)

    def make(self, source: Source) -> Path:
        """The checkpoint, which nobody may change."""
        if source.name not in self._made:
            getattr(self, f"_{source.tool}")(source)
        return self._made[source.name]

    def _gptqmodel(self, source: Source) -> None:
        jobs = self._alike(source)
        told = [[str(self.folder / job.name), str(job.arguments[0]), *map(str, job.arguments[1:])] for job in jobs]
        self._run("gptqmodel_models.py", source, told)
        self._made |= {job.name: self.folder / job.name for job in jobs}

    def _auto_round(self, source: Source) -> None:
        jobs = self._alike(source)
        told = [[str(self.folder / job.name), *map(str, job.arguments)] for job in jobs]
        self._run("auto_round_model.py", source, told)
        for job in jobs:
            [self._made[job.name]] = (self.folder / job.name).iterdir()  # it makes a folder of its own inside

    def _alike(self, source: Source) -> list[Source]:
        same = (source.tool, source.architecture)
        return [job for job in SOURCES.values() if (job.tool, job.architecture) == same and not job.missing]

    def _run(self, script: str, source: Source, jobs: Sequence[Sequence[str]]) -> None:
        path = Path(__file__).parent / "eqat_export" / script
        model = str(self.dense(source.architecture))
        made = subprocess.run(
            [sys.executable, str(path), model, *(word for job in jobs for word in job)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]

    def _awq(self, source: Source) -> None:
        """Layers by gptqmodel's packer, in a folder as AutoAWQ writes it."""
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # noqa: PLC0415

        model, out = self._model(source), self.folder / source.name
        for name, linear in _linears(model).items():
            weight, bias = linear.weight.data, linear.bias
            scales, zeros = minmax_parameters(weight, QuantScheme(4, GROUP), torch.float16)
            packed = AwqTorchLinear(4, GROUP, False, False, weight.shape[1], weight.shape[0], bias is not None)
            scales = scales.half()
            grid = scales.float().repeat_interleave(GROUP, dim=1)
            shift = zeros.float().repeat_interleave(GROUP, dim=1)
            linear.weight.data = ((weight / grid).round() + shift).clamp(0, 15).sub(shift).mul(grid)
            linear.bias = None if bias is None else nn.Parameter(bias.data.half())
            packed.pack(linear, scales, zeros)
            model.set_submodule(name, packed)
        model.config.quantization_config = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "modules_to_not_convert": None,
        }
        self._save(model, out, source)

    def _compressed(self, source: Source) -> None:
        """A model compressed and saved by the library."""
        from compressed_tensors.compressors import ModelCompressor  # noqa: PLC0415
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config  # noqa: PLC0415
        from compressed_tensors.quantization.utils import calculate_qparams  # noqa: PLC0415

        bits, sym, group_size, actorder = source.arguments
        model, out = self._model(source).half(), self.folder / source.name
        weights = {
            "num_bits": bits,
            "symmetric": sym,
            "strategy": "group" if group_size else "channel",
            "group_size": group_size,
            "actorder": actorder,
        }
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
        config = QuantizationConfig.model_validate({"config_groups": groups, "ignore": ["lm_head"]})
        apply_quantization_config(model, config)
        for linear in _linears(model).values():
            columns = linear.in_features
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)) if actorder else slice(None)
            groups_of = linear.weight.data[:, order].unflatten(1, (-1, group_size or columns))
            scale, zero = calculate_qparams(groups_of.amin(2), groups_of.amax(2), linear.quantization_scheme.weights)
            linear.weight_scale.data = scale.half()
            if not sym:
                linear.weight_zero_point.data = zero.to(linear.weight_zero_point.dtype)
            if actorder:
                linear.weight_g_idx.data[order] = (torch.arange(columns) // group_size).to(linear.weight_g_idx.dtype)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        self._save(model, out, source)
        compressor.update_config(out)

    def _mlx(self, source: Source) -> None:
        import mlx_lm  # noqa: PLC0415

        bits, dtype = source.arguments
        out, model = self.folder / source.name, str(self.dense(source.architecture))
        mlx_lm.convert(model, str(out), quantize=True, q_bits=bits, q_group_size=GROUP, dtype=dtype)
        self._made[source.name] = out

    def _gguf(self, source: Source) -> None:
        [kind] = source.arguments
        plain, lent = self.folder / f"{source.name}-native", self.folder / f"{source.name}-lent.gguf"
        quantize_folder(self.dense(source.architecture), plain, QuantScheme(4, GROUP))
        convert(plain, lent, "gguf")
        out = self.folder / f"{source.name}.gguf"
        self._made[source.name] = rewritten(lent, out, lambda name: kind if "blk" in name else "F16")

    def _model(self, source: Source) -> Any:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        return AutoModelForCausalLM.from_pretrained(self.dense(source.architecture), dtype=torch.float32).eval()

    def _save(self, model: Any, out: Path, source: Source) -> None:
        model.half().save_pretrained(out)
        for path in self.dense(source.architecture).glob("tokenizer*"):
            shutil.copy(path, out)
        self._made[source.name] = out


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the blocks, by module path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }
