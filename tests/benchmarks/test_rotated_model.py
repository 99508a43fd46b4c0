"""A rotated model predicts what the model does, and its weights are others."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.recipes.rotated_model import hadamard, rotate_


def _model(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2)
    return model


@torch.no_grad()
def test_predictions_stay_and_weights_do_not() -> None:
    model, ids = _model(), torch.arange(40).view(2, 20)
    expected, weight = model(ids).logits, model.model.layers[1].mlp.down_proj.weight.clone()
    rotate_(model)
    # transformers' norms compute their statistics in float32
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.model.layers[1].mlp.down_proj.weight, weight, atol=1e-2)
    assert all(bool((p == 1).all()) for name, p in model.named_parameters() if "norm" in name)


def test_a_hadamard_matrix_is_orthogonal_and_flat() -> None:
    matrix = hadamard(64, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 1 / 8))
    with pytest.raises(ValueError, match="power of two"):
        hadamard(48, torch.Generator())


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="tied"):
        rotate_(_model(tie_word_embeddings=True))
