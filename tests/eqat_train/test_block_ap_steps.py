"""Training steps: the fused one is the plain one, replayed from a graph or not, and says when it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from eqat_train.block_ap.capture import BlockCall
from eqat_train.block_ap.settings import BlockApSettings
from eqat_train.block_ap.steps import AutogradSteps, FusedSteps, GraphedSteps, Steps, block_steps
from eqat_train.block_ap.trainable_block import TrainableBlock
from eqat_train.ops.tolerances import relative_error
from formats import QuantScheme
from formats.errors import InputError

SCHEME = QuantScheme(2, 32)
TOTAL = 12
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CPU = torch.device("cpu")


class _Block(nn.Module):
    """A block small enough to read: a norm, two linears with a bias, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(nn.functional.silu(self.up(self.norm(hidden_states))))


class _Waiting(_Block):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (1 if hidden_states.sum().item() else 2)


def _settings(device: torch.device, **options: Any) -> BlockApSettings:
    rates = {"lr_weight": 1e-3, "lr_scale": 1e-3, "lr_zero": 1e-2, "compute_dtype": torch.float32}
    return BlockApSettings(SCHEME, device=device, **{**rates, **options})


def _case(
    device: torch.device, kind: type[_Block] = _Block, width: int = 64, tokens: int = 24
) -> tuple[TrainableBlock, list[tuple[Tensor, Tensor]]]:
    """A block and batches of it, the last one smaller; the same every time."""
    torch.manual_seed(0)
    block = kind(width)
    inputs = [torch.randn(size, tokens, width) for size in (2, 2, 2, 1) * 3]
    batches = []
    with torch.no_grad():
        for x in inputs:
            batches.append((x.to(device), block(x).to(device)))
    stored = {name: torch.bfloat16 for name, _ in block.named_parameters()}
    schemes = {"up": SCHEME, "down": SCHEME}
    return TrainableBlock(block.to(device), schemes, torch.float16, stored), batches


def _run(steps: Steps, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    losses = torch.stack([steps(*batch).clone() for batch in batches])
    trained = [parameter.detach().clone() for parameter in steps.trained()]
    steps.close()
    return losses, trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"zero_range": (1, 2)}, {"weight_decay": 0.1}, {"lr_weight": 0.0}, {"lr_scale": 0.0}, {"lr_zero": 0.0}],
)
def test_a_fused_step_is_the_plain_step(options: dict[str, Any], dtype: torch.dtype) -> None:
    settings = _settings(CPU, compute_dtype=dtype, **options)
    losses = []
    parameters = []
    for kind in (AutogradSteps, FusedSteps):
        block, batches = _case(CPU)
        loss, _ = _run(kind(block, BlockCall(), settings, TOTAL, CPU), batches)
        losses.append(loss)
        parameters.append({name: p.detach() for name, p in block.block.named_parameters()})
    # the same formulas; a few fp32 roundings of twelve updates differ
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    for name, plain in parameters[0].items():
        assert relative_error(parameters[1][name], plain) < 1e-6, name


def test_a_finished_step_leaves_the_block_computing_from_its_parameters() -> None:
    block, batches = _case(CPU)
    steps = FusedSteps(block, BlockCall(), _settings(CPU), TOTAL, CPU)
    steps(*batches[0])
    with torch.no_grad():
        held = block(BlockCall(), batches[0][0])
        steps.close()
        assert torch.equal(block(BlockCall(), batches[0][0]), held)
        for linear in block.linears.values():
            linear.weight.zero_()
        assert not torch.equal(block(BlockCall(), batches[0][0]), held)


def _cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> FusedSteps:
    def compiled(*_: Any) -> Tensor:
        raise torch._dynamo.exc.Unsupported("no such operation")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)
    block, _ = _case(CPU)
    return FusedSteps(block, BlockCall(), _settings(CPU), TOTAL, CPU)


def test_a_step_that_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    block, batches = _case(CPU)
    expected, _ = _run(FusedSteps(block, BlockCall(), _settings(CPU), TOTAL, CPU), batches)
    steps, messages = _cannot_be_compiled(monkeypatch), []
    steps.differentiate.compile(messages.append)
    losses, _ = _run(steps, batches)
    assert messages == ["the block's step cannot be compiled (no such operation); it runs as it is, slower"]
    assert torch.equal(losses, expected)


