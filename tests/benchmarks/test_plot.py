"""The pictures of docs/results.md: which rows are drawn, and that the same rows give the same file."""

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plot
from benchmarks.harness import RESULTS

COLUMNS = (
    "device versions op impl shape bits group_size dtype bytes flops peak_mib note p20_us p50_us p80_us "
    "ceiling_bytes_s ceiling_flops_s of_bandwidth of_matmul"
).split()


def row(impl: str, shape: str, microseconds: float, *, bits: int = 2, flops: int = 10**8) -> dict[str, object]:
    fixed = {"device": "GPU", "versions": "torch 2", "op": "dequant_matmul", "dtype": "float16", "note": ""}
    sizes = {"bytes": 10**6, "flops": flops, "peak_mib": 0, "ceiling_bytes_s": 4e12, "ceiling_flops_s": 8e14}
    times = {"p20_us": microseconds * 0.9, "p50_us": microseconds, "p80_us": microseconds * 1.1}
    return {**fixed, **sizes, **times, "impl": impl, "shape": shape, "bits": bits, "group_size": 64 if bits else 0}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [row("eqat", f"M={m} K=64 N={n}", 3.0 * m) for m in (1, 16) for n in (64, 128)]
    rows += [
        row("cublas fp16", "M=1 K=64 N=64", 9.0, bits=0),
        row("eqat", "M=1 K=64 N=64", 2.0),
        row("a new one", "M=1 K=64 N=64", 5.0),
    ]
    with (tmp_path / "dequant_matmul.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS, restval=0)
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_the_last_of_equal_rows_is_drawn(results: Path) -> None:
    rows = plot.read(results)
    assert len(rows) == 6
    assert [item["p50_us"] for item in rows if item["impl"] == "eqat" and item["shape"] == "M=1 K=64 N=64"] == [2.0]


def test_files_of_perplexities_are_passed_over(results: Path) -> None:
    (results / "ablation.csv").write_text("table,model,wikitext2\nmain,ref-28m,57.4\n")
    assert len(plot.read(results)) == 6
    assert {row["file"] for row in plot.read(RESULTS)} >= {"dequant_matmul", "generate"}


def test_the_bound_is_the_longer_of_bytes_and_operations(results: Path) -> None:
    assert [plot.bound(item) for item in plot.read(results)] == [pytest.approx(0.25)] * 6
    assert plot.bound(plot.read(results)[0] | {"flops": 8e8}) == pytest.approx(1.0)


def test_the_same_rows_give_the_same_files(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(results), "--out", str(results / name)])
        plot.main()
        made.append({path.name: path.read_bytes() for path in (results / name).iterdir()})
    assert made[0] == made[1]
    assert set(made[0]) == {"dequant_matmul.svg", "roofline.svg"}
    for words in (b"M=16 K=64 N=128", b"cublas fp16", b"a new one w2g64", b"GPU"):
        assert words in made[0]["dequant_matmul.svg"]
