"""GGUF files in llama.cpp itself: weights by ggml, logits, tokenizers, text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eqat_export.convert import convert
from eqat_export.runtime_check import RuntimeResult, check_runtime
from eqat_export.runtimes import get_runtime
from formats import QuantScheme, dequantize
from formats.gguf import pre_tokenizers
from formats.gguf.families import NameMap, family_of_config
from formats.gguf.header import read_header
from formats.gguf.tokenizer import add_tokenizer
from formats.model import open_checkpoint
from tests.gguf_files import rewritten
from tests.tiny_checkpoints import quantize_folder
from tests.tiny_models import save_tiny_model

pytest.importorskip("gguf", reason="needs gguf: pip install 'eqat[gguf]'")
pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, built for minutes: pip install 'eqat[llama-cpp]'")
pytestmark = pytest.mark.runtimes

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    'Once upon a time, there\'s 1234 foxes!\n\n  They said: "hello"… 😀 x',
    "  leading",
    "a\tb\r\n c",
    "IT'S we'Ve 3.14159 été 我想在apple工作1314151天\uff5e ------======= нещо",
    "x    y     z\n\n\n \n",
]


def proof(path: Path) -> RuntimeResult:
    with open_checkpoint(path) as checkpoint:
        return check_runtime(checkpoint, get_runtime("llama.cpp"))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_computes_with_our_weights(native, tmp_path, architecture, bits) -> None:
    source = native("source", bits, 64, architecture)
    convert(source, tmp_path / "out.gguf", "gguf")
    found = proof(tmp_path / "out.gguf")
    assert found.ok, found.lines()
    with open_checkpoint(source) as truth:
        assert found.weights == sum(truth.layer(name).codes.numel() for name in truth.layer_names)
    # not merely within the factors: the yardstick is the same arithmetic, so it is the same error
    assert found.error_rms == pytest.approx(found.own_rms, rel=0.25)


@pytest.mark.parametrize("kind", ["Q2_0", "Q4_0", "Q5_0", "Q8_0"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ggml_reads_every_type_as_we_do_rounded_or_not(tmp_path, bits, kind) -> None:
    source = quantize_folder(save_tiny_model(tmp_path / "dense"), tmp_path / "source", QuantScheme(bits, 64))
    convert(source, tmp_path / "out.gguf", "gguf", options={"gguf_type": kind})
    types = {tensor.type for name, tensor in read_header(tmp_path / "out.gguf").tensors.items() if "_" in name[4:]}
    assert kind in types
    found = proof(tmp_path / "out.gguf")
    assert found.weights_ok and found.logits_ok, found.lines()


def test_groups_of_one_block_a_whole_row_and_128(native, tmp_path) -> None:
    for group_size in (32, -1):
        convert(native(f"g{group_size}", 4, group_size), tmp_path / f"{group_size}.gguf", "gguf")
        assert proof(tmp_path / f"{group_size}.gguf").ok


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotations_are_the_same(native, tmp_path, rope) -> None:
    source = native("source", 4, 32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    convert(source, tmp_path / "out.gguf", "gguf")
    found = proof(tmp_path / "out.gguf")
    assert found.ok, found.lines()


class TestTheProofFails:
    def test_on_one_changed_code(self, native, tmp_path) -> None:
        source = native("source", 4, 32)
        convert(source, tmp_path / "out.gguf", "gguf")
        with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
            session = get_runtime("llama.cpp").load(checkpoint, torch.device("cpu"))
            name = checkpoint.layer_names[3]
            stored = read_header(tmp_path / "out.gguf").tensors[
                NameMap(family_of_config(checkpoint.reader.config), 2).to_ggml(f"{name}.weight")
            ]
            expected = dequantize(checkpoint.layer(name))
            data = bytearray((tmp_path / "out.gguf").read_bytes())
            data[stored.start + 10] ^= 0x10
            (tmp_path / "out.gguf").write_bytes(data)
            run = session.layer(name)
            assert run is not None
            assert int((run(torch.eye(expected.shape[1])).T != expected).sum()) == 1

    def test_on_rows_in_the_wrong_order(self, native, tmp_path) -> None:
        source = native("source", 4, 32)
        convert(source, tmp_path / "out.gguf", "gguf")
        with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
            good = check_runtime(checkpoint, get_runtime("llama.cpp"))
        data = bytearray((tmp_path / "out.gguf").read_bytes())
        stored = read_header(tmp_path / "out.gguf").tensors["blk.0.attn_k.weight"]
        rows, width = stored.shape[0], stored.nbytes // stored.shape[0]
        block = [bytes(data[stored.start + i * width : stored.start + (i + 1) * width]) for i in range(rows)]
        data[stored.start : stored.start + stored.nbytes] = b"".join(reversed(block))
        (tmp_path / "wrong.gguf").write_bytes(data)
        with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
            checkpoint.reader.folder = tmp_path / "wrong.gguf"  # llama.cpp loads the other file
            session = get_runtime("llama.cpp").load(checkpoint, torch.device("cpu"))
            ids = torch.arange(1, 65).view(1, 64)
            wrong = session.logits(ids)
            checkpoint.reader.folder = tmp_path / "out.gguf"
            right = get_runtime("llama.cpp").load(checkpoint, torch.device("cpu")).logits(ids)
        assert float((wrong - right).std()) > 10 * good.own_rms


def test_a_file_quantized_by_llama_cpp_itself_is_read(native, tmp_path) -> None:
    import llama_cpp  # noqa: PLC0415

    source = native("source", 4, 32)
    convert(source, tmp_path / "ours.gguf", "gguf")
    plain = rewritten(tmp_path / "ours.gguf", tmp_path / "f32.gguf", lambda name: "F32")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.nthread = 1
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(theirs).encode(), parameters) == 0
    with open_checkpoint(theirs) as found:
        assert found.scheme == QuantScheme(4, 32)
        result = check_runtime(found, get_runtime("llama.cpp"))
    assert result.ok, result.lines()
    convert(theirs, tmp_path / "gptq", "gptq")
    with open_checkpoint(tmp_path / "gptq") as back, open_checkpoint(theirs) as truth:
        for name in truth.layer_names:
            assert torch.equal(dequantize(back.layer(name)), dequantize(truth.layer(name)))


class TestTokenizers:
    def ids(self, folder: Path, out: Path, vocabulary: int, name: str | None = None) -> Callable[[str], list[int]]:
        """llama.cpp's ids of a text, from a file that holds only the tokenizer of ``folder``."""
        import gguf  # noqa: PLC0415
        import llama_cpp  # noqa: PLC0415

        writer = gguf.GGUFWriter(out, "llama")
        assert not add_tokenizer(writer, folder, vocabulary, name)
        for add in (writer.add_block_count, writer.add_context_length, writer.add_head_count):
            add(1)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(32)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        model = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
        return lambda text: model.tokenize(text.encode(), add_bos=True, special=True)

    def trained(self, folder: Path, pre_tokenizer, ignore_merges: bool, bos: str | None) -> Path:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: PLC0415
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

        tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([*TEXTS * 20, (ROOT / "README.md").read_text()], trainer)
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token=bos)
        saved.save_pretrained(folder)
        (folder / "config.json").write_text("{}")
        return folder

    @pytest.mark.parametrize("bos", [None, "<s>"])
    @pytest.mark.parametrize("name", ["gpt-2", "smollm", *pre_tokenizers._BY_REGEX.values()])
    def test_byte_level_ones_split_and_merge_alike(self, tmp_path, name, bos) -> None:
        from tokenizers import Regex  # noqa: PLC0415
        from tokenizers import pre_tokenizers as splits  # noqa: PLC0415
        from transformers import AutoTokenizer  # noqa: PLC0415

        byte_level = splits.ByteLevel(add_prefix_space=False)
        regex = {known: key for key, known in pre_tokenizers._BY_REGEX.items()}.get(name)
        split = {"gpt-2": byte_level, "smollm": splits.Sequence([splits.Digits(True), byte_level])}.get(name)
        if regex is not None:
            plain = splits.ByteLevel(add_prefix_space=False, use_regex=False)
            split = splits.Sequence([splits.Split(Regex(regex[0]), "isolated"), plain])
        folder = self.trained(tmp_path / "folder", split, regex is not None and regex[1], bos)
        theirs = AutoTokenizer.from_pretrained(folder)
        ids = self.ids(folder, tmp_path / "tokenizer.gguf", 603)
        assert read_header(tmp_path / "tokenizer.gguf").metadata["tokenizer.ggml.pre"] == name
        for text in [*TEXTS, "a<|endoftext|>b"]:
            assert ids(text) == theirs.encode(text), text

    def test_an_older_folder_without_tokenizer_json(self, tmp_path) -> None:
        from tokenizers import pre_tokenizers as splits  # noqa: PLC0415
        from transformers import AutoTokenizer  # noqa: PLC0415

        made = self.trained(tmp_path / "made", splits.ByteLevel(add_prefix_space=False), False, None)
        model = json.loads((made / "tokenizer.json").read_text())["model"]
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"])])
        )
        added = {"content": "<|im_start|>", "special": True, "normalized": False}
        added |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
        settings |= {"added_tokens_decoder": {"600": added}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "config.json").write_text("{}")
        ids = self.ids(folder, tmp_path / "tokenizer.gguf", 610)
        metadata = read_header(tmp_path / "tokenizer.gguf").metadata
        assert metadata["tokenizer.ggml.pre"] == "qwen2"
        assert metadata["tokenizer.ggml.tokens"][600:602] == ["<|im_start|>", "[PAD601]"]
        assert metadata["tokenizer.ggml.token_type"][600:602] == [3, 5]
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in [*TEXTS, "<|im_start|>user"]:
            assert ids(text) == theirs.encode(text), text

    def test_sentencepiece_ones_too_with_and_without_their_model(self, tmp_path) -> None:
        sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece: pip install 'eqat[gguf]'")
        from transformers import AutoTokenizer  # noqa: PLC0415

        (tmp_path / "text").write_text("\n".join([*TEXTS * 20, (ROOT / "README.md").read_text()]))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"),
            model_prefix=str(tmp_path / "trained"),
            vocab_size=600,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.99,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            minloglevel=2,
        )
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        settings |= {"add_bos_token": True}
        config = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
        with_model, without = tmp_path / "model", tmp_path / "json"
        with_model.mkdir()
        shutil.copy(tmp_path / "trained.model", with_model / "tokenizer.model")
        (with_model / "tokenizer_config.json").write_text(json.dumps(settings))
        (with_model / "config.json").write_text(json.dumps(config))
        AutoTokenizer.from_pretrained(with_model).save_pretrained(without)
        (without / "config.json").write_text(json.dumps(config))
        truth = sentencepiece.SentencePieceProcessor(str(tmp_path / "trained.model"))
        for folder in (with_model, without):
            ids = self.ids(folder, tmp_path / f"{folder.name}.gguf", 600)
            for text in TEXTS:
                assert ids(text) == [1, *truth.encode(text)], (folder.name, text)


def test_the_demo_model_tells_a_story(eqat, tmp_path) -> None:
    import llama_cpp  # noqa: PLC0415

    demo = ROOT / "eqat_train" / "demo" / "assets"
    source = quantize_folder(demo, tmp_path / "demo", QuantScheme(4, 64))
    assert eqat("export", source, "--to", "gguf", "--out", tmp_path / "demo.gguf").code == 0
    outcome = eqat("verify", tmp_path / "demo.gguf", "--against", source, "--runtime", "llama.cpp")
    assert outcome.code == 0, outcome.out
    assert "bit for bit in float32" in outcome.out and "our own with int8 activations" in outcome.out
    model = llama_cpp.Llama(str(tmp_path / "demo.gguf"), n_ctx=128, verbose=False)
    story = model("Once upon a time", max_tokens=30, temperature=0)["choices"][0]["text"]
    assert len(story.split()) > 10 and "named" in story
