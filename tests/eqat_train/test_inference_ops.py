"""The kernels between the linears of a decoding step, against float64."""

import pytest
import torch
from torch import Tensor

from eqat_train.ops.add_rms_norm import add_rms_norm
from eqat_train.ops.decode_attention import AttentionCache, HeadNorms, decode_attention_
from eqat_train.ops.gated_silu import gated_silu
from eqat_train.ops.tolerances import within_tolerance
from formats.errors import InputError

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
IMPLS = ["reference", "triton"]


@pytest.fixture
def device(impl: str, request: pytest.FixtureRequest) -> torch.device:
    """References run on the CPU, kernels where kernels run."""
    return request.getfixturevalue("kernel_device") if impl == "triton" else torch.device("cpu")


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def check(op: str, result: str, actual: Tensor, expected: Tensor) -> None:
    good, text = within_tolerance(op, result, actual.dtype, actual.cpu(), expected.cpu())
    assert good, text


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features"), [(1, 64), (3, 100), (2, 1000)])
def test_add_rms_norm(impl: str, device: torch.device, dtype: torch.dtype, rows: int, features: int) -> None:
    x, delta = (random(rows, features, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = random(features, dtype=dtype, device=device, seed=2)
    total, normed = add_rms_norm(x, delta, weight, 1e-5, impl=impl)
    check("add_rms_norm", "output", total, x.double() + delta.double())
    wide = total.double()
    check("add_rms_norm", "output", normed, weight.double() * wide / (wide.square().mean(-1, True) + 1e-5).sqrt())

    same, normed = add_rms_norm(x, None, weight, 1e-5, impl=impl)
    assert same is x
    wide = x.double()
    check("add_rms_norm", "output", normed, weight.double() * wide / (wide.square().mean(-1, True) + 1e-5).sqrt())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features"), [(1, 32), (3, 515)])
def test_gated_silu_of_the_halves_of_a_matrix(
    impl: str, device: torch.device, dtype: torch.dtype, rows: int, features: int
) -> None:
    gate_up = random(rows, 2 * features, dtype=dtype, device=device) * 4
    gate, up = gate_up.double().chunk(2, dim=-1)
    ours = gated_silu(*gate_up.chunk(2, dim=-1), impl=impl)
    check("gated_silu", "output", ours, gate / (1 + torch.exp(-gate)) * up)


def exact_attention(qkv: Tensor, cache: AttentionCache, position: int, norms: HeadNorms | None) -> tuple[Tensor, ...]:
    """Output ``[1, heads * head_dim]`` and the cache's new key and value ``[kv_heads, head_dim]``, in float64."""
    kv_heads, _, head_dim = cache.keys.shape
    heads = qkv.double().cpu().view(-1, head_dim)
    query, key, value = heads.split([len(heads) - 2 * kv_heads, kv_heads, kv_heads])
    if norms is not None:
        query, key = (
            x / (x.square().mean(-1, True) + norms.epsilon).sqrt() * weight.double().cpu()
            for x, weight in ((query, norms.query), (key, norms.key))
        )
    # rotation as multiplication of complex numbers: the halves of a head are real and imaginary parts
    half = head_dim // 2
    turn = torch.complex(cache.cos[position, :half].double().cpu(), cache.sin[position, :half].double().cpu())
    query, key = (
        torch.cat([turned.real, turned.imag], -1)
        for turned in (torch.complex(x[:, :half], x[:, half:]) * turn for x in (query, key))
    )
    rows = []
    for index, row in enumerate(query):
        own = index // (len(query) // kv_heads)
        keys = torch.cat([cache.keys[own, :position].double().cpu(), key[own : own + 1]])
        values = torch.cat([cache.values[own, :position].double().cpu(), value[own : own + 1]])
        rows.append(torch.softmax(keys @ row * head_dim**-0.5, 0) @ values)
    return torch.cat(rows)[None], key, value


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head norms"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "length", "position"),
    [(4, 4, 32, 100, 0), (8, 2, 64, 300, 299), (4, 2, 16, 200, 64), (16, 1, 32, 70, 63), (3, 1, 16, 7, 6)],
)
def test_decode_attention(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    normed: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    length: int,
    position: int,
) -> None:
    qkv = random(1, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    keys, values = (random(kv_heads, length, head_dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    # a kernel may not look at rows that are not filled; the reference masks them, which takes finite numbers
    unfilled = float("nan") if impl == "triton" else 100.0
    keys[:, position:], values[:, position:] = unfilled, unfilled
    angle = torch.rand(length, head_dim // 2, generator=torch.Generator().manual_seed(3)).repeat(1, 2) * 6
    cache = AttentionCache(keys, values, angle.cos().to(dtype).to(device), angle.sin().to(dtype).to(device))
    norms = None
    if normed:
        weights = (random(head_dim, dtype=dtype, device=device, seed=seed) for seed in (4, 5))
        norms = HeadNorms(*weights, 1e-6)
    expected, key, value = exact_attention(qkv, cache, position, norms)
    before = keys.clone(), values.clone()
    where = torch.tensor([position], device=device)
    actual = decode_attention_(qkv, cache, where, head_dim**-0.5, norms, impl=impl)
    check("decode_attention", "output", actual, expected)
    check("decode_attention", "keys", keys[:, position], key)
    assert torch.equal(values[:, position].cpu().double(), value)
    for tensor, old in zip((keys, values), before, strict=True):
        others = [row for row in range(length) if row != position]
        assert torch.equal(tensor[:, others].nan_to_num(), old[:, others].nan_to_num())


def test_kernels_refuse_what_they_cannot_compute(kernel_device: torch.device) -> None:
    wide = torch.zeros(2, 8, dtype=torch.float64, device=kernel_device)
    with pytest.raises(InputError, match="float64"):
        add_rms_norm(wide, None, wide[0], 1e-5, impl="triton")
    with pytest.raises(InputError, match="float64"):
        gated_silu(wide, wide, impl="triton")
    keys = torch.zeros(1, 4, 24, device=kernel_device)
    cache = AttentionCache(keys, keys, keys[0], keys[0])
    where = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    with pytest.raises(InputError, match="head_dim is 24"):
        decode_attention_(torch.zeros(1, 72, device=kernel_device), cache, where, 1.0, impl="triton")
