"""Capture: blocks replayed with captured arguments are the model's own blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqat_train.block_ap.capture import BlockCall, Capture
from eqat_train.models.decoder import find_decoder_layers
from eqat_train.models.loading import build_skeleton, load_dense_model, load_parameters_, unload_
from formats.checkpoint import CheckpointReader
from formats.errors import InputError
from tests.tiny_models import ARCHITECTURES, save_tiny_model, tiny_config, tiny_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_blocks_equal_the_real_models_hidden_states(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", architecture)
    tokens = tiny_tokens(3)
    real = load_dense_model(folder)
    last_output: list[Any] = []
    find_decoder_layers(real)[1][-1].register_forward_hook(lambda *args: last_output.append(args[2]))
    with torch.no_grad():
        hidden = real(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    last = last_output[0][0] if isinstance(last_output[0], tuple) else last_output[0]
    expected = [*hidden[1:-1], last]  # the last of hidden_states is after the final norm

    skeleton = build_skeleton(folder, torch.float32)
    path, layers = find_decoder_layers(skeleton)
    with CheckpointReader(folder) as reader:
        with Capture(skeleton, path, layers, reader, CPU) as capture:
            calls = capture.calls(tokens[:1])
            stream = capture.inputs(tokens)
        assert torch.equal(stream, hidden[0])
        for index, call in enumerate(calls):
            load_parameters_(layers[index], f"{path}.{index}", reader, CPU, torch.float32)
            with torch.no_grad():
                stream = call.run(layers[index], stream)
            assert torch.equal(stream, expected[index])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])  # plain, scaled by its own module, tied
def test_an_embedding_larger_than_a_block_is_read_by_rows_to_the_same_hidden_states(
    architecture: str, tmp_path: Path
) -> None:
    def config() -> Any:
        made = tiny_config(architecture)
        made.vocab_size = 2049
        made.pad_token_id = 2048  # beyond the rows of any batch
        return made

    folder = save_tiny_model(tmp_path / "model", config, dtype=torch.bfloat16)
    tokens = torch.cat([tiny_tokens(2), torch.tensor([[2047, 2048, 5, 6] * 6])])
    expected = load_dense_model(folder)(input_ids=tokens, output_hidden_states=True).hidden_states[0]
    skeleton = build_skeleton(folder, torch.float32)
    path, layers = find_decoder_layers(skeleton)
    embedding = skeleton.get_input_embeddings()
    with CheckpointReader(folder) as reader:
        with Capture(skeleton, path, layers, reader, CPU) as capture:
            assert torch.equal(capture.inputs(tokens), expected)
            assert embedding.weight.shape == (len(tokens.unique()), 64)
            assert torch.equal(capture.inputs(tokens[1:]), expected[1:])
        assert embedding.weight.is_meta and embedding.weight.shape == (2049, 64) and embedding.padding_idx == 2048


def test_layers_with_and_without_a_sliding_window_get_their_own_masks(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "gemma2")
    skeleton = build_skeleton(folder, torch.float32)
    path, layers = find_decoder_layers(skeleton)
    with CheckpointReader(folder) as reader, Capture(skeleton, path, layers, reader, CPU) as capture:
        sliding, full = (call.kwargs["attention_mask"] for call in capture.calls(tiny_tokens(1)))
    visible = [(mask == 0).squeeze().sum(dim=1) for mask in (sliding, full)]
    assert torch.equal(visible[1], torch.arange(1, 25))
    assert torch.equal(visible[0], torch.arange(1, 25).clamp(max=8))


def test_capture_leaves_the_skeleton_as_it_found_it(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama")
    skeleton = build_skeleton(folder, torch.float32)
    path, layers = find_decoder_layers(skeleton)
    with CheckpointReader(folder) as reader, Capture(skeleton, path, layers, reader, CPU) as capture:
        capture.calls(tiny_tokens(1))
        real = {name for name, parameter in skeleton.named_parameters() if not parameter.is_meta}
        assert real == {"model.embed_tokens.weight"}
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(buffer.is_meta for buffer in skeleton.buffers())
    assert all("forward" not in vars(layer) for layer in layers)
    assert not any(module._forward_pre_hooks for module in skeleton.modules())


class _Block(nn.Module):
    """Returns a tuple, takes the hidden states by keyword, and owns a buffer that no checkpoint holds."""

    attention_type = "full_attention"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.register_buffer("offset", torch.tensor(3.0), persistent=False)

    def forward(self, hidden_states: Tensor, shift: Tensor) -> tuple[Tensor, str]:
        return hidden_states + self.linear(hidden_states) + shift + self.offset, "rest"


class _Model(nn.Module):
    """A decoder in the older style; ``mode`` adds one thing that cannot be trained."""

    def __init__(self, mode: str = "plain") -> None:
        super().__init__()
        self.mode = mode
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.seen: list[str] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        hidden = self.embed(input_ids)
        shift = torch.arange(input_ids.shape[1]).view(1, -1, 1)
        for index, block in enumerate(self.blocks):
            if self.mode == "skips" and index == 1:
                continue
            if self.mode == "tokens" and index == 2:
                shift = input_ids[..., None]
            if self.mode == "batch":
                shift = shift.expand(1, -1, 1)[0][None].expand(input_ids.shape[0] * 4, -1, 1)
            self.seen.append(block.attention_type)
            outputs = block(hidden_states=hidden, shift=shift)
            hidden, rest = outputs
            assert rest == "rest"
        return hidden


class _State:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def _skeleton(mode: str) -> tuple[_Model, _Model, _State]:
    real, skeleton = _Model(mode), _Model(mode)
    unload_(skeleton)
    return real, skeleton, _State(real.state_dict())


def test_blocks_that_return_tuples_and_take_keywords_are_replayed() -> None:
    real, skeleton, state = _skeleton("plain")
    tokens = torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    with Capture(skeleton, "blocks", skeleton.blocks, state, CPU) as capture:
        calls, stream = capture.calls(tokens[:1]), capture.inputs(tokens)
    assert set(skeleton.seen) == {"full_attention"}
    for index, call in enumerate(calls):
        load_parameters_(skeleton.blocks[index], f"blocks.{index}", state, CPU, torch.float32)
        stream = call.run(skeleton.blocks[index], stream)
    assert torch.equal(stream, real(tokens, use_cache=False))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("tokens", r"blocks\.2 is called with shift that depends on the tokens"),
        ("skips", r"blocks\.1 is never called"),
        ("batch", r"blocks\.0 \(_Block\) takes arguments that do not broadcast"),
    ],
)
def test_blocks_whose_arguments_cannot_be_replayed_are_refused(mode: str, message: str) -> None:
    _, skeleton, state = _skeleton(mode)
    with Capture(skeleton, "blocks", skeleton.blocks, state, CPU) as capture, pytest.raises(InputError, match=message):
        capture.calls(torch.tensor([[1, 2, 3, 4]]))
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_block_call_does_not_change_its_captured_arguments() -> None:
    call = BlockCall(kwargs={"shift": torch.zeros(1)}, hidden_keyword="hidden_states")
    call.run(_Block(), torch.zeros(1, 2, 8))
    assert list(call.kwargs) == ["shift"]
