"""What runs again in backward, what is kept for it, and that neither it nor fused modules change the gradient."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eqat_train.data import TokenWindows
from eqat_train.e2e_qp import quant_linear
from eqat_train.e2e_qp.fused_modules import fused_modules
from eqat_train.e2e_qp.next_token import accumulate_gradients
from eqat_train.e2e_qp.packed_model import PackedModel, load_packed_model
from eqat_train.e2e_qp.quant_linear import QuantLinear
from eqat_train.e2e_qp.recompute import least_memory, most_memory, plan_recomputing, recomputed_in_backward
from eqat_train.ops.dequant_matmul.autograd import trained_linear, trained_linears
from eqat_train.ops.packed import PackedWeight
from eqat_train.ops.tolerances import relative_error
from formats import QuantScheme
from formats.model import open_checkpoint
from tests.packed_reference import make_case
from tests.tiny_checkpoints import quantize_folder
from tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_tokens

CPU = torch.device("cpu")
WINDOWS = TokenWindows.from_ids(tiny_tokens(4))
LINEARS = 7  # a layer


class Counted(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.calls["products"] += 1
        self.calls["attentions"] += "scaled_dot_product" in str(op) and "backward" not in str(op)
        return op(*args, **(kwargs or {}))


def load(folder: Path, architecture: str, dtype: torch.dtype = torch.float32) -> PackedModel:
    start = quantize_folder(save_tiny_model(folder / "fp", architecture), folder / "q", QuantScheme(2, 32))
    with open_checkpoint(start) as checkpoint:
        packed = load_packed_model(checkpoint, compute_dtype=dtype)
    accumulate_gradients(packed.model, WINDOWS, 4, CPU)  # looks for the head
    packed.model.zero_grad()
    return packed


def training_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linears as they are trained on a GPU, with plain torch in the kernels' place."""

    def call(x: Tensor, packed: PackedWeight, scales: Tensor, bias: Tensor | None, *, impl: str) -> Tensor:
        return trained_linear(x, packed, scales, bias, "reference")

    monkeypatch.setattr(quant_linear, "dequant_matmul", call)


def step(packed: PackedModel, plan: list[int | None]) -> tuple[Tensor, Tensor, Counter[str]]:
    with recomputed_in_backward(packed.layers, plan), Counted() as counted:
        loss = accumulate_gradients(packed.model, WINDOWS, 4, CPU)
    gradients = torch.cat([scale.grad.flatten() for scale in packed.scales if scale.grad is not None])
    packed.model.zero_grad()
    return loss, gradients, counted.calls


