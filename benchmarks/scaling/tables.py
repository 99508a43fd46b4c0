"""The tables of docs/scaling.md.

python -m benchmarks.scaling.tables           # prints them
python -m benchmarks.scaling.tables --write   # puts them into docs/scaling.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from eqat_train.costs.estimate import (
    Work,
    block_bytes,
    block_seconds,
    disk,
    e2e_bytes,
    e2e_seconds,
    qat_bytes,
    reduce_seconds,
)
from eqat_train.costs.machine import H200
from eqat_train.costs.shapes import llama_shape, moe_shape

__all__ = ["MODELS", "TABLES", "filled", "main"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
GIB, HOUR = 2**30, 3600
GPUS = (1, 8, 64)

MODELS = {
    "7B": llama_shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000),
    "13B": llama_shape("Llama-2-13B", 5120, 13824, 40, 40, 40, 32000),
    "70B": llama_shape("Llama-2-70B", 8192, 28672, 64, 8, 80, 32000),
    "405B": llama_shape("Llama-3.1-405B", 16384, 53248, 128, 8, 126, 128256),
    # shapes of a published mixture: 61 blocks of 384 experts, 8 a token and a shared one, latent attention
    "1T": moe_shape(
        "1T mixture",
        7168,
        [(7168, 1536), (1536, 12288), (7168, 576), (512, 16384), (8192, 7168)],
        2048,
        384,
        8,
        1,
        61,
        163840,
    ),
}
# ref-28m's whole run of docs/results.md: 2048 windows of 1024 tokens in both stages
REF = llama_shape("ref-28m", 512, 1408, 8, 4, 8, 16384)
REF_WORK = Work(samples=2048, seq_len=1024, e2e_samples=2048, e2e_seq_len=1024, e2e_micro_batch=16)

# Measured on one H200: benchmarks/scaling/block_memory.py (docs/results.md), and the whole run on ref-28m.
BLOCK_GIB = {"7B": 4.39, "13B": 6.35, "70B": 15.16}
E2E_FOUR_LAYERS_GIB = {"7B": 2.01, "13B": 2.55, "70B": 4.88}
LAYER_MS = {"7B": 12.71, "13B": 16.82, "70B": 46.42}
TWO_GPUS_MS = 13.20 - 12.32  # benchmarks/scaling/ranks.py: two windows a GPU, on two GPUs and on one
PAPER_GB = {"7B": 8.5, "13B": 10.3, "70B": 29.9}


def _checked() -> Iterator[Sequence[object]]:
    yield "what", "predicted", "measured", "off by"
    for name, measured in BLOCK_GIB.items():
        yield _compared(f"{name} block, Block-AP step, GiB", block_bytes(MODELS[name].largest, 4096) / GIB, measured)
    for name, measured in E2E_FOUR_LAYERS_GIB.items():
        four = replace(MODELS[name], blocks=MODELS[name].blocks[:4])
        yield _compared(f"{name}, E2E-QP of 4 layers, GiB", e2e_bytes(four, Work()) / GIB, measured)
    for name, measured in LAYER_MS.items():
        active = MODELS[name].largest.active
        yield _compared(f"{name}, E2E-QP, a layer and 4096 tokens, ms", 8e3 * 4096 * active / H200.e2e_matmul, measured)
    yield _compared("7B, Block-AP step, compiled, ms", _step_ms("7B"), 9.92)
    both = reduce_seconds(2 * MODELS["7B"].largest.weights, H200, 2)
    yield _compared("7B, Block-AP step, what two GPUs wait for each other, ms", 1e3 * both, TWO_GPUS_MS)
    yield _compared("ref-28m, a block of Block-AP, s", block_seconds(REF.largest, 512, REF_WORK, H200), 1.4)
    yield _compared("ref-28m, E2E-QP, s", e2e_seconds(REF, REF_WORK, H200), 7.2)


def _step_ms(name: str) -> float:
    """A step alone: what one more step adds to a block's time."""
    model = MODELS[name]
    one, two = (block_seconds(model.largest, model.hidden, Work(samples=2, epochs=epochs), H200) for epochs in (1, 2))
    return 1e3 * (two - one)


