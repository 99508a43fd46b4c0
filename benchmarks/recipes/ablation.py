"""Quality of training recipes, a row a change: every variant is trained and measured in the same way, over seeds.

A YAML file names the variants by table, each with what it changes in a recipe that ships with eqat:

    recipe: best
    settings: {bits: 2, group: 64, e2e_seq_len: 1024}
    tables:
      leads:
        best: {}
        next-token loss: {distill: 0}
        paper: {recipe: paper, samples: 2048, seq_len: 1024}
        averaged: {loop: averaged}  # of benchmarks/recipes/leads.py

Every variant is trained as ``eqat train`` would, and its checkpoint measured as by ``eqat eval --dtype float32``. Each
line of the CSV file is one variant and one seed; what the file has already is not run again. The column ``seconds`` is
the run's own clock, and empty where several processes shared the device.

    python -m benchmarks.recipes.ablation benchmarks/recipes/ablation.yaml --model shared/models/ref-28m \
        --data calibration.txt.xz --processes 4 \
        --evaluate wikitext2=wikitext2_test_raw.txt.xz heldout=heldout.txt.xz:600000
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.recipes.leads import LOOPS, training_by
from eqat_train.commands import silence_libraries
from eqat_train.config import build_config, read_config
from eqat_train.data import evaluation_windows, open_source, token_stream
from eqat_train.evaluation.perplexity import perplexity
from eqat_train.hardware import resolve_device
from eqat_train.models.loading import load_dense_model, load_tokenizer
from eqat_train.options import TrainConfig
from eqat_train.pipeline.run_files import CONFIG_FILE
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter
from formats.errors import InputError

__all__ = ["Text", "Variant", "measure", "read_variants", "token_passes"]

RESULTS = Path(__file__).parents[1] / "results" / "ablation.csv"
# What a line of the file is a measurement of.
KEYS = ("table", "model", "variant", "setting", "seed")


@dataclass(frozen=True)
class Variant:
    """What one row of a table trains.

    Attributes:
        table: that the row is in.
        name: of the row.
        recipe: it starts from.
        loop: of :mod:`benchmarks.recipes.leads`; None is the recipe's own.
        changes: what the row itself changes.
        settings: the changes, and what is the same in all rows.
    """

    table: str
    name: str
    recipe: str
    loop: str | None
    changes: Mapping[str, Any]
    settings: Mapping[str, Any]

    def keys(self, model: str, seed: int) -> dict[str, str]:
        """The columns that say what a line measures."""
        loop = [f"loop {self.loop}"] if self.loop else []
        setting = ", ".join([self.recipe, *loop, *(f"{name} {value}" for name, value in self.changes.items())])
        return dict(zip(KEYS, (self.table, Path(model).name, self.name, setting, str(seed)), strict=True))


@dataclass(frozen=True)
class Text:
    """What is measured: ``NAME=FILE`` or ``NAME=FILE:TOKENS`` for no more than the first tokens."""

    name: str
    file: str
    tokens: int | None

    @classmethod
    def parse(cls, text: str) -> Text:
        """From the command line."""
        name, found, file = text.partition("=")
        file, _, tokens = file.partition(":")
        if not (name and found and file and (tokens.isdecimal() or not tokens)):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE or NAME=FILE:TOKENS")
        return cls(name, file, int(tokens) if tokens else None)


def read_variants(file: Path) -> list[Variant]:
    """The rows of a YAML file; a row's settings go before the file's."""
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    variants = []
    for table, rows in plan["tables"].items():
        for name, changes in rows.items():
            own = dict(changes or {})
            recipe, loop = own.pop("recipe", plan["recipe"]), own.pop("loop", None)
            if loop not in (None, *LOOPS):
                raise InputError(f"{file}, {name}: loop {loop!r} is none of {', '.join(LOOPS)}")
            settings = plan.get("settings", {}) | own
            if unknown := settings.keys() - {field.name for field in fields(TrainConfig)}:
                raise InputError(f"{file}, {name}: {', '.join(sorted(unknown))} is no setting of eqat train")
            build_config(settings | {"model": "any"}, recipe=recipe)  # refuses wrong values before hours of runs
            variants.append(Variant(table, name, recipe, loop, own, settings))
    return variants


def token_passes(config: Mapping[str, Any]) -> int:
    """Tokens that training reads, each as often as it is read, from the settings that a run saved."""
    block = config["samples"] * config["seq_len"] * config["epochs"]
    whole = config["e2e_samples"] * config["e2e_seq_len"] * config["e2e_epochs"]
    stages = {"all": (block, whole), "block-ap": (block,), "e2e-qp": (whole,), "e2e-qat": (whole,)}
    return sum(stages[config["stage"]])


def measure(
    variant: Variant, seed: int, model: str, data: str, texts: Sequence[Text], seq_len: int, folder: Path
) -> dict[str, Any]:
    """Trains one variant and measures it.

    Args:
        variant: what to train.
        seed: of the run.
        model: full precision.
        data: training text.
        texts: to measure.
        seq_len: tokens in a measured window.
        folder: for the checkpoint, which goes again.

    Returns:
        Columns of the CSV file, one for each text's perplexity among them.
    """
    silence_libraries()
    out = Path(tempfile.mkdtemp(dir=folder)) / "out"
    given = {"model": model, "data": data, "out": str(out), "seed": seed}
    config: TrainConfig = build_config(dict(variant.settings) | given, recipe=variant.recipe)
    with training_by(variant.loop):
        result = train(config, Reporter())
    saved = read_config(out / CONFIG_FILE)
    row: dict[str, Any] = dict(variant.keys(model, seed))
    row |= perplexities(out, texts, seq_len, config.device)
    shutil.rmtree(out.parent)
    scheme = {"bits": saved["bits"], "group_size": saved["group"]}
    return row | scheme | {"seconds": round(result.seconds, 1), "tokens": token_passes(saved)}


def perplexities(folder: Path, texts: Sequence[Text], seq_len: int, device: str = "auto") -> dict[str, float]:
    """Perplexity of a model by text, computed in float32."""
    tokenizer = load_tokenizer(folder)
    model = load_dense_model(folder, torch.float32, resolve_device(device))
    values = {}
    for text in texts:
        windows = evaluation_windows(token_stream(open_source(text.file), tokenizer), seq_len, text.tokens)
        values[text.name] = round(perplexity(model, windows), 4)
    return values


def _read(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def _append(file: Path, row: Mapping[str, Any]) -> None:
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def _run(arguments: argparse.Namespace) -> bool:
    """Trains what the CSV file lacks; whether everything went well."""
    done = [{key: row[key] for key in KEYS} for row in _read(arguments.csv)]
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": f"python {platform.python_version()} torch {torch.__version__}",
    }
    texts = [text.name for text in arguments.evaluate]
    columns = (*KEYS[:-1], "bits", "group_size", "seed", *texts, "seconds", "tokens", *machine)
    good = True
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool,
    ):
        running: dict[Future[dict[str, Any]], str] = {}
        for seed in arguments.seeds:
            for variant in read_variants(arguments.plan):
                wanted = {variant.name, variant.table} & set(arguments.only or (variant.name,))
                if wanted and variant.keys(arguments.model, seed) not in done:
                    given = (variant, seed, arguments.model, arguments.data, arguments.evaluate, arguments.seq_len)
                    running[pool.submit(measure, *given, Path(folder))] = f"{variant.name}, seed {seed}"
        for future in as_completed(running):
            if (error := future.exception()) is not None:
                print(f"{running[future]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                good = False
                continue
            row = future.result() | machine
            quality = ", ".join(f"{text} {row[text]:.2f}" for text in texts)
            print(f"{running[future]}: {quality}, {row['seconds']} s", flush=True)
            row["seconds"] = "" if arguments.processes > 1 or arguments.untimed else row["seconds"]
            _append(arguments.csv, {name: row[name] for name in columns})
    return good


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="training text")
    parser.add_argument("--evaluate", type=Text.parse, nargs="+", required=True, metavar="NAME=FILE[:TOKENS]")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens in a measured window")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="tables or rows of the plan")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, on the same device")
    parser.add_argument("--untimed", action="store_true", help="others use the device too: no seconds are kept")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    sys.exit(not _run(parser.parse_args()))


if __name__ == "__main__":
    main()
