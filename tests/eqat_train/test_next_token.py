"""The loss and its gradient against log-probabilities picked token by token on one big batch, in float64."""

from pathlib import Path

import pytest
import torch

from eqat_train.data import TokenWindows
from eqat_train.e2e_qp.next_token import accumulate_gradients, mean_loss
from eqat_train.e2e_qp.packed_model import PackedModel, load_packed_model
from eqat_train.e2e_qp.recompute import recomputed_in_backward
from formats import QuantScheme
from formats.model import open_checkpoint
from tests.tiny_checkpoints import quantize_folder
from tests.tiny_models import save_tiny_model, tiny_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("next_token")
    return quantize_folder(save_tiny_model(root / "fp"), root / "q", QuantScheme(2, 32))


@pytest.fixture
def packed(folder: Path) -> PackedModel:
    with open_checkpoint(folder) as checkpoint:
        packed = load_packed_model(checkpoint)
    packed.model.double()
    return packed


def uneven_windows() -> TokenWindows:
    """Seven windows whose label counts differ: 1, 4, 7, ... of 23."""
    ids = tiny_tokens(7)
    labels = ids.clone()
    for row in range(7):
        labels[row, 2 + 3 * row :] = -100
    return TokenWindows(ids, labels)


def gradients(packed: PackedModel) -> list[torch.Tensor]:
    found = [scale.grad for scale in packed.scales]
    packed.model.zero_grad()
    return [grad for grad in found if grad is not None]


def written_out_loss(packed: PackedModel, windows: TokenWindows) -> torch.Tensor:
    log_probabilities = packed.model(input_ids=windows.input_ids).logits.log_softmax(dim=-1)
    terms = [
        -log_probabilities[row, t - 1, windows.input_ids[row, t]]
        for row in range(len(windows))
        for t in range(1, windows.seq_len)
        if windows.labels[row, t] != -100
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 7])
def test_micro_batches_give_the_gradient_of_the_whole_batch(packed: PackedModel, micro_batch_size: int) -> None:
    windows = uneven_windows()
    loss = accumulate_gradients(packed.model, windows, micro_batch_size, CPU)
    ours = gradients(packed)
    expected = written_out_loss(packed, windows)
    expected.backward()
    theirs = gradients(packed)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert len(ours) == len(theirs) == len(packed.linears)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_mean_loss_is_over_labelled_tokens(packed: PackedModel, batch_size: int) -> None:
    windows = uneven_windows()
    with torch.no_grad():
        expected = written_out_loss(packed, windows).item()
    assert mean_loss(packed.model, windows, batch_size, CPU).item() == pytest.approx(expected, rel=1e-12)


def test_only_scales_get_gradients(packed: PackedModel) -> None:
    accumulate_gradients(packed.model, uneven_windows(), 4, CPU)
    with_gradient = {name for name, parameter in packed.model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{name}.scales" for name in packed.linears}


def test_recomputing_layers_changes_no_bit(packed: PackedModel) -> None:
    windows = uneven_windows()
    plain_loss = accumulate_gradients(packed.model, windows, 3, CPU)
    plain = gradients(packed)
    calls = []
    handles = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in packed.layers]
    with recomputed_in_backward(packed.layers):
        loss = accumulate_gradients(packed.model, windows, 7, CPU)
        assert len(calls) == 2 * len(packed.layers)  # once forward, once more in backward
        gradients(packed)
        loss = accumulate_gradients(packed.model, windows, 3, CPU)
    for handle in handles:
        handle.remove()
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients(packed), plain, strict=True))
    assert not any("forward" in layer.__dict__ for layer in packed.layers)


def test_recomputing_keeps_fewer_activations(packed: PackedModel) -> None:
    windows = uneven_windows()
    plain = saved_bytes(packed, windows)
    with recomputed_in_backward(packed.layers):
        assert saved_bytes(packed, windows) < plain / 2


def saved_bytes(packed: PackedModel, windows: TokenWindows) -> int:
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed.model(input_ids=windows.input_ids, use_cache=False)
    return sum(storages.values())
