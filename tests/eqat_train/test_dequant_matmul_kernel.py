"""The packed linear's kernels: interpreted on a CPU with their gradients, at full size on a GPU, assembly by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_train.ops.dequant_matmul import dequant_matmul
from eqat_train.ops.launches import overlapping_launches
from eqat_train.ops.tolerances import TOLERANCES, within_tolerance
from formats.errors import InputError
from tests.interpreter import rounding_to_bfloat16
from tests.packed_reference import PackedCase, RandomCase, make_case, random_case

pytest.importorskip("triton", reason="needs triton, which has wheels for Linux alone")

from eqat_train.ops.dequant_matmul.decode import decode_refusal
from eqat_train.ops.dequant_matmul.ptx import fields, pairs
from eqat_train.ops.dequant_matmul.triton import dequant_matmul as kernel

BITS = [2, 3, 4, 8]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_gpu:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def rounding(kernel_device: torch.device) -> Iterator[None]:
    with rounding_to_bfloat16():
        yield


def check(result: str, actual: Tensor, expected: Tensor) -> None:
    good, text = within_tolerance("dequant_matmul", result, actual.dtype, actual, expected)
    assert good, text


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("rows", "shape"), [(1, (64, 128)), (3, (37, 256)), (20, (21, 77))])
def test_output_and_gradients_match_float64(
    bits: int, group_size: int, rows: int, shape: tuple[int, int], kernel_device: torch.device
) -> None:
    case = make_case(bits, group_size, *shape)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_gradients(case, rows, shape, dtype, kernel_device)


@pytest.mark.parametrize("bits", BITS)
def test_act_order_output_matches_float64(bits: int, kernel_device: torch.device) -> None:
    case = make_case(bits, 32, 64, 96, act_order=True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(5, 96).to(dtype)
        packed, scales = case.packed.to(kernel_device), case.scales.float().to(kernel_device)
        y = dequant_matmul(x.to(kernel_device), packed, scales, impl="triton")
        check("output", y.cpu(), x.double() @ case.weight(case.scales).t())


def check_gradients(
    case: PackedCase, rows: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype).to(device).requires_grad_()
    bias = torch.randn(shape[0], generator=generator).to(dtype).to(device).requires_grad_()
    scales = case.scales.float().to(device).requires_grad_()
    y = dequant_matmul(x, case.packed.to(device), scales, bias, impl="triton")
    grad = torch.randn(rows, shape[0], generator=generator).to(dtype)
    y.backward(grad.to(device))
    exact_x, exact_scales = x.detach().cpu().double(), case.scales.clone().requires_grad_()
    expected = exact_x @ case.weight(exact_scales).t() + bias.detach().cpu().double()
    expected.backward(grad.double())
    check("output", y.cpu(), expected)
    check("grad_x", x.grad.cpu(), grad.double() @ case.weight(case.scales))
    assert scales.grad.dtype == torch.float32 and bias.grad.dtype == dtype
    # dY^T X may be a matmul in the dtype of x
    allowed = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    assert float((scales.grad.cpu().double() - exact_scales.grad).norm() / exact_scales.grad.norm()) < allowed


def test_leading_dimensions_stay(kernel_device: torch.device) -> None:
    case = make_case(2, 32, 40, 64)
    x = torch.randn(2, 3, 64, device=kernel_device)
    y = dequant_matmul(x, case.packed.to(kernel_device), case.scales.float().to(kernel_device), impl="triton")
    assert y.shape == (2, 3, 40)
    check("output", y.cpu(), x.cpu().double() @ case.weight(case.scales).t())


def test_what_it_cannot_compute_is_refused(kernel_device: torch.device) -> None:
    case = make_case(2, 32, 16, 64)
    packed, scales = case.packed.to(kernel_device), case.scales.float().to(kernel_device)
    x = torch.randn(2, 64, device=kernel_device)
    with pytest.raises(InputError, match=r"the bias is torch.float16 and x is torch.float32"):
        dequant_matmul(x, packed, scales, torch.zeros(16, dtype=torch.float16, device=kernel_device), impl="triton")
    with pytest.raises(InputError, match=r"weights in torch.float64"):
        dequant_matmul(x.double(), packed, scales, impl="triton")


def test_a_compiled_call_is_one_operator(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # which auto-round sets where it is imported
    case = make_case(3, 64, 32, 128)
    packed, scales = case.packed.to(kernel_device), case.scales.float().to(kernel_device)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda x: dequant_matmul(x, packed, scales), backend=backend, fullgraph=True)
    x = torch.randn(3, 128, device=kernel_device)
    assert torch.equal(compiled(x), dequant_matmul(x, packed, scales))
    assert [name for name in seen if "packed_linear" in name]


# -- decode kernels without a GPU --

# bits, group size, in, out, rows, dtype, dtype of scales, plan: each kind of group, of x and of scales, and odd ends
LAYERS: list[list[Any]] = [
    [2, 64, 512, 64, 1, "float16", "float32", None],
    [2, 32, 704, 32, 1, "float16", "bfloat16", None],
    [3, 32, 640, 64, 1, "float16", "float16", [4, 4]],
    [3, -1, 512, 32, 1, "bfloat16", "float32", [2, 8]],
    [4, 128, 704, 32, 1, "bfloat16", "bfloat16", [2, 4, 1, 1, 2]],
    [8, 64, 256, 32, 1, "float16", "float16", None],
    [8, 128, 256, 32, 1, "bfloat16", "float16", None],
    [2, 64, 640, 96, 16, "float16", "float16", [2, 2, 2, 2]],
    [2, 32, 256, 32, 3, "bfloat16", "float32", None],
    [3, 128, 1280, 96, 9, "float16", "float16", [2, 4, 1, 2]],
    [3, 64, 320, 64, 5, "bfloat16", "float32", [2, 4, 2]],
    [4, 80, 240, 32, 16, "float16", "float16", [4, 2]],
    [8, -1, 256, 64, 2, "bfloat16", "bfloat16", [2, 2, 2]],
    [4, 128, 512, 128, 8, "float16", "bfloat16", [2, 4, 4]],
]


def test_compiled_decode_kernels_match_float64_on_a_machine_of_their_instructions() -> None:
    program = Path(__file__).with_name("decode_programs.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), json.dumps(LAYERS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for layer, error in zip(LAYERS, json.loads(done.stdout), strict=True):
        assert error <= TOLERANCES["dequant_matmul"]["output"][getattr(torch, layer[5])], layer


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_register_holds_its_codes_and_an_offset_exactly(bits: int, bf16: bool) -> None:
    for code in range(2**bits):
        parts = [0.0] * pairs(bits)
        for field in fields(bits, bf16):
            half = (code << bits * field.pair >> field.shift) & field.mask | field.magic
            value = torch.tensor([half], dtype=torch.int32).to(torch.int16)
            parts[field.pair] += float(value.view(torch.bfloat16 if bf16 else torch.float16)) - field.offset
        assert parts == [code] * pairs(bits)


# -- full size --


def exact_output(case: RandomCase, x: Tensor, scales: Tensor) -> Tensor:
    return x.double() @ (case.centered * scales.double().t()[:, case.index]).t()


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Fills memory that the next tensor of this shape will get with NaN."""
    torch.full(shape, torch.nan, dtype=dtype, device="cuda")


@gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_decode_matches_float64(bits: int, group_size: int) -> None:
    dtype = torch.bfloat16 if group_size == 64 else torch.float16
    check_decode(bits, group_size, (4096, 4096), dtype, [(1, torch.float32), (16, dtype)])


@gpu
@pytest.mark.parametrize(("bits", "group_size", "shape"), [(2, 64, (11008, 704)), (3, 128, (1056, 11008))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_odd_shapes_and_scales_of_any_dtype(
    bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    check_decode(bits, group_size, shape, dtype, [(1, dtype), (1, other), (2, other), (8, torch.float32), (9, dtype)])


def check_decode(
    bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype, kinds: list[tuple[int, torch.dtype]]
) -> None:
    case = random_case(bits, group_size, *shape)
    for rows, stored in kinds:
        x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        scales = case.scales.to(stored)
        assert decode_refusal(x, case.packed, scales) is None
        poison(rows, shape[0], dtype=dtype)
        y = kernel(x, case.packed, scales, bias)
        check("output", y, exact_output(case, x, scales) + bias.double())
        assert torch.equal(y, kernel(x, case.packed, scales, bias))


@gpu
def test_subnormal_and_huge_inputs_keep_their_digits() -> None:
    case = random_case(2, 64, 512, 4096)
    for rows in (1, 5):
        for power in (-14, -20, 4):
            x = (torch.randn(rows, 4096, device="cuda") * 2.0**power).half()
            scales = case.scales * 2.0**-power / 64
            check("output", kernel(x, case.packed, scales, None), exact_output(case, x, scales))


@gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_prefill_and_gradients_match_float64(bits: int, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for rows, in_features, out_features in ((2048, 4096, 4096), (130, 1376, 5000)):
        case = random_case(bits, 32, out_features, in_features)
        x = torch.randn(rows, in_features, device="cuda", dtype=dtype).requires_grad_()
        poison(rows, out_features, dtype=dtype)
        y = dequant_matmul(x, case.packed, case.scales, impl="triton")
        check("output", y, exact_output(case, x.detach(), case.scales))
        grad = torch.randn_like(y)
        y.backward(grad)
        check("grad_x", x.grad, grad.double() @ (case.centered * case.scales.double().t()[:, case.index]))


@gpu
@pytest.mark.parametrize("rows", [1, 16, 100])
def test_a_captured_graph_computes_the_same(rows: int) -> None:
    case = random_case(2, 64, 1024, 2048)
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.float16)
    expected = kernel(x, case.packed, case.scales, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel(x, case.packed, case.scales, None)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)


@gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_layers_whose_launches_overlap_compute_the_same(rows: int) -> None:
    case = random_case(2, 64, 2048, 2048)
    scales = case.scales * 0.7  # outputs are about as large as inputs
    x = torch.randn(rows, 2048, device="cuda", dtype=torch.float16)

    def chain() -> Tensor:
        y = x
        for _ in range(12):  # each reads what the one before has just written
            y = kernel(y, case.packed, scales, None)
        return y

    expected = chain()
    assert expected.isfinite().all() and expected.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), overlapping_launches():
        y = chain()
    for _ in range(20):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