def _compared(what: str, predicted: float, measured: float) -> Sequence[object]:
    return what, f"{predicted:.3g}", f"{measured:g}", f"{(predicted / measured - 1):+.0%}"


def _one_gpu() -> Iterator[Sequence[object]]:
    yield (
        "model",
        "Block-AP GPU GiB",
        "the paper's GB",
        "streams GiB",
        "disk GiB",
        "E2E-QP GPU GiB",
        "Block-AP h",
        "E2E-QP h",
    )
    for name, model in MODELS.items():
        work = Work()
        sizes = disk(model, work, on_disk=True)
        block = block_bytes(model.largest, work.batch * work.seq_len)
        hours = len(model.blocks) * block_seconds(model.largest, model.hidden, work, H200) / HOUR
        yield (
            model.name,
            _size(block),
            PAPER_GB.get(name, ""),
            f"{work.activations(model.hidden) / GIB:,.0f}",
            f"{sizes.peak / GIB:,.0f}",
            _size(e2e_bytes(model, work)),
            f"{hours:.1f}" if block < H200.memory else "",
            f"{e2e_seconds(model, work, H200) / HOUR:.1f}",
        )


def _many_gpus() -> Iterator[Sequence[object]]:
    yield (
        "model",
        "GPUs",
        "Block-AP batch",
        "Block-AP h",
        "its all-reduce ms a step",
        "E2E-QP h",
        "E2E-QP GiB a GPU, codes shared",
    )
    for name in ("70B", "405B", "1T"):
        model = MODELS[name]
        for gpus in GPUS:
            work = Work(batch=2 * gpus, e2e_batch=max(32, gpus))
            hours = len(model.blocks) * block_seconds(model.largest, model.hidden, work, H200, gpus) / HOUR
            yield (
                model.name,
                gpus,
                work.batch,
                f"{hours:.2f}" if block_bytes(model.largest, 2 * work.seq_len) < H200.memory else "does not fit",
                f"{1e3 * reduce_seconds(2 * model.largest.weights, H200, gpus):.0f}",
                f"{e2e_seconds(model, work, H200, gpus) / HOUR:.2f}",
                _size(e2e_bytes(model, work, ranks=gpus)),
            )


def _e2e_qat() -> Iterator[Sequence[object]]:
    yield "model", *(f"{count} GPU{'s' if count > 1 else ''}, GiB each" for count in (1, 2, 8, 64))
    for model in MODELS.values():
        sizes = (qat_bytes(model.parameters, model.weights, ranks=count, share_teacher=True) for count in (1, 2, 8, 64))
        yield model.name, *map(_size, sizes)


def _disk_rates() -> Iterator[Sequence[object]]:
    yield "model", "fp32, GB/s", "bf16, GB/s"
    for name, model in MODELS.items():
        seconds = _step_ms(name) / 1e3
        read = 2 * 2 * 2048 * model.hidden  # numbers a step: two windows of each stream
        yield model.name, f"{4 * read / seconds / 1e9:.1f}", f"{2 * read / seconds / 1e9:.1f}"


def _size(nbytes: float) -> str:
    return f"{nbytes / GIB:,.1f}" + (" (does not fit)" if nbytes > H200.memory else "")


TABLES: dict[str, Callable[[], Iterator[Sequence[object]]]] = {
    "checked": _checked,
    "one GPU": _one_gpu,
    "disk rates": _disk_rates,
    "many GPUs": _many_gpus,
    "E2E-QAT": _e2e_qat,
}


def filled(page: str) -> str:
    """The page with the tables between ``<!-- NAME -->`` and ``<!-- end -->`` made anew."""
    for name, rows in TABLES.items():
        head, *body = ([str(value) for value in row] for row in rows())
        lines = [head, ["---"] * len(head), *body]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, found = pattern.subn(lambda match, table=table: match[1] + table + match[2], page)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"the page has {found} places for the table {name!r}")
    return page


def main() -> None:
    """Prints the page with its tables, or writes it."""
    page = filled(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
