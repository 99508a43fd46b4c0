"""Models of images and text: the text decoder is quantized, the rest passes through as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MULTIMODAL, save_tiny_model, tiny_tokens
from transformers import AutoModelForImageTextToText

from eqat_export.compare import compare_checkpoints
from eqat_export.convert import convert
from eqat_export.verify import verify_checkpoint
from eqat_train.block_ap import BlockApSettings, run_block_ap
from eqat_train.config import TrainConfig
from eqat_train.e2e_qp.packed_model import load_packed_model
from eqat_train.models.loading import build_skeleton, load_dense_model
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme, available_formats, get_format
from formats.checkpoint import CheckpointReader
from formats.errors import EqatError, InputError
from formats.model import open_checkpoint

LINEAR = "language_model.model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random models of images and text, each made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny_model(tmp_path_factory.mktemp(name) / "model", name)
        return made[name]

    return make


@torch.no_grad()
def whole_models_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' own model of all parts, for text."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=tokens).logits


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_decoder_alone_computes_what_the_whole_model_does(name: str, saved: Callable[[str], Path]) -> None:
    tokens = tiny_tokens(2) % 250 + 1  # none that stands for an image
    with torch.no_grad():
        ours = load_dense_model(saved(name))(input_ids=tokens).logits
    torch.testing.assert_close(ours, whole_models_logits(saved(name), tokens), rtol=0, atol=1e-5)
    skeleton = build_skeleton(saved(name), torch.float32)
    assert not any("vision" in path for path, _ in skeleton.named_modules())


@pytest.mark.parametrize("name", MULTIMODAL)
def test_both_stages_train_the_text_decoder_and_pass_the_rest_through(
    name: str, saved: Callable[[str], Path], here: Path, config: Callable[..., TrainConfig]
) -> None:
    source = saved(name)
    out = train(config(model=str(source), out="out", eval_data="test.txt"), Reporter()).out
    tokens = tiny_tokens(2, seed=5) % 250 + 1
    with open_checkpoint(out) as checkpoint, CheckpointReader(source) as before:
        assert len(checkpoint.layer_names) == 14 and LINEAR in checkpoint.layer_names
        others = [tensor for tensor in before.tensors if not tensor.startswith("language_model.model.layers.")]
        assert len(others) > 40 and all(torch.equal(checkpoint.get(each), before.get(each)) for each in others)
        kept = set(checkpoint.reader.quantization_config["modules_to_not_convert"])
        assert "vision_tower.encoder.layers.2.self_attn.q_proj" in kept and LINEAR not in kept
        assert checkpoint.reader.config["model_type"] == name
        assert not [finding for finding in verify_checkpoint(checkpoint) if finding.severity != "note"]
        with torch.no_grad():
            packed = load_packed_model(checkpoint).model(input_ids=tokens).logits
    convert(out, here / "dense", "dense")  # transformers' whole model, filled with the dequantized weights
    expected = whole_models_logits(here / "dense", tokens)
    assert float((packed - expected).abs().max()) < 0.02 * float(expected.std())  # the export is in float16
    for format_id in available_formats():
        form = get_format(format_id)
        target = here / f"export-{format_id}{form.suffix}"
        if format_id in ("native", "dense"):
            continue
        try:
            convert(out, target, format_id)
        except EqatError as error:
            assert format_id in ("gguf", "onnx", "awq") and (name in str(error) or format_id == "awq")
            continue
        with open_checkpoint(target) as ours, open_checkpoint(out) as truth:
            found = [*verify_checkpoint(ours), *compare_checkpoints(ours, truth).findings]
            assert not [finding for finding in found if finding.severity != "note"], format_id
            assert {"vision_tower.encoder.layers.2.self_attn.q_proj"} < set(ours.ignore)


def test_newer_files_with_the_head_beside_the_decoder_are_read_too(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil  # noqa: PLC0415

    old, new = saved("llava"), tmp_path / "new"
    shutil.copytree(old, new)
    tensors = {
        name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): each
        for name, each in load_file(old / "model.safetensors").items()
    }
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    tokens = tiny_tokens(2) % 250 + 1
    with torch.no_grad():
        one, other = (load_dense_model(folder)(input_ids=tokens).logits for folder in (old, new))
    assert torch.equal(one, other)
    assert "model.language_model.layers.0.mlp.up_proj" in dict(build_skeleton(new, torch.float32).named_modules())
    strange = {name.replace("language_model", "decoder"): each for name, each in tensors.items()}
    save_file(strange, new / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no tensor language_model\.model\.layers\.0\."):
        build_skeleton(new, torch.float32)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_native_checkpoints_load_in_transformers_whole(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    settings = BlockApSettings(QuantScheme(2, 32), epochs=0, device="cpu")
    run_block_ap(saved(name), none, none, settings, tmp_path / "out", work_dir=tmp_path / "work", reporter=Reporter())
    model, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens = tiny_tokens(2) % 250 + 1
    with torch.no_grad():
        expected = load_dense_model(tmp_path / "out")(input_ids=tokens).logits
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=0, atol=1e-5)
