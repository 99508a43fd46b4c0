"""GGUF files: written, read by the gguf package and by transformers, read back, and refused where they must be."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import check_runtime
from eqat_export.runtimes import get_runtime
from formats import QuantScheme, dequantize, get_format
from formats.errors import CheckpointError, OutputExistsError, UnsupportedSchemeError
from formats.gguf.header import read_header
from formats.gguf.rope import llama3_factors
from formats.model import Checkpoint, open_checkpoint
from tests.gguf_files import rewritten
from tests.tiny_checkpoints import quantize_folder
from tests.tiny_models import save_tiny_model

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'eqat[gguf]'")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def same_weights(ours: Checkpoint, truth: Checkpoint) -> None:
    assert ours.layer_names == truth.layer_names
    for name in truth.layer_names:
        assert torch.equal(dequantize(ours.layer(name)), dequantize(truth.layer(name))), name
        mine, theirs = ours.layer(name).bias, truth.layer(name).bias
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine.float(), theirs.float())
    for name in truth.passthrough_names:
        assert torch.equal(ours.get(name).float(), truth.get(name).float()), name


def reconfigured(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.fixture
def exported(native: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A native checkpoint and a GGUF file made of it."""

    def make(architecture: str = "llama", bits: int = 4, group_size: int = 32, **options: str) -> tuple[Path, Path]:
        source = native(f"{architecture}{bits}", bits, group_size, architecture)
        out = tmp_path / f"{architecture}{bits}.gguf"
        convert(source, out, "gguf", options=options)
        return source, out

    return make


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_file_holds_the_model_exactly(exported, architecture, bits) -> None:
    source, out = exported(architecture, bits)
    with open_checkpoint(source) as truth, open_checkpoint(out) as found:
        assert found.format.id == "gguf"
        assert (found.scheme.bits, found.scheme.group_size) == (bits, 32)
        same_weights(found, truth)
        for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
            assert found.reader.config[key] == truth.reader.config[key], key


