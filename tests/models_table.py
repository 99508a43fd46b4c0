"""The tables of ``docs/models.md``: families of models trained, exported and verified, each on a tiny random one.

``python -m tests.models_table`` prints them; with ``--write PAGE`` they replace what stands below the page's mark.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from eqat_export.compare import compare_checkpoints
from eqat_export.convert import convert
from eqat_export.verify import verify_checkpoint
from eqat_train.block_ap import BlockApSettings, check_block_ap, run_block_ap
from eqat_train.data import TokenWindows
from eqat_train.e2e_qp import E2eSettings, run_e2e_qp
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme, available_formats, get_format
from formats.errors import EqatError
from formats.model import open_checkpoint
from tests.tiny_models import ARCHITECTURES, MIXTURES, MULTIMODAL, SHAPE, save_tiny_model, tiny_tokens

__all__ = ["FAMILIES", "FORMATS", "REFUSED", "family_row", "page_rows", "refused_row"]

Make = Callable[[], PreTrainedConfig]

_HEADS = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
_OLD: dict[str, Any] = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0}
_GPT: dict[str, Any] = {**_OLD, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}

FAMILIES: dict[str, Make] = {
    **ARCHITECTURES,
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_HEADS, tie_word_embeddings=False),
    "gptj": lambda: transformers.GPTJConfig(**_GPT, rotary_dim=8),
    "opt": lambda: transformers.OPTConfig(
        **_OLD,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=64,
        pad_token_id=1,
    ),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE),
    "cohere": lambda: transformers.CohereConfig(**SHAPE),
    "granite": lambda: transformers.GraniteConfig(**SHAPE),
    "glm4": lambda: transformers.Glm4Config(**SHAPE, head_dim=16),
    "exaone4": lambda: transformers.Exaone4Config(**SHAPE, sliding_window=8),
    **MIXTURES,
    **MULTIMODAL,
}
REFUSED: dict[str, Make] = {
    "gpt2": lambda: transformers.GPT2Config(**_GPT),
    "bloom": lambda: transformers.BloomConfig(**_OLD, hidden_size=64, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(
        **_OLD,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
# awq holds 4 bits alone, and what gptq holds there
FORMATS = tuple(name for name in available_formats() if name not in ("native", "awq"))
_SCHEME = QuantScheme(2, 32)
_MARK = "<!-- made -->\n"


def family_row(name: str, folder: Path) -> str:
    """Trains a tiny model of the family by both stages, exports the result to every format and verifies each file."""
    model = save_tiny_model(folder / "model", FAMILIES[name])
    settings = BlockApSettings(_SCHEME, lr_weight=1e-3, lr_scale=1e-3, lr_zero=1e-2, device="cpu", min_expert_tokens=1)
    tokens, val = tiny_tokens(16), tiny_tokens(4, seed=1)
    report = run_block_ap(
        model, tokens, val, settings, folder / "block-ap", work_dir=folder / "work", reporter=Reporter()
    )
    ends = [(block.start_val_loss, block.val_losses[-1]) for block in report.blocks]
    blocks = all(start is not None and end is not None and end < start for start, end in ends)
    trained = run_e2e_qp(
        folder / "block-ap",
        TokenWindows(tokens, tokens),
        E2eSettings(batch_size=len(tokens), epochs=4, lr=1e-3, device="cpu"),
        folder / "native",
        work_dir=folder / "work",
        reporter=Reporter(),
    )
    scales = trained.losses[-1] < trained.losses[0]
    with open_checkpoint(folder / "native") as source:
        layers, kind = len(source.layer_names), source.reader.config["architectures"][0]
    cells = [_export(folder, format_id) for format_id in FORMATS]
    return f"| {kind} | {layers} | {_word(blocks)} | {_word(scales)} | {' | '.join(cells)} |"


def _export(folder: Path, format_id: str) -> str:
    out = folder / f"out{get_format(format_id).suffix}.{format_id}" if format_id != "gguf" else folder / "out.gguf"
    try:
        convert(folder / "native", out, format_id)
    except EqatError:
        return "-"
    with open_checkpoint(out) as ours, open_checkpoint(folder / "native") as truth:
        findings = [*verify_checkpoint(ours), *compare_checkpoints(ours, truth).findings]
        return _word(not [finding for finding in findings if finding.severity != "note"])


def _word(fine: bool) -> str:
    return "yes" if fine else "**no**"


def refused_row(name: str, folder: Path) -> str:
    """What ``eqat train`` says to a family that it does not train."""
    model = save_tiny_model(folder / "model", REFUSED[name])
    try:
        check_block_ap(model, BlockApSettings(_SCHEME, device="cpu"))
        run_block_ap(
            model,
            tiny_tokens(2),
            tiny_tokens(0),
            BlockApSettings(_SCHEME, device="cpu"),
            folder / "out",
            work_dir=folder / "work",
            reporter=Reporter(),
        )
    except EqatError as error:
        return f"| {name} | {error} |"
    raise AssertionError(f"{name} is trained: it belongs to the other table")


def page_rows() -> Iterator[str]:
    """Both tables, line by line."""
    yield "| model | layers | Block-AP | E2E-QP | " + " | ".join(FORMATS) + " |"
    yield "|---" * (len(FORMATS) + 4) + "|"
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            yield family_row(name, Path(folder))
    yield ""
    yield "| not trained | what it says |"
    yield "|---|---|"
    for name in REFUSED:
        with tempfile.TemporaryDirectory() as folder:
            yield refused_row(name, Path(folder))


if __name__ == "__main__":
    lines = "\n".join(page_rows()) + "\n"
    if sys.argv[1:2] == ["--write"]:
        page = Path(sys.argv[2])
        head, mark, _ = page.read_text(encoding="utf-8").partition(_MARK)
        page.write_text(f"{head}{mark}\n{lines}", encoding="utf-8")
    else:
        print(lines, end="")
