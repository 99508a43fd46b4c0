"""Generating: decoders against float64 on the dequantized weights, sampling, streamed text, and the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import act_order_layer, leave_out, mix, quantize_folder, rewrite
from tiny_models import ARCHITECTURES, save_tiny_model, tiny_tokens
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from eqat_train.cli import app
from eqat_train.inference.decoder import Decoder, GraphedDecoder, ModelDecoder
from eqat_train.inference.fused_linear import fuse_linears
from eqat_train.inference.generate import generate
from eqat_train.inference.llama_decoder import LlamaDecoder, is_like_llama
from eqat_train.inference.loading import load_model, make_decoder
from eqat_train.inference.packed_linear import PackedLinear
from eqat_train.inference.sampling import Sampler
from eqat_train.inference.text_stream import TextStream
from eqat_train.models.loading import load_dense_model, load_tokenizer
from formats import QuantScheme, round_to_nearest
from formats.errors import InputError
from formats.model import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def native(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_folder(tiny_folder, tmp_path_factory.mktemp("native") / "w4g32", QuantScheme(4, 32))


def load(folder: Path, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> nn.Module:
    with open_checkpoint(folder) as checkpoint:
        return load_model(checkpoint, dtype, device)


@torch.inference_mode()
def read(decoder: Decoder, ids: Tensor, prompt: int) -> Tensor:
    """Logits after a prompt and after each further token, float64 ``[tokens, vocabulary]``."""
    logits = [decoder.prefill(ids[:, :prompt]).clone()]
    logits += [decoder.step(ids[:, i : i + 1]).clone() for i in range(prompt, ids.shape[1])]
    return torch.stack(logits).double().cpu()


@torch.no_grad()
def exact_logits(folder: Path, ids: Tensor, prompt: int) -> Tensor:
    return load_dense_model(folder).double()(ids).logits[0, prompt - 1 :]


def check_decoder(decoder: Decoder, folder: Path, bound: float) -> None:
    """Two texts after one another: nothing of the first may be left in the second."""
    for seed in (0, 1):
        ids = tiny_tokens(1, 24, seed=seed)
        expected = exact_logits(folder, ids, 9)
        error = (read(decoder, ids.to(decoder.device), 9) - expected).norm() / expected.norm()
        assert error < bound


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_decoding_gives_the_logits_of_the_whole_text(architecture: str, tmp_path: Path) -> None:
    folder = quantize_folder(save_tiny_model(tmp_path / "model", architecture), tmp_path / "q", QuantScheme(3, 32))
    check_decoder(ModelDecoder(load(folder), 24), folder, 1e-5)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_mixtures_are_decoded_too(architecture: str, tmp_path: Path) -> None:
    around = "block_sparse_moe" if architecture == "mixtral" else "mlp"
    routers = dict.fromkeys(f"model.layers.{index}.{around}.gate" for index in (0, 1))
    dense = save_tiny_model(tmp_path / "model", architecture)
    folder = quantize_folder(dense, tmp_path / "q", QuantScheme(3, 32), schemes=routers)
    check_decoder(make_decoder(load(folder), 24), folder, 1e-5)


def without_sliding_window(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": None}))
    return folder


@pytest.mark.parametrize("architecture", LIKE_LLAMA)
@pytest.mark.parametrize("bits", [2, 3])
def test_own_kernels_between_linears_give_the_same(architecture: str, bits: int, tmp_path: Path) -> None:
    folder = quantize_folder(save_tiny_model(tmp_path / "model", architecture), tmp_path / "q", QuantScheme(bits, 32))
    model = load(without_sliding_window(folder))
    assert is_like_llama(model) and isinstance(make_decoder(model, 24), LlamaDecoder)
    check_decoder(LlamaDecoder(load(folder), 24), folder, 1e-5)


def test_other_models_keep_their_own_forward_pass(tmp_path: Path) -> None:
    for architecture in set(ARCHITECTURES) - set(LIKE_LLAMA) | {"mistral"}:  # mistral with its sliding window
        model = load(save_tiny_model(tmp_path / architecture, architecture))
        assert not is_like_llama(model)
        assert isinstance(make_decoder(model, 8), ModelDecoder)


def test_layers_that_cannot_be_one_are_run_side_by_side(tiny_folder: Path, native: Path, tmp_path: Path) -> None:
    finer = quantize_folder(tiny_folder, tmp_path / "w8", QuantScheme(8, 16))
    mixed = mix(native, finer, tmp_path / "mixed", "model.layers.0.self_attn.k_proj")
    left_out = leave_out(native, tmp_path / "left-out", "model.layers.1.mlp.up_proj")
    ordered = quantize_folder(tiny_folder, tmp_path / "ordered", QuantScheme(4, 32), change=act_order_layer)
    for folder in (mixed, left_out, ordered):
        check_decoder(LlamaDecoder(load(folder), 24), folder, 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_linears_are_exactly_the_linears(bits: int, bias: bool) -> None:
    # 3 bits put 10 zero-points in a word, so that 64 features end within one
    layers = [
        round_to_nearest(torch.randn(out, 64), QuantScheme(bits, 32), bias=torch.randn(out) if bias else None)
        for out in (64, 32, 7)
    ]
    linears = [PackedLinear.from_layer(layer) for layer in layers]
    x = torch.randn(3, 64)
    fused = fuse_linears(linears)
    assert isinstance(fused, PackedLinear)
    assert torch.equal(fused(x), torch.cat([linear(x) for linear in linears], -1))

    dense = [nn.Linear(64, out, bias=bias) for out in (64, 32, 7)]
    fused = fuse_linears(dense)
    assert isinstance(fused, nn.Linear)
    assert torch.allclose(fused(x), torch.cat([linear(x) for linear in dense], -1), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [ModelDecoder, LlamaDecoder])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_replayed_step_gives_what_a_step_gives(
    native: Path, kind: Callable[[nn.Module, int], Decoder], dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    check_decoder(GraphedDecoder(kind(load(native, device, dtype), 24)), native, 3e-2)
    ids = tiny_tokens(1).to(device)
    plain, graphed = kind(load(native, device, dtype), 24), GraphedDecoder(kind(load(native, device, dtype), 24))
    assert torch.equal(read(plain, ids, 5), read(graphed, ids, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["--cuda-graph", "--no-cuda-graph"])
def test_the_command_writes_the_same_text_on_a_gpu(native: Path, graph: str) -> None:
    options = ("the cat", "--max-new-tokens", 20, "--temperature", 0, "--dtype", "float32")
    expected = invoke(native, *options, "--device", "cpu").stdout
    assert invoke(native, *options, "--device", "cuda", graph).stdout == expected


def test_the_likeliest_token_at_temperature_zero() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0])
    assert Sampler(0.0, 1.0, 0, CPU)(logits).tolist() == [[1]]


def test_samples_follow_the_probabilities_and_the_seed() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log() * 2  # temperature 2 undoes it
    draws = [int(sampler(logits)) for sampler in [Sampler(2.0, 1.0, 7, CPU)] for _ in range(4000)]
    assert torch.bincount(torch.tensor(draws)).div(4000).sub(probabilities).abs().max() < 0.03
    again = Sampler(2.0, 1.0, 7, CPU)
    assert draws[:50] == [int(again(logits)) for _ in range(50)]
    other = Sampler(2.0, 1.0, 8, CPU)
    assert draws[:50] != [int(other(logits)) for _ in range(50)]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    for top_p, kept in ((0.4, {1}), (0.79, {1, 3}), (0.81, {0, 1, 3})):
        sampler = Sampler(1.0, top_p, 0, CPU)
        assert {int(sampler(logits)) for _ in range(300)} == kept


@pytest.mark.parametrize(("temperature", "top_p"), [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_sampling_out_of_range_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(InputError, match=r"temperature is|top_p is"):
        Sampler(temperature, top_p, 0, CPU)


def test_streamed_text_is_the_text_and_characters_come_whole(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)  # one token a byte
    text = "naïve 🙂 café"
    stream = TextStream(tokenizer, tokenizer("so ")["input_ids"])
    parts = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(parts) + stream.finish() == text
    assert [part for part in parts if part] == list(text)

    stream = TextStream(tokenizer)
    assert stream.push(tokenizer("é")["input_ids"][0]) == "" and stream.finish() == "�"


class Counting(Decoder):
    """Always wants the token after the last one read."""

    def __init__(self, max_length: int) -> None:
        self.device, self.max_length = CPU, max_length
        self.steps = 0

    def prefill(self, ids: Tensor) -> Tensor:
        return self.step(ids[:, -1:])

    def step(self, token: Tensor) -> Tensor:
        self.steps += 1
        return torch.nn.functional.one_hot(token[0, 0] + 1, 100).float()

    def counters(self) -> None:
        return None


def test_the_loop_stops_before_a_stop_token_and_at_the_limit() -> None:
    greedy, prompt = Sampler(0.0, 1.0, 0, CPU), torch.tensor([[3, 4]])
    assert list(generate(Counting(12), prompt, greedy, 10)) == list(range(5, 15))
    assert list(generate(Counting(12), prompt, greedy, 10, stop={8, 50})) == [5, 6, 7]
    assert list(generate(Counting(12), prompt, greedy, 10, stop={5})) == []
    assert list(generate(Counting(3), prompt, greedy, 1)) == [5]
    decoder = Counting(12)
    list(generate(decoder, prompt, greedy, 10))
    assert decoder.steps == 10  # the last token is not read again
    with pytest.raises(InputError, match="12"):
        next(generate(Counting(12), prompt, greedy, 11))
    with pytest.raises(InputError, match="no tokens"):
        next(generate(Counting(12), prompt[:, :0], greedy, 2))


def invoke(*words: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, words)], input=stdin, catch_exceptions=False)


def test_the_text_alone_goes_to_stdout(native: Path) -> None:
    shown = invoke(native, "the cat", "--max-new-tokens", 12, "--temperature", 0, "--device", "cpu")
    assert shown.exit_code == 0
    assert "7 prompt tokens in" in shown.stderr and "tokens/s" in shown.stderr

    model, tokenizer = load_dense_model(native), load_tokenizer(native)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 7:]
    assert shown.stdout == tokenizer.decode(made, skip_special_tokens=True) + "\n"

    quiet = invoke(native, "-", "--max-new-tokens", 12, "--temperature", 0, "--quiet", stdin="the cat")
    assert (quiet.stdout, quiet.stderr) == (shown.stdout, "")


def test_seeds_and_implementations(native: Path) -> None:
    options = (native, "the cat", "--max-new-tokens", 20, "--temperature", 1, "--dtype", "float32", "--device", "cpu")
    first = invoke(*options, "--seed", 3)
    assert first.stdout == invoke(*options, "--seed", 3).stdout != invoke(*options, "--seed", 4).stdout
    assert first.stdout == invoke(*options, "--seed", 3, "--impl", "reference").stdout


@pytest.mark.parametrize("format_id", ["gptq", "gptq_v2", "awq", "compressed-tensors", "mlx", "auto-round"])
def test_other_formats_are_read_as_well(native: Path, tmp_path: Path, format_id: str) -> None:
    options = ("the cat", "--max-new-tokens", 8, "--temperature", 0, "--impl", "reference", "--device", "cpu")
    other = rewrite(native, tmp_path / format_id, format_id)
    assert invoke(other, *options).stdout == invoke(native, *options).stdout


def test_a_dense_model_is_run_too(tiny_folder: Path) -> None:
    assert invoke(tiny_folder, "the cat", "--max-new-tokens", 3, "--device", "cpu").exit_code == 0


def test_the_chat_template_wraps_the_prompt(native: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(native, tmp_path / "chat")
    template = "{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }} {% endfor %}[assistant]"
    (folder / "chat_template.jinja").write_text(template)
    options = ("--max-new-tokens", 6, "--temperature", 0, "--device", "cpu")
    assert (
        invoke(folder, "hello", "--chat", *options).stdout
        == invoke(native, "[user] hello [assistant]", *options).stdout
    )
    with pytest.raises(InputError, match="no chat template"):
        invoke(native, "hello", "--chat", *options)


def test_prompts_and_the_context(native: Path) -> None:
    long = invoke(native, "x" * 120, "--max-new-tokens", 20, "--temperature", 0, "--device", "cpu")
    assert long.exit_code == 0 and "exceed the context of 128: 8 follow" in long.stderr
    with pytest.raises(InputError, match="the prompt has 130 tokens; the model's context is 128"):
        invoke(native, "x" * 130, "--device", "cpu")
    assert invoke(native, "", "--max-new-tokens", 3, "--device", "cpu").exit_code == 0


def test_what_cannot_be_run_is_refused(native: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist|not in the local cache|could not be downloaded"):
        invoke(tmp_path / "nowhere", "hello")
    with pytest.raises(InputError, match="impl is 'other'"):
        invoke(native, "hello", "--impl", "other", "--device", "cpu")


def test_containers_are_refused_with_the_export_that_helps(native: Path, tmp_path: Path) -> None:
    export = [sys.executable, "-m", "eqat_export", "export", str(native), "--quiet"]
    for format_id, name in (("onnx", "onnx"), ("gguf", "model.gguf")):
        out = tmp_path / name
        subprocess.run([*export, "--to", format_id, "--out", str(out)], cwd=ROOT, check=True)
        with pytest.raises(InputError, match=rf"is {format_id}.*eqat export {out} --to native"):
            invoke(out, "hello")


def test_ctrl_c_ends_with_the_text_so_far(native: Path) -> None:
    command = [sys.executable, "-m", "eqat_export", "generate", str(native), "the cat"]
    command += ["--max-new-tokens", "100", "--device", "cpu", "--impl", "reference", "--temperature", "1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    begun = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors.decode()
    assert (begun + rest).endswith(b"\n")
    assert b"prompt tokens in" in errors and b"Traceback" not in errors and b"error" not in errors
