"""The cost model: sizes of real models, bytes of real checkpoints, and the tables of its page."""

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import quantize_folder
from tiny_models import save_tiny_model, tiny_config
from transformers import LlamaConfig, Qwen3MoeConfig

from benchmarks.scaling.tables import MODELS, PAGE, filled
from eqat_train.costs.estimate import Work, block_seconds, disk, e2e_bytes, packed_bytes
from eqat_train.costs.machine import H200
from eqat_train.costs.shapes import ModelShape, block_shape, llama_shape, moe_shape
from eqat_train.models.decoder import find_decoder_layers
from eqat_train.models.loading import build_skeleton
from formats import QuantScheme


def test_the_tables_of_the_page_are_those_of_the_formulae() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page, "python -m benchmarks.scaling.tables --write"


def found(config: LlamaConfig | Qwen3MoeConfig) -> tuple[list[object], int]:
    model = build_skeleton(config, torch.float32)
    blocks = [block_shape(layer) for layer in find_decoder_layers(model)[1]]
    return [*blocks], sum(parameter.numel() for parameter in model.parameters())


def test_a_llamas_shape_is_that_of_the_real_modules() -> None:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    shape = llama_shape("small", 512, 1408, 8, 4, 3, 8192)
    assert found(config) == ([*shape.blocks], shape.parameters)
    assert MODELS["70B"].parameters == 68_976_648_192  # as its authors count


def test_a_mixtures_shape_counts_its_experts_and_those_of_a_token() -> None:
    config = Qwen3MoeConfig(
        vocab_size=500,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        tie_word_embeddings=False,
    )
    (one, _), _ = found(config)
    made = moe_shape("mixture", 128, [(128, 128), (128, 64), (128, 64), (128, 128)], 64, 8, 2, 0, 2, 500).blocks[0]
    assert (one.weights, one.active, one.largest, one.features) == (
        made.weights,
        made.active,
        made.largest,
        made.features,
    )
    assert one.parameters - made.parameters == 64  # norms of queries and keys


def test_packed_bytes_are_those_of_a_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", tiny_config_without_ties, dtype=torch.bfloat16)
    made = quantize_folder(folder, tmp_path / "packed", QuantScheme(2, 32))
    model = build_skeleton(folder, torch.float32)
    blocks = tuple(block_shape(layer) for layer in find_decoder_layers(model)[1])
    outside = sum(p.numel() for p in model.parameters()) - sum(block.parameters for block in blocks)
    shape = ModelShape("tiny", blocks, 64, 257, outside, 257 * 64)
    size = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    # headers, and a map of groups in every layer
    assert disk(shape, Work(2, 32), on_disk=False).output == pytest.approx(size, rel=0.25)


def tiny_config_without_ties() -> LlamaConfig:
    config = tiny_config("llama")
    config.intermediate_size = 512
    return config  # type: ignore[return-value]


def test_streams_are_on_disk_only_where_they_are_kept_there() -> None:
    model, work = MODELS["7B"], Work(samples=10, validation=0, seq_len=100)
    assert disk(model, work, on_disk=True).activations == 2 * 10 * 100 * 4096 * 4
    assert disk(model, work, on_disk=False).activations == 0
    assert disk(model, work, on_disk=True).peak > packed_bytes(model.weights, work)


def test_more_gpus_take_less_time_but_wait_for_each_other() -> None:
    model = MODELS["70B"]
    one, eight = (block_seconds(model.largest, model.hidden, Work(batch=16), H200, gpus) for gpus in (1, 8))
    assert one / 8 < eight < one
    saved = e2e_bytes(model, Work()) - e2e_bytes(model, Work(), ranks=8)
    assert saved == pytest.approx(model.weights * 2 / 8 * 7 / 8)  # codes alone are shared
