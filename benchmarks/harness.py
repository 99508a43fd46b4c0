"""What every GPU benchmark shares: timing, measured ceilings, the correctness gate, and rows in a CSV file.

Small ops are timed as replays of a CUDA graph that holds several calls on different buffers, more bytes together than
the L2 cache holds, so that weights come from memory as they do in a model. Steps of a training loop are timed one by
one with events. A row is written only after its op passed its check.
"""

from __future__ import annotations

import csv
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from eqat_train.ops.tolerances import within_tolerance

__all__ = ["RESULTS", "Row", "Timing", "buffers", "ceilings", "event_times", "graph_times", "require", "write"]

RESULTS = Path(__file__).parent / "results"
ROTATED = 3  # buffers together are this many times the L2 cache


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Row:
    """One measurement; a file holds rows of any run, each with the device and versions it was made with.

    Attributes:
        op: what was timed.
        impl: who computed it: "eqat", "reference", "cublas fp16", "humming 0.1.19" ...
        shape: as the op's users say it, e.g. ``M=1 K=4096 N=4096``.
        bits: of the codes; 0 where there are none.
        group_size: of the codes; 0 where there are none.
        dtype: of the activations.
        time: microseconds a call.
        bytes: that must move at the least, inputs read once and outputs written once; 0 if not counted.
        flops: that must be done; 0 if not counted.
        peak_mib: peak memory of the device's allocator; 0 if not measured.
        note: what the row's reader must know.
    """

    op: str
    impl: str
    shape: str
    bits: int
    group_size: int
    dtype: str
    time: Timing
    bytes: int = 0
    flops: int = 0
    peak_mib: float = 0.0
    note: str = ""

    def record(self) -> dict[str, object]:
        """Columns of the CSV file."""
        limits = ceilings()
        values: dict[str, object] = {
            "device": torch.cuda.get_device_name(),
            "versions": f"python {platform.python_version()} torch {torch.__version__} triton {_triton()}",
        }
        values |= {field.name: getattr(self, field.name) for field in fields(self) if field.name != "time"}
        values |= {f"{name}_us": round(value, 3) for name, value in asdict(self.time).items()}
        seconds = self.time.p50 / 1e6
        values["ceiling_bytes_s"], values["ceiling_flops_s"] = (round(value) for value in limits)
        values["of_bandwidth"] = round(self.bytes / seconds / limits[0], 4)
        values["of_matmul"] = round(self.flops / seconds / limits[1], 4)
        return values


def write(rows: Sequence[Row], path: Path | None = None) -> None:
    """Prints rows as a table and appends them to a CSV file, with a header if the file is new."""
    records = [row.record() for row in rows]
    if not records:
        return
    for row, record in zip(rows, records, strict=True):
        scheme = f"w{row.bits}g{row.group_size}" if row.bits else "-"
        share = max(float(str(record["of_bandwidth"])), float(str(record["of_matmul"])))
        memory = f"{row.peak_mib / 1024:7.2f} GiB" if row.peak_mib else ""
        print(
            f"{row.op:16} {row.impl:22} {row.shape:30} {scheme:8} {row.dtype:9} {row.time.p20:11.2f} "
            f"{row.time.p50:11.2f} {row.time.p80:11.2f} us {share:6.1%} {memory} {row.note}",
            flush=True,
        )
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(records[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(records)


def require(op: str, result: str, dtype: torch.dtype, actual: Tensor, expected: Tensor) -> None:
    """Ends the benchmark unless a result is within the op's tolerance of its float64 reference."""
    good, text = within_tolerance(op, result, dtype, actual, expected)
    if not good:
        sys.exit(f"wrong, so not timed: {text}")


def buffers(nbytes: int) -> int:
    """How many buffers of a size are together beyond the L2 cache."""
    cache_size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-ROTATED * cache_size // nbytes))


def graph_times(calls: Sequence[Callable[[], object]], replays: int = 50) -> Timing:
    """Time a call when ``calls`` follow each other in one CUDA graph.

    Args:
        calls: the same op on different buffers (see :func:`buffers`); must not wait for the device.
        replays: of the graph; the percentiles are over them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles and tunes
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _percentiles(graph.replay, replays, len(calls))


def event_times(step: Callable[[], object], repeats: int = 20, warmup: int = 5) -> Timing:
    """Time of a step that is long against a launch."""
    for _ in range(warmup):
        step()
    return _percentiles(step, repeats, 1)


def _percentiles(run: Callable[[], object], repeats: int, calls: int) -> Timing:
    for _ in range(3):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) * 1e3 / calls for start, stop in events]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(deciles[1], statistics.median(times), deciles[7])


@cache
def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and FLOP/s of a large 16-bit matmul on random data."""
    return _copy_rate(2**32), _matmul_rate(8192)


def _copy_rate(nbytes: int) -> float:
    source = torch.empty(nbytes // 4, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * nbytes / (event_times(lambda: target.copy_(source), repeats=10).p50 / 1e6)


def _matmul_rate(size: int) -> float:
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size**3 / (event_times(lambda: torch.mm(left, right, out=product)).p50 / 1e6)


def _triton() -> str:
    import triton  # noqa: PLC0415

    return str(triton.__version__)