def test_the_gguf_package_reads_names_shapes_and_types(exported) -> None:
    _, out = exported("llama", 4)
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "F32"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == "Q5_0"
    assert len(types) == 2 * 9 + 3
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == 8
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.vocab_size"].contents() == 257
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 257
    assert reader.data_offset % 32 == 0
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_q_and_k_rows_are_in_llamas_order_and_no_others(exported) -> None:
    source, out = exported("llama", 4)
    theirs = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(out).tensors}
    with open_checkpoint(source) as truth:
        for module, name, heads in (("q", "attn_q", 4), ("k", "attn_k", 2), ("v", "attn_v", 0)):
            weight = dequantize(truth.layer(f"model.layers.1.self_attn.{module}_proj")).numpy()
            if heads:  # one head at a time: rows 0, half, 1, half + 1, ...
                width = len(weight) // heads
                order = [
                    head * width + half * width // 2 + i
                    for head in range(heads)
                    for i in range(width // 2)
                    for half in (0, 1)
                ]
                weight = weight[order]
            assert np.array_equal(theirs[f"blk.1.{name}.weight"], weight), module


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_transformers_computes_with_our_weights(native, tmp_path, architecture) -> None:
    source = reconfigured(native("source", 3, 32, architecture), sliding_window=None)
    out = tmp_path / "out.gguf"
    convert(source, out, "gguf")
    with open_checkpoint(out) as checkpoint:
        found = check_runtime(checkpoint, get_runtime("transformers"))
    assert found.ok, found.lines()
    assert found.dtype == "float32"
    assert found.error_max == found.own_max  # the same numbers in the same order


def test_transformers_computes_with_our_weights_in_qwen3(tmp_path: Path, monkeypatch) -> None:
    from tests import tiny_models  # noqa: PLC0415

    # its reader leaves head_dim at Qwen3Config's 128, whatever the file says
    wide = lambda: tiny_models.Qwen3Config(**tiny_models.SHAPE, head_dim=128, tie_word_embeddings=True)  # noqa: E731
    monkeypatch.setitem(tiny_models.ARCHITECTURES, "qwen3", wide)
    source = quantize_folder(save_tiny_model(tmp_path / "dense", "qwen3"), tmp_path / "source", QuantScheme(4, 64))
    convert(source, tmp_path / "out.gguf", "gguf")
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        assert check_runtime(checkpoint, get_runtime("transformers")).ok


def test_transformers_says_that_it_does_not_know_q2_0(tmp_path) -> None:
    source = quantize_folder(save_tiny_model(tmp_path / "dense"), tmp_path / "source", QuantScheme(2, 64))
    convert(source, tmp_path / "out.gguf", "gguf", options={"gguf_type": "Q2_0"})
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        refusal = check_runtime(checkpoint, get_runtime("transformers")).refusal
    assert "does not know Q2_0; use --runtime llama.cpp" in refusal


def test_through_the_command_and_back_to_gptq(eqat, native) -> None:
    source = native("model", 3, 64)
    outcome = eqat("export", source, "--to", "gguf")
    assert outcome.code == 0, outcome.err
    assert "Q4_0" in outcome.out and "q - z beyond Q2_0's -1..2" in outcome.out
    file = source.with_name("model.gguf")
    outcome = eqat("verify", file, "--against", source)
    assert outcome.code == 0, outcome.out
    assert "all 14 layers hold the same weights, bit for bit" in outcome.out
    outcome = eqat("export", file, "--to", "gptq_v2", "--out", "back")
    assert outcome.code == 0, outcome.err
    with open_checkpoint("back") as found, open_checkpoint(source) as truth:
        assert found.scheme == truth.scheme
        same_weights(found, truth)
    assert eqat("verify", "back", "--against", source).code == 0
    assert Path("back/tokenizer.json").exists()


def test_another_file_of_the_same_model_keeps_its_tokenizer(exported, tmp_path) -> None:
    source, out = exported("llama", 4)
    convert(out, tmp_path / "again.gguf", "gguf", options={"gguf_type": "Q8_0"})
    first, second = read_header(out).metadata, read_header(tmp_path / "again.gguf").metadata
    for key, value in first.items():
        if key not in ("general.name", "general.file_type"):
            assert second[key] == value, key
    with open_checkpoint(source) as truth, open_checkpoint(tmp_path / "again.gguf") as found:
        same_weights(found, truth)


class TestOtherToolsFiles:
    @pytest.mark.parametrize(("name", "bits"), [("Q4_0", 4), ("Q5_0", 5), ("Q8_0", 8)])
    def test_uniform_types_are_read_as_they_are(self, exported, tmp_path, name, bits) -> None:
        _, ours = exported("llama", 4)
        theirs = rewritten(ours, tmp_path / "theirs.gguf", lambda tensor: name if "blk" in tensor else "F16")
        weights = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(theirs).tensors}
        with open_checkpoint(theirs) as found:
            assert found.scheme == QuantScheme(bits, 32)
            layer = found.layer("model.layers.0.mlp.up_proj")
            assert np.array_equal(dequantize(layer).numpy(), weights["blk.0.ffn_up.weight"])
            assert layer.scheme.sym
            assert found.get("model.embed_tokens.weight").dtype == torch.float16
            runtime = check_runtime(found, get_runtime("transformers"))
        assert runtime.ok, runtime.lines()

    def test_quantized_embeddings_and_heads_are_read_as_fp32(self, exported, tmp_path) -> None:
        _, ours = exported("llama", 4)
        kinds = {"token_embd.weight": "Q8_0", "output.weight": "Q5_1"}
        theirs = rewritten(ours, tmp_path / "theirs.gguf", lambda tensor: kinds.get(tensor, "Q4_0"))
        weights = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(theirs).tensors}
        with open_checkpoint(theirs) as found:
            assert np.array_equal(found.get("model.embed_tokens.weight").numpy(), weights["token_embd.weight"])
            assert np.array_equal(found.get("lm_head.weight").numpy(), weights["output.weight"])

    def test_mixed_types_have_a_scheme_each(self, exported, tmp_path) -> None:
        _, ours = exported("llama", 4)
        kind = lambda name: "F16" if "blk" not in name else "Q8_0" if "ffn_down" in name else "Q4_0"  # noqa: E731
        theirs = rewritten(ours, tmp_path / "theirs.gguf", kind)
        with open_checkpoint(theirs) as found:
            assert found.scheme == QuantScheme(4, 32)
            assert set(found.overrides) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
            assert set(found.overrides.values()) == {QuantScheme(8, 32)}
        convert(theirs, tmp_path / "gptq", "gptq")
        with open_checkpoint(tmp_path / "gptq") as back, open_checkpoint(theirs) as truth:
            same_weights(back, truth)

    def test_other_block_types_are_refused_with_the_reason(self, exported, tmp_path, monkeypatch) -> None:
        _, ours = exported("llama", 4)
        data = bytearray(ours.read_bytes())
        name = b"blk.1.ffn_down.weight"
        at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 16
        assert struct.unpack_from("<I", data, at) == (6,)  # Q5_0
        struct.pack_into("<I", data, at, 20)  # IQ4_NL, which also has blocks of 32
        ours.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight is IQ4_NL.*no codes.*gguf_file="):
            open_checkpoint(ours)

    @pytest.mark.parametrize(
        ("metadata", "match"),
        [
            ({"general.architecture": "gemma"}, "architecture 'gemma' is not read here; llama, qwen2, qwen3 are"),
            ({"llama.expert_count": 8}, "llama.expert_count 8, which LlamaForCausalLM does not have"),
            ({"llama.rope.scaling.type": "longrope"}, "longrope.*none, linear and yarn are read"),
            ({"llama.rope.dimension_count": 8}, "only a part of each head is rotated"),
        ],
    )
    def test_models_that_compute_something_else_are_refused(self, exported, tmp_path, metadata, match) -> None:
        _, ours = exported("llama", 4)
        theirs = tmp_path / "theirs.gguf"
        if "general.architecture" in metadata:
            theirs.write_bytes(ours.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0gemma", 1))
        else:
            rewritten(ours, theirs, lambda name: "Q4_0" if "blk" in name else "F16", metadata)
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(theirs)


class TestDamagedFiles:
    @pytest.fixture
    def data(self, exported) -> bytearray:
        return bytearray(exported("llama", 4)[1].read_bytes())

    def refusal(self, data: bytes | bytearray, tmp_path: Path) -> str:
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path)
        text = str(caught.value)
        assert "\n" not in text and str(path) in text
        return text

    def test_truncated_anywhere(self, data, tmp_path) -> None:
        for length in [4, 10, 23, 24, 100, 1000, len(data) // 2, len(data) - 64]:
            self.refusal(data[:length], tmp_path)

    def test_no_gguf_at_all(self, tmp_path) -> None:
        assert "is no GGUF file" in self.refusal(b"GGML" + bytes(100), tmp_path)
        assert "is no GGUF file" in self.refusal(b"", tmp_path)

    def test_a_version_of_the_future(self, data, tmp_path) -> None:
        struct.pack_into("<I", data, 4, 7)
        assert "GGUF version 7" in self.refusal(data, tmp_path)

    def test_counts_beyond_the_file(self, data, tmp_path) -> None:
        struct.pack_into("<Q", data, 16, 2**60)
        assert "runs past its end" in self.refusal(data, tmp_path)

    def test_a_missing_file(self, tmp_path) -> None:
        with pytest.raises(CheckpointError, match=r"does not exist; give a \.gguf file"):
            open_checkpoint(tmp_path / "none.gguf")

    def test_a_scheme_that_the_blocks_contradict(self, data, tmp_path) -> None:
        path = tmp_path / "other.gguf"
        path.write_bytes(data.replace(b'"group_size":32', b'"group_size":64'))
        with open_checkpoint(path) as found, pytest.raises(CheckpointError, match="different scales"):
            found.layer(found.layer_names[0])


class TestTheOutput:
    def test_an_existing_file_needs_force(self, exported) -> None:
        source, out = exported("llama", 4)
        with pytest.raises(OutputExistsError, match="--force"):
            convert(source, out, "gguf")
        convert(source, out, "gguf", force=True)

    def test_force_replaces_gguf_files_only(self, exported, tmp_path) -> None:
        source, _ = exported("llama", 4)
        other = tmp_path / "notes.gguf"
        other.write_text("mine")
        with pytest.raises(OutputExistsError, match="no GGUF file"):
            convert(source, other, "gguf", force=True)
        assert other.read_text() == "mine"

    def test_a_failure_on_the_way_leaves_nothing(self, native, edited, tmp_path) -> None:
        def overflow(tensors: dict[str, torch.Tensor]) -> None:
            name = "model.layers.1.mlp.down_proj.scales"
            tensors[name] = tensors[name].float() + 1e6

        source = edited(native("source", 4, 32), overflow)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(UnsupportedSchemeError, match=r"model\.layers\.1\.mlp\.down_proj: a scale is"):
            convert(source, tmp_path / "new" / "out.gguf", "gguf")
        assert sorted(tmp_path.iterdir()) == before

    def test_a_tensor_that_never_came_is_noticed(self, native, tmp_path) -> None:
        fmt = get_format("gguf")
        with open_checkpoint(native("source", 4, 32)) as source:
            writer = fmt.create(tmp_path / "out.gguf", source, shard_size=1, force=False)
            with pytest.raises(CheckpointError, match=r"21 tensors of .* were never written"), writer:
                writer.finish()
        assert not (tmp_path / "out.gguf").exists()


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"model_type": "phi3"}, "'phi3'.*is not written as GGUF; LlamaForCausalLM"),
            ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*computes 'silu' only"),
            ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
            ({"intermediate_size": ...}, "intermediate_size None"),
        ],
    )
    def test_configurations_that_llama_cpp_does_not_compute(self, native, tmp_path, changes, match) -> None:
        source = reconfigured(native("source", 4, 32), **changes)
        with pytest.raises((UnsupportedSchemeError, CheckpointError), match=match):
            convert(source, tmp_path / "out.gguf", "gguf")

    def test_a_model_without_a_tokenizer(self, native, tmp_path) -> None:
        source = native("source", 4, 32)
        for path in source.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(CheckpointError, match="has no tokenizer"):
            convert(source, tmp_path / "out.gguf", "gguf")

    def test_an_unknown_split_unless_it_is_named(self, native, tmp_path) -> None:
        source = native("source", 4, 32)
        path = source / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
        path.write_text(json.dumps(tokenizer))
        with pytest.raises(
            CheckpointError, match=r"not known: its pre_tokenizer is .*--pre-tokenizer gpt-2\|llama-bpe"
        ):
            convert(source, tmp_path / "out.gguf", "gguf")
        convert(source, tmp_path / "out.gguf", "gguf", options={"pre_tokenizer": "smollm"})
        assert read_header(tmp_path / "out.gguf").metadata["tokenizer.ggml.pre"] == "smollm"

    def test_more_ids_than_embeddings(self, native, tmp_path) -> None:
        source = reconfigured(native("source", 4, 32), vocab_size=256)
        with pytest.raises(CheckpointError, match="has id 256, the embedding 256 rows"):
            convert(source, tmp_path / "out.gguf", "gguf")


