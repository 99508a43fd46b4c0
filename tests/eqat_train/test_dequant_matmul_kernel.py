"""The packed linear's kernels: interpreted on a CPU with their gradients, at full size on a GPU, assembly by hand."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eqat_train.ops.dequant_matmul import dequant_matmul
from eqat_train.ops.tolerances import within_tolerance
from formats.errors import InputError
from tests.interpreter import rounding_to_bfloat16
from tests.packed_reference import PackedCase, RandomCase, make_case, random_case

pytest.importorskip("triton", reason="needs triton, which has wheels for Linux alone")

from eqat_train.ops.dequant_matmul.decode import decode_refusal
from eqat_train.ops.dequant_matmul.ptx import classes, pairs, unpack_words
from eqat_train.ops.dequant_matmul.ptx_rows import weights
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


# -- assembly, by a machine of a few instructions --


class Machine:
    """Runs lines of PTX on 32-bit registers; halves are float16 or bfloat16 pairs, computed in float64 and rounded."""

    def __init__(self, bf16: bool) -> None:
        self.dtype = torch.bfloat16 if bf16 else torch.float16
        self.registers: dict[str, int | float] = {}
        self.rounded = 0

    def run(self, text: str, operands: list[int | float]) -> list[int]:
        """Operands after the run; they are ``$0``, ``$1`` ..., floats where the assembly takes float32."""
        self.registers = {f"${i}": value for i, value in enumerate(operands)}
        for line in re.split(r";\s*", re.sub(r"\.reg[^;]*;", "", text.strip()[1:-1])):
            if line.strip():
                name, rest = line.strip().split(" ", 1)
                self.step(name, [part.strip(" {}") for part in rest.split(",")])
        return [int(self.registers[f"${i}"]) for i in range(len(operands)) if isinstance(operands[i], int)]

    def step(self, name: str, names: list[str]) -> None:
        if name == "mov.b32" and len(names) == 3:
            self.registers[names[0]], self.registers[names[1]] = (
                self.value(names[2]) & 0xFFFF,
                self.value(names[2]) >> 16,
            )
            return
        a = [self.value(source) for source in names[1:]]
        kinds = {
            "mov.b32": lambda: a[0],
            "shr.u32": lambda: a[0] >> a[1],
            "and.b32": lambda: a[0] & a[1],
            "or.b32": lambda: a[0] | a[1],
            "lop3.b32": lambda: a[0] & a[1] | a[2],
            "prmt.b32": lambda: sum(((a[0] | a[1] << 32) >> 8 * (a[2] >> 4 * i & 7) & 255) << 8 * i for i in range(4)),
            "sub.f32": lambda: a[0] - a[1],
        }
        kind = name.rsplit(".", 1)[0]
        if name in kinds:
            result = kinds[name]()
        elif kind == "fma.rn":
            result = self.pack(self.halves(a[0]) * self.halves(a[1]) + self.halves(a[2]))
        elif name.startswith("cvt.rn."):
            result = self.pack(torch.tensor([a[1], a[0]], dtype=torch.float64))
        elif name.startswith("cvt.f32."):
            result = float(self.halves(a[0])[0])
        else:
            raise AssertionError(name)
        self.registers[names[0]] = result

    def value(self, name: str) -> int | float:
        return int(name, 0) if name[0].isdigit() else self.registers[name]

    def halves(self, register: int) -> Tensor:
        return torch.tensor([register], dtype=torch.int64).to(torch.int32).view(self.dtype).double()

    def pack(self, values: Tensor) -> int:
        self.rounded += int((values.to(self.dtype).double() != values).any())
        return int(values.to(self.dtype).view(torch.int32)) & 0xFFFFFFFF


def codes_and_words(bits: int) -> tuple[list[list[int]], list[int]]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (4, 2 * pairs(bits)), generator=generator).tolist()
    return codes, [sum(code << bits * j for j, code in enumerate(row)) for row in codes]


@pytest.mark.parametrize(("bf16", "apart"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("bits", BITS)
def test_the_assembly_unpacks_every_code_exactly(bits: int, bf16: bool, apart: bool) -> None:
    count, factors, machine = pairs(bits), classes(bits, apart), Machine(bf16)
    codes, words = codes_and_words(bits)
    registers = machine.run(unpack_words(bits, bf16, apart)[0], [0] * 4 * count + words)
    assert machine.rounded == 0
    for word, row in enumerate(codes):
        for j in range(count):
            pair = machine.halves(registers[word * count + j]) * factors[j % len(factors)]
            assert pair.tolist() == [row[j], row[j + count]]


@pytest.mark.parametrize("packed_scales", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_the_assembly_makes_weights_that_are_rounded_once(bits: int, bf16: bool, packed_scales: bool) -> None:
    count, machine, groups = pairs(bits), Machine(bf16), 2 if bits == 3 else 1
    codes, words = codes_and_words(bits)
    generator = torch.Generator().manual_seed(1)
    zeros = torch.randint(0, 2**bits, (groups, 4), generator=generator).tolist()
    zeros[0][0], zeros[-1][-1] = 0, 2**bits - 1
    scales = torch.rand(groups, 4, generator=generator) * 0.02 + 0.01
    if packed_scales:
        scales = scales.to(machine.dtype)
        given = [machine.pack(scales[g, t : t + 2].double()) for g in range(groups) for t in (0, 2)]
    else:
        given = scales.flatten().tolist()
    border = 3  # of the word's fields lie in the first group
    picks = [(0x10 if j < border else 0x54) | (0x3200 if j + count < border else 0x7600) for j in range(count)]
    operands = [0] * 4 * count + words + given + [z for row in zeros for z in row] + (picks if groups == 2 else [])
    registers = machine.run(weights(bits, bf16, packed_scales)[0], operands)
    for word, row in enumerate(codes):
        for j in range(count):
            for half, field in enumerate((j, j + count)):
                group = int(groups == 2 and field >= border)
                exact = (row[field] - zeros[group][word]) * scales[group, word].double()
                found = machine.halves(registers[word * count + j])[half]
                assert found == exact.to(machine.dtype).double()


# -- full size --


def exact_output(case: RandomCase, x: Tensor, scales: Tensor) -> Tensor:
    return x.double() @ (case.centered * scales.double().t()[:, case.index]).t()


def poison(*shape: int, dtype: torch.dtype) -> None:
    """Fills memory that the next tensor of this shape will get with NaN."""
    torch.full(shape, torch.nan, dtype=dtype, device="cuda")


@gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_matches_float64(bits: int, group_size: int, dtype: torch.dtype) -> None:
    check_decode(bits, group_size, (4096, 4096), dtype, [(1, torch.float32), (16, dtype)])


@gpu
@pytest.mark.parametrize(("bits", "group_size", "shape"), [(2, 64, (11008, 704)), (3, 128, (1056, 11008))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_odd_shapes_and_scales_of_any_dtype(
    bits: int, group_size: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    stored = (torch.float16, torch.bfloat16, torch.float32)
    check_decode(bits, group_size, shape, dtype, [(rows, kind) for rows in (1, 2, 8, 9) for kind in stored])


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