@pytest.mark.parametrize(
    ("plan", "again"), [([None, None], 0), ([0, 0], 12), ([0, None], 6), ([1, 2], 9), ([4, 4], 4), ([6, 6], 0)]
)
def test_only_what_backward_needs_is_computed_again(
    plan: list[int | None], again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load(tmp_path, "llama")
    expected_loss, expected, plain = step(packed, [None, None])
    training_path(monkeypatch)
    loss, gradients, calls = step(packed, plan)
    assert torch.equal(loss, expected_loss) and torch.equal(gradients, expected)
    # never a layer's last product, which only the residual stream wants, nor the attention
    assert calls["products"] == plain["products"] + again
    assert calls["attentions"] == plain["attentions"] == len(packed.layers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_bit_changes_in_any_architecture(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = load(tmp_path, architecture)
    expected_loss, expected, _ = step(packed, [None, None])
    training_path(monkeypatch)
    for plan in ([0, 0], [2, None], [3, 1]):
        loss, gradients, _ = step(packed, plan)
        assert torch.equal(loss, expected_loss) and torch.equal(gradients, expected)


FUSED = {  # norms, gated activations, attentions of two layers
    "llama": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 0),
    "mistral": (5, 2, 2),
    "gemma2": (0, 0, 0),
    "phi3": (5, 0, 0),
    "olmo2": (9, 2, 0),
    "smollm3": (5, 2, 1),  # every second layer rotates nothing
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_modules_are_the_same_function(architecture: str, tmp_path: Path, kernel_device: torch.device) -> None:
    packed = load(tmp_path, architecture)
    loss, gradients, _ = step(packed, [None, None])
    # linears of one input add up its gradient in another order
    for impl, bound in (("reference", 1e-6), ("triton", 1e-5)):
        with fused_modules(packed.model, impl=impl) as count:
            changed = [type(module).__name__ for module in packed.model.modules() if "forward" in module.__dict__]
            kinds = tuple(sum(name.endswith(kind) for name in changed) for kind in ("Norm", "MLP", "Attention"))
            assert kinds == FUSED[architecture] and sum(kinds) == count
            if impl == "triton" and kernel_device.type != "cpu":
                continue
            ours = step(packed, [None, 0])
        assert relative_error(ours[1], gradients) <= bound
        assert torch.equal(ours[0], loss) if impl == "reference" else relative_error(ours[0], loss) <= bound
    assert not any("forward" in module.__dict__ for module in packed.model.modules())


@pytest.mark.parametrize("plan", [[None, None], [0, 0], [4, 4]])
def test_the_gated_activation_is_not_kept(plan: list[int | None], tmp_path: Path) -> None:
    packed = load(tmp_path, "llama")
    expected_loss, expected, _ = step(packed, [None, None])
    with fused_modules(packed.model, impl="reference"):
        loss, gradients, _ = step(packed, plan)
        kept: dict[int, tuple[int, ...]] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            packed.model(input_ids=WINDOWS.input_ids, use_cache=False)
    assert torch.equal(loss, expected_loss) and relative_error(gradients, expected) < 1e-6
    width = packed.layers[0].mlp.gate_proj.out_features
    wide = [shape for shape in kept.values() if len(shape) == 3 and shape[-1] == width]
    assert len(wide) == 2 * len(packed.layers)  # gate and up


def test_a_norm_that_computes_something_else_keeps_its_code(tmp_path: Path) -> None:
    packed = load(tmp_path, "llama", torch.bfloat16)
    for norm in [module for module in packed.model.modules() if type(module).__name__ == "LlamaRMSNorm"][:2]:
        norm.register_forward_hook(lambda module, inputs, output: output * 2)
    with fused_modules(packed.model, impl="reference") as count:
        assert count == 5 - 2 + 2 + 2


def layer_of(shapes: list[tuple[int, int]]) -> nn.Module:
    words = [torch.zeros(i // 16, o, dtype=torch.int32) for i, o in shapes]
    return nn.ModuleList(
        QuantLinear(PackedWeight(word, torch.zeros(1, -(-o // 16), dtype=torch.int32), 2, -1, i), torch.ones(1, o))
        for word, (i, o) in zip(words, shapes, strict=True)
    )


def test_a_plan_fills_the_budget_from_the_last_layer_down() -> None:
    layers = [layer_of([(64, 64), (64, 128), (128, 64)]) for _ in range(3)]
    token = 2 * (64 + 64 + 64 + 128 + 128 + 64)  # bytes a layer keeps for a token when nothing is recomputed: in + out
    least = 2 * 2 * 64  # its input and its attention's output
    assert plan_recomputing(layers, 10, 2, 10 * 3 * token) == [None, None, None]
    assert plan_recomputing(layers, 10, 2, 10 * 3 * token - 1) == [2, None, None]
    assert plan_recomputing(layers, 10, 2, 10 * (token + 2 * least + 128)) == [0, 1, None]
    assert plan_recomputing(layers, 10, 2, 10 * (token + 2 * least + 2 * 192 + 128)) == [1, 2, None]
    assert plan_recomputing(layers, 10, 2, 0) == [0, 0, None]
    assert least_memory(layers, 10, 2) == 10 * (token + 2 * least)
    assert most_memory(layers, 10, 2) == 10 * 3 * token
    assert plan_recomputing(layers, 10, 2, least_memory(layers, 10, 2)) == [0, 0, None]


def test_several_linears_of_one_input_have_the_gradients_of_each() -> None:
    torch.manual_seed(0)
    cases = [make_case(2, 32, out_features, 64) for out_features in (40, 17, 24)]
    scales = [case.scales.clone().requires_grad_() for case in cases]
    biases = [None, torch.randn(17).double().requires_grad_(), None]
    x = torch.randn(2, 5, 64).double().requires_grad_()
    layers = [(case.packed, scale, bias) for case, scale, bias in zip(cases, scales, biases, strict=True)]
    outputs = trained_linears(x, layers, "reference")
    grads = [torch.randn_like(y) for y in outputs]
    leaves = [x, *scales, biases[1]]
    ours = torch.autograd.grad(outputs, leaves, grads)
    written = [
        x @ case.weight(scale).t() + (0 if bias is None else bias)
        for case, scale, bias in zip(cases, scales, biases, strict=True)
    ]
    for y, expected in zip(outputs, written, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for grad, expected in zip(ours, torch.autograd.grad(written, leaves, grads), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)
    # one output alone, and an input that needs no gradient
    (alone,) = torch.autograd.grad(trained_linears(x.detach(), layers, "reference")[1], scales[1:2], grads[1])
    torch.testing.assert_close(alone, ours[2], rtol=1e-12, atol=1e-12)