def test_a_sliding_window_limits_the_context(exported) -> None:
    _, out = exported("mistral", 4)
    assert read_header(out).metadata["llama.context_length"] == 8


def test_ids_beyond_the_tokenizer_are_unused_tokens(tmp_path, monkeypatch) -> None:
    from tests import tiny_models  # noqa: PLC0415

    more = lambda: tiny_models.LlamaConfig(**{**tiny_models.SHAPE, "vocab_size": 260})  # noqa: E731
    monkeypatch.setitem(tiny_models.ARCHITECTURES, "llama", more)
    source = quantize_folder(save_tiny_model(tmp_path / "dense"), tmp_path / "source", QuantScheme(4, 32))
    convert(source, tmp_path / "out.gguf", "gguf")
    metadata = read_header(tmp_path / "out.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][257:] == ["[PAD257]", "[PAD258]", "[PAD259]"]
    assert metadata["tokenizer.ggml.token_type"][257:] == [5, 5, 5]
    assert metadata["tokenizer.ggml.token_type"][0] == 3  # <|endoftext|> is a control token though in the vocabulary


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_the_tensor_llama_cpp_wants_and_is_told_from_it(native, tmp_path, factor) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = reconfigured(native("source", 4, 32), rope_parameters=rope)
    convert(source, tmp_path / "out.gguf", "gguf")
    with open_checkpoint(tmp_path / "out.gguf") as found:
        assert found.reader.config["rope_parameters"] == rope
    # transformers' own frequencies, divided by ours, are the plain ones
    from transformers import LlamaConfig  # noqa: PLC0415
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415

    config = LlamaConfig(hidden_size=128 * 2, num_attention_heads=2, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / (500000.0 ** (torch.arange(0, 128, 2).double() / 128))
    factors = llama3_factors(rope, 128)
    assert factors is not None and len(set(factors.tolist())) > 5
    assert torch.allclose(plain / scaled.double(), factors.double(), rtol=1e-5)
