"""The start that looks at activations: which error it makes least, and what the inputs' power is."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokens
from torch import Tensor

from eqat_train.block_ap import BlockApSettings
from eqat_train.data import TokenWindows
from eqat_train.e2e_qat import QatSettings
from eqat_train.e2e_qat.input_powers import input_powers
from eqat_train.models.loading import load_dense_model
from eqat_train.starts import start_parameters
from formats import QuantScheme
from formats.errors import InputError

SCHEME = QuantScheme(2, 32)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.fixture(scope="module")
def power() -> Tensor:
    return torch.rand(128, generator=torch.Generator().manual_seed(1)) ** 6 + 1e-4  # a few inputs matter


def error(weight: Tensor, scales: Tensor, zeros: Tensor, power: Tensor) -> float:
    """Weighted squared error of the nearest codes, in float64 and weight by weight."""
    w, s, z = (x.double() for x in (weight, scales.repeat_interleave(32, 1), zeros.repeat_interleave(32, 1)))
    rounded = (torch.clamp(torch.round(w / s) + z, 0, 3) - z) * s
    return float(((w - rounded) ** 2 * power.double()).sum())


def test_each_start_makes_its_own_error_least(weight: Tensor, power: Tensor) -> None:
    found = {
        "minmax": start_parameters(weight, SCHEME, torch.float16),
        "mse": start_parameters(weight, SCHEME, torch.float16, start="mse"),
        "activations": start_parameters(weight, SCHEME, torch.float16, start="activations", input_power=power),
    }
    plain = {name: error(weight, *both, torch.ones(128)) for name, both in found.items()}
    weighted = {name: error(weight, *both, power) for name, both in found.items()}
    assert plain["mse"] < 0.8 * plain["minmax"]
    assert weighted["activations"] < 0.8 * weighted["mse"]
    assert plain["mse"] < plain["activations"]


def test_inputs_of_one_power_make_no_difference(weight: Tensor) -> None:
    plain = start_parameters(weight, SCHEME, torch.float16, start="mse")
    for same in (0.25, 4.0):  # exact factors, so not even the last bit differs
        weighted = start_parameters(
            weight, SCHEME, torch.float16, start="activations", input_power=torch.full((128,), same)
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


def test_a_group_without_input_starts_like_any_other(weight: Tensor, power: Tensor) -> None:
    plain = start_parameters(weight, SCHEME, torch.float16, start="mse")
    silent = power.clone()
    silent[32:64] = 0
    scales, zeros = start_parameters(weight, SCHEME, torch.float16, start="activations", input_power=silent)
    assert torch.equal(scales[:, 1], plain[0][:, 1])
    assert torch.equal(zeros[:, 1], plain[1][:, 1])


def test_activations_need_the_inputs(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="power of the inputs"):
        start_parameters(weight, SCHEME, torch.float16, start="activations")


def test_block_ap_names_its_own_starts() -> None:
    with pytest.raises(InputError, match="start is 'activations'; Block-AP's are minmax and mse"):
        BlockApSettings(SCHEME, start="activations")


def test_powers_are_mean_squares_over_the_first_windows(tiny_folder: Path) -> None:
    model = load_dense_model(tiny_folder, torch.float32, torch.device("cpu"))
    data = TokenWindows(tiny_tokens(5), tiny_tokens(5))
    name = "model.layers.0.self_attn.q_proj"
    found = input_powers(model, [name, "lm_head"], data, QatSettings(SCHEME, device="cpu"))
    embedded = model.model.embed_tokens.weight[data.input_ids].double()
    norm = model.model.layers[0].input_layernorm
    scaled = embedded / (embedded.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
    torch.testing.assert_close(found[name].double(), scaled.square().mean((0, 1)), rtol=1e-5, atol=0)
    last = model.model(data.input_ids).last_hidden_state.double()
    torch.testing.assert_close(found["lm_head"].double(), last.square().mean((0, 1)), rtol=1e-5, atol=0)
    assert not model.get_submodule(name)._forward_pre_hooks

    without_head = input_powers(model, [name], data, QatSettings(SCHEME, device="cpu"))
    assert torch.equal(without_head[name], found[name])
