"""Other tools' quantization on the protocol of the recipes: each from its own package, weights dequantized, perplexity.

    python -m benchmarks.recipes.peers ref-28m rtn:2:64 hqq:2:64 gptq:2:64 auto-round:2:64:1000 \
        --data calibration.txt.xz --evaluate wikitext2_test_raw.txt.xz heldout.txt.xz --csv peers.csv

A peer is ``NAME:BITS:GROUP``, of auto-round also ``:ITERATIONS``. Calibration windows are random ones of 1024 tokens,
as training draws them. Every peer quantizes the linears of the blocks and nothing else; ``full:16:0`` is the model
itself. Rows go to a CSV file at once.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before torch reads it: gptqmodel and auto-round would compile what runs for seconds
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eqat_train.data import evaluation_windows, open_source, token_stream, training_windows
from eqat_train.evaluation.perplexity import perplexity
from eqat_train.models.loading import load_dense_model, load_tokenizer
from formats import QuantScheme
from formats.affine import dequantize, round_to_nearest

from .tables import COLUMNS

__all__ = ["PEERS", "Job"]

WINDOW = 1024
EVALUATED = 600_000  # tokens of a text, at most
DAMPING = 0.01  # of GPTQ's Hessians, its paper's


@dataclass(frozen=True)
class Job:
    """One model to quantize.

    Attributes:
        folder: of the full-precision model.
        bits: of the codes.
        group: weights that share a scale.
        windows: int64 token ids ``[samples, seq_len]`` for calibration.
        device: where the tool works.
        seed: of the tool, where it has one.
        iterations: of the tool, where it iterates.
    """

    folder: Path
    bits: int
    group: int
    windows: Tensor
    device: torch.device
    seed: int
    iterations: int


@dataclass(frozen=True)
class Outcome:
    """A quantized model with plain weights, the settings that matter, the calibration tokens and the package."""

    model: PreTrainedModel
    setting: str
    tokens: int
    package: str


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the blocks by module path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }


def full(job: Job) -> Outcome:
    """The model as it is; its row says what the others lose."""
    return Outcome(load_dense_model(job.folder, torch.float32, job.device), "as it is, in fp32", 0, "eqat")


def rtn(job: Job) -> Outcome:
    """Min-max round to nearest, eqat's own."""
    model = load_dense_model(job.folder, torch.float32, job.device)
    scheme = QuantScheme(job.bits, job.group)
    for linear in block_linears(model).values():
        linear.weight.data = dequantize(round_to_nearest(linear.weight.data, scheme))
    return Outcome(model, "asymmetric min-max", 0, "eqat")


def hqq(job: Job) -> Outcome:
    """HQQ's quantizer in the groups that everybody uses (axis 1); its zero-points are 16-bit floats."""
    from hqq.core.quantize import Quantizer, hqq_base_quant_config  # noqa: PLC0415

    settings = hqq_base_quant_config(nbits=job.bits, group_size=job.group, axis=1)["weight_quant_params"]
    model = load_dense_model(job.folder, torch.float32, job.device)
    for linear in block_linears(model).values():
        codes, meta = Quantizer.quantize(linear.weight.data, device=str(job.device), **settings)
        codes, meta = Quantizer.to_inplace(codes, meta, job.device)  # scales and zeros as they are stored: fp16
        linear.weight.data = Quantizer.dequantize(codes, meta).float()
    return Outcome(model, "axis 1, 16-bit floating zeros", 0, "hqq")


def gptq(job: Job) -> Outcome:
    """GPTQ by gptqmodel: asymmetric, without act-order; its checkpoint is read back by eqat."""
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415

    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group,
        sym=False,
        desc_act=False,
        format="gptq_v2",
        damp_percent=DAMPING,
        offload_to_disk=False,
        pack_impl="original",
    )
    calibration = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in job.windows.cpu()]
    tool = GPTQModel.load(str(job.folder), config, device=str(job.device), dtype=torch.float16)
    tool.quantize(calibration, batch_size=8)
    setting = f"asymmetric, no act-order, damping {DAMPING}"
    return Outcome(_saved(job, tool.save), setting, job.windows.numel(), "gptqmodel")


def auto_round(job: Job) -> Outcome:
    """AutoRound, asymmetric; its checkpoint is read back by eqat."""
    from auto_round import AutoRound  # noqa: PLC0415

    calibration = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in job.windows.cpu()]
    tool = AutoRound(
        str(job.folder),
        bits=job.bits,
        group_size=job.group,
        sym=False,
        iters=job.iterations,
        nsamples=len(job.windows),
        seqlen=job.windows.shape[1],
        dataset=calibration,
        seed=job.seed,
        device_map=str(job.device),
        enable_torch_compile=False,
    )
    model = _saved(job, lambda out: tool.quantize_and_save(output_dir=out, format="auto_round:auto_gptq"))
    return Outcome(model, f"{job.iterations} iterations", job.windows.numel(), "auto-round")


def _saved(job: Job, save: Callable[[str], object]) -> PreTrainedModel:
    """What a tool wrote, through eqat's reader; some tools make a folder of their own inside."""
    folder = Path(tempfile.mkdtemp(prefix="eqat-peer-"))
    try:
        save(str(folder / "model"))
        found = next((folder / "model").rglob("config.json")).parent
        return load_dense_model(found, torch.float32, job.device)
    finally:
        shutil.rmtree(folder)


PEERS: dict[str, Callable[[Job], Outcome]] = {
    "full": full,
    "rtn": rtn,
    "hqq": hqq,
    "gptq": gptq,
    "auto-round": auto_round,
}


def main() -> None:
    """Runs the peers one after another; one that fails ends the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("peers", nargs="+", metavar="NAME:BITS:GROUP[:ITERATIONS]")
    parser.add_argument("--data", required=True)
    parser.add_argument("--evaluate", nargs=2, required=True, metavar=("WIKITEXT2", "HELDOUT"))
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=EVALUATED, help="of each text that is evaluated, at most")
    parser.add_argument("--shared", action="store_true", help="others use the device too: leave the time empty")
    given = parser.parse_args()
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tokenizer = load_tokenizer(given.model)
    texts = [token_stream(open_source(text), tokenizer) for text in (given.data, *given.evaluate)]
    calibration, _ = training_windows(texts[0], WINDOW, given.samples, 64, given.seed)
    windows = [evaluation_windows(text, WINDOW, given.tokens) for text in texts[1:]]
    for peer in given.peers:
        kind, bits, group, *rest = peer.split(":")
        iterations = int(rest[0]) if rest else 200
        job = Job(given.model, int(bits), int(group), calibration.input_ids, device, given.seed, iterations)
        started = time.perf_counter()
        outcome = PEERS[kind](job)
        seconds = time.perf_counter() - started
        found = [f"{perplexity(outcome.model, each):.2f}" for each in windows]
        packages = ["torch", "transformers"] + [outcome.package] * (outcome.package != "eqat")
        versions = " ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
        values = ("peers", given.model.name, kind, outcome.setting, bits, group, given.seed, *found)
        values += (
            "" if given.shared else f"{seconds:.1f}",
            outcome.tokens,
            name,
            f"python {platform.python_version()} {versions}",
        )
        write(given.csv, dict(zip(COLUMNS, values, strict=True)))


def write(path: Path, row: dict[str, object]) -> None:
    """Prints a row and appends it to a CSV file, with a header if the file is new."""
    print(*row.values(), sep=" | ", flush=True)
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