def test_a_compilation_that_was_asked_for_and_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, (_, batches) = _cannot_be_compiled(monkeypatch), _case(CPU)
    steps.differentiate.compile(None)
    with pytest.raises(InputError, match="use execution auto, graph or eager"):
        steps(*batches[0])


@pytest.mark.parametrize("execution", ["graph", "compile"])
@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "cuda", "compute_dtype": torch.float16}])
def test_what_cannot_be_a_graph_is_refused(execution: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"execution {execution} needs a CUDA device and float32 or bfloat16"):
        BlockApSettings(SCHEME, execution=execution, **options)


class TestOnTheGpu:
    """Graphs exist there alone."""

    pytestmark = gpu
    device = torch.device("cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_graph_trains_as_the_plain_loop_does(self, dtype: torch.dtype) -> None:
        results = []
        for execution, make in (("eager", AutogradSteps), ("eager", FusedSteps), ("graph", None)):
            block, batches = _case(self.device, width=256, tokens=128)
            settings = _settings(self.device, compute_dtype=dtype, execution=execution, lr_weight=1e-5, lr_scale=1e-5)
            if make is AutogradSteps:
                for linear in block.linears.values():
                    linear.impl = "reference"
            steps = (
                make(block, BlockCall(), settings, TOTAL, self.device)
                if execution == "eager"
                else block_steps(block, BlockCall(), settings, TOTAL, batches[0][0][0], _never)
            )
            results.append(_run(steps, batches))
        plain, eager, graph = (losses for losses, _ in results)
        # sums in another order; codes that flip for it change the loss by little at these learning rates
        torch.testing.assert_close(eager, plain, rtol=1e-3, atol=0)
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=0)

    def test_a_compiled_graph_trains_as_the_plain_loop_does_and_blocks_share_it(self) -> None:
        losses = []
        for execution in ("eager", "compile", "compile"):
            block, batches = _case(self.device, width=256, tokens=128)
            settings = _settings(self.device, execution=execution, lr_weight=1e-5, lr_scale=1e-5)
            before = counters["stats"]["unique_graphs"]
            said: list[str] = []
            steps = block_steps(block, BlockCall(), settings, TOTAL, batches[0][0][0], said.append)
            losses.append(_run(steps, batches)[0])
            assert [text.startswith("compiling") for text in said] == [True] * (execution == "compile")
        assert counters["stats"]["unique_graphs"] == before
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
        assert torch.equal(losses[1], losses[2])

    @pytest.mark.parametrize("execution", ["eager", "graph"])
    def test_reruns_are_bit_identical(self, execution: str) -> None:
        results = []
        for _ in range(2):
            block, batches = _case(self.device, width=256, tokens=128)
            settings = _settings(self.device, compute_dtype=torch.bfloat16, execution=execution)
            results.append(_run(block_steps(block, BlockCall(), settings, TOTAL, batches[0][0][0], _never), batches))
        (losses, parameters), (again, same) = results
        assert torch.equal(losses, again)
        assert all(torch.equal(a, b) for a, b in zip(parameters, same, strict=True))

    def test_a_block_that_waits_for_the_device_runs_without_a_graph_and_says_so(self) -> None:
        block, batches = _case(self.device, _Waiting)
        messages: list[str] = []
        settings = _settings(self.device)
        steps = block_steps(block, BlockCall(), settings, TOTAL, batches[0][0][0], messages.append)
        torch.cuda.manual_seed(7)
        losses, _ = _run(steps, batches)
        after = torch.rand(3, device=self.device)  # the capture that failed has not taken the generator with it
        torch.cuda.manual_seed(7)
        assert torch.equal(after, torch.rand(3, device=self.device))
        assert len(messages) == 1 and "cannot be a CUDA graph" in messages[0] and "slower" in messages[0]
        block, batches = _case(self.device)
        expected, _ = _run(FusedSteps(block, BlockCall(), settings, TOTAL, self.device), batches)
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)

    def test_a_graph_that_was_asked_for_and_cannot_be_is_an_error(self) -> None:
        block, batches = _case(self.device, _Waiting)
        settings = _settings(self.device, execution="graph")
        steps = block_steps(block, BlockCall(), settings, TOTAL, batches[0][0][0], _never)
        assert isinstance(steps, GraphedSteps)
        with pytest.raises(InputError, match="use execution auto or eager"):
            _run(steps, batches)


def _never(text: str) -> None:
    raise AssertionError(text)
