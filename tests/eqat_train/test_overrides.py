"""Settings of single layers: patterns, what they refuse, and that training and checkpoints keep to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model, tiny_tokens

from eqat_train.block_ap import BlockApReport, BlockApSettings, check_block_ap, run_block_ap
from eqat_train.cli import app
from eqat_train.config import TrainConfig, build_config, resolve_config, save_config
from eqat_train.models.loading import load_dense_model
from eqat_train.overrides import choose_schemes, describe_overrides
from eqat_train.pipeline.train import train
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme
from formats.checkpoint import CheckpointReader
from formats.errors import EqatError, InputError, UnsupportedSchemeError
from formats.model import open_checkpoint

BASE = QuantScheme(2, 32)
NAMES = [f"model.layers.{i}.{name}" for i in (0, 1, 10) for name in ("self_attn.q_proj", "mlp.down_proj")]


def chosen(**overrides: str) -> dict[str, QuantScheme | None]:
    return choose_schemes(NAMES, BASE, overrides, outside={"score": "is outside the decoder blocks"})


def test_the_last_pattern_that_matches_a_layer_holds() -> None:
    found = chosen(**{"*.down_proj": "w4g128", "model.layers.1.*": "skip", "*.1.mlp.*": "w3", "*.10.*.q_proj": "g-1"})
    assert found == {
        "model.layers.0.self_attn.q_proj": BASE,
        "model.layers.0.mlp.down_proj": QuantScheme(4, 128),
        "model.layers.1.self_attn.q_proj": None,
        "model.layers.1.mlp.down_proj": QuantScheme(3, 32),
        "model.layers.10.self_attn.q_proj": QuantScheme(2, -1),
        "model.layers.10.mlp.down_proj": QuantScheme(4, 128),
    }


def test_what_differs_is_told_in_one_line() -> None:
    assert describe_overrides(chosen(**{"*.down_proj": "w4g128", "*.0.*": "skip"}), BASE) == (
        "of 6 layers, 2 in full precision, 2 w4g128, the others w2g32"
    )
    assert describe_overrides(chosen(), BASE) == ""


def test_a_pattern_without_a_match_is_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'down_proj' matches no layer; the nearest are \*\.down_proj, "):
        chosen(down_proj="w4")
    with pytest.raises(InputError, match=r"nearest are model\.layers\.1\.self_attn\.q_proj, "):
        chosen(**{"model.layers.1.self_atn.q_proj": "w4"})
    with pytest.raises(InputError, match="score is outside the decoder blocks"):
        chosen(score="w8")
    with pytest.raises(InputError, match="skip every one of 6 layers"):
        chosen(**{"*": "skip"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("*.down_proj", "expected PATTERN=VALUE"),
        ("=w4", "expected PATTERN=VALUE"),
        ("*=", "is ''; allowed are skip"),
        ("*=w5", "is 'w5'; allowed are skip, or bits"),
        ("*=4bit", "is '4bit'"),
        ("*=w4g0", "is 'w4g0'"),
        ("*=g-2", "is 'g-2'"),
        ("*=Skip", "is 'Skip'"),
    ],
)
def test_what_cannot_be_meant_is_refused_on_the_command_line(text: str, says: str) -> None:
    with pytest.raises(InputError) as refused:
        build_config({"model": "m", "overrides": [text]})
    assert "--override" in str(refused.value) and says in str(refused.value)


@pytest.mark.parametrize("text", ["overrides: skip", "overrides: [a]", "overrides: {1: skip}", "overrides: {a: 4}"])
def test_what_cannot_be_meant_is_refused_in_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"settings\.yaml: overrides"):
        build_config({"model": "m"}, tmp_path / "settings.yaml")


def test_the_command_lines_come_after_the_files(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("overrides:\n  '*.q_proj': w4\n  '*.k_proj': skip\n", encoding="utf-8")
    config = build_config({"model": "m", "overrides": ["*.v_proj=w3", "*.q_proj=skip"]}, file)
    assert list((config.overrides or {}).items()) == [("*.k_proj", "skip"), ("*.v_proj", "w3"), ("*.q_proj", "skip")]
    assert build_config({"model": "m", "overrides": None}, file).overrides == {"*.q_proj": "w4", "*.k_proj": "skip"}


def test_saved_overrides_read_back_in_their_order(tmp_path: Path) -> None:
    config = build_config({"model": "m", "overrides": ["z*=w4", "a*=skip"]})
    save_config(config, tmp_path / "saved.yaml")
    again = build_config({}, tmp_path / "saved.yaml")
    assert again == config and list(again.overrides or {}) == ["z*", "a*"]


def test_a_checkpoint_keeps_its_schemes() -> None:
    config = build_config({"model": "m", "stage": "e2e-qp", "overrides": ["*=w4"]})
    with pytest.raises(InputError, match="E2E-QP keeps every layer's scheme"):
        resolve_config(config, context=None, scheme=BASE)


def test_the_option_is_in_the_help_and_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner  # noqa: PLC0415

    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, ["train", "--help"]).stdout
    assert "--override " in shown and "PATTERN=VALUE" in shown
    model = save_tiny_model(tmp_path / "model")
    words = ["train", str(model), "--group", "32", "--override", "*.q_proj=w4", "--override", "*.nothing=skip"]
    failed = CliRunner().invoke(app, words)
    assert isinstance(failed.exception, InputError) and "'*.nothing' matches no layer" in str(failed.exception)


def run(model: Path, root: Path, overrides: dict[str, str], **options: Any) -> BlockApReport:
    settings = BlockApSettings(
        BASE, overrides, **{"lr_weight": 1e-3, "lr_scale": 1e-3, "lr_zero": 1e-2, "device": "cpu", **options}
    )
    return run_block_ap(
        model,
        tiny_tokens(8),
        tiny_tokens(2, seed=1),
        settings,
        root / "out",
        work_dir=root / "work",
        reporter=Reporter(),
    )


def test_block_ap_trains_every_layer_at_its_own_scheme(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "qwen2", dtype=torch.bfloat16)
    skipped = [f"model.layers.{i}.self_attn.{name}_proj" for i, name in ((0, "q"), (1, "q"), (1, "o"))]
    overrides = {"*.down_proj": "w4g64", "*.q_proj": "skip", "*.1.self_attn.o_proj": "skip", "*.v_proj": "w3g-1"}
    report = run(model, tmp_path, overrides)
    assert all(block.train_losses[1] < block.train_losses[0] for block in report.blocks)
    with open_checkpoint(tmp_path / "out") as checkpoint, CheckpointReader(model) as before:
        schemes = {name: checkpoint.layer(name).scheme for name in checkpoint.layer_names}
        kept = checkpoint.reader.quantization_config["modules_to_not_convert"]
        assert set(kept) == {"lm_head", *skipped} and set(checkpoint.ignore) == {"lm_head", *skipped}
        assert len(schemes) == 14 - len(skipped) and not set(skipped) & set(schemes)
        for name, scheme in schemes.items():
            kind = name.rpartition(".")[2]
            assert scheme == {"down_proj": QuantScheme(4, 64), "v_proj": QuantScheme(3, -1)}.get(kind, BASE)
        assert checkpoint.overrides == {name: scheme for name, scheme in schemes.items() if scheme != BASE}
        for name in (f"{module}.{local}" for module in skipped for local in ("weight", "bias")):
            if name in before.tensors:  # o_proj has no bias
                assert torch.equal(checkpoint.get(name), before.get(name))
        norm = "model.layers.1.input_layernorm.weight"
        assert not torch.equal(checkpoint.get(norm), before.get(norm))


def test_a_block_without_quantized_layers_stays_as_it_is_and_later_ones_are_trained_on_it(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    report = run(model, tmp_path, {"model.layers.0.*": "skip"})
    assert report.blocks[0].train_losses == () and len(report.blocks[1].train_losses) == 2
    tokens = tiny_tokens(2, seed=1)
    with open_checkpoint(tmp_path / "out") as checkpoint, CheckpointReader(model) as before:
        inside = [name for name in before.tensors if name.startswith("model.layers.0.")]
        assert len(inside) == 9 and all(torch.equal(checkpoint.get(name), before.get(name)) for name in inside)
        assert {name.split(".")[2] for name in checkpoint.layer_names} == {"1"}
    # the second block's own loss, measured from the two checkpoints
    hidden = [
        load_dense_model(folder)(input_ids=tokens, output_hidden_states=True).hidden_states
        for folder in (model, tmp_path / "out")
    ]
    assert torch.equal(hidden[0][1], hidden[1][1]) and not torch.equal(hidden[0][2], hidden[1][2])


def test_round_to_nearest_keeps_to_them_too(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    run(model, tmp_path, {"*.layers.0.*": "skip", "*.up_proj": "w8"}, epochs=0)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.overrides == {f"model.layers.{i}.mlp.up_proj": QuantScheme(8, 32) for i in (0, 1)}
        assert len(checkpoint.layer_names) == 8


@pytest.mark.parametrize(
    ("overrides", "options", "error", "says"),
    [
        ({"*.down_proj": "g96"}, {}, UnsupportedSchemeError, "group_size 96 does not divide in_features 128"),
        ({"*.dwn_proj": "w4"}, {}, InputError, r"nearest are \*\.down_proj"),
        ({"*.down_proj": "w4"}, {"zero_range": (1, 9)}, InputError, "at 2 bits both lie in 0..3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
    overrides: dict[str, str], options: dict[str, Any], error: type[EqatError], says: str, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    with pytest.raises(error, match=says):
        check_block_ap(model, BlockApSettings(BASE, overrides, device="cpu", **options))


def test_zero_points_are_held_to_the_range_of_the_narrowest_layer() -> None:
    with pytest.raises(InputError, match=r"at 2 bits both lie in 0\.\.3"):
        BlockApSettings(QuantScheme(4, 32), {"*.q_proj": "w2"}, zero_range=(1, 9))
    BlockApSettings(QuantScheme(4, 32), {"*.q_proj": "skip"}, zero_range=(1, 9))


def test_both_stages_keep_to_them_and_the_saved_settings_repeat_them(
    here: Path, config: Callable[..., TrainConfig]
) -> None:
    settings = config(overrides=["*.down_proj=w4g64", "*.o_proj=skip"], out="first")
    train(settings, Reporter())
    train(build_config({"out": "second"}, Path("first/eqat_config.yaml")), Reporter())
    with open_checkpoint(Path("first")) as one, open_checkpoint(Path("second")) as two:
        assert one.overrides == {f"model.layers.{i}.mlp.down_proj": QuantScheme(4, 64) for i in (0, 1)}
        assert len(one.layer_names) == 12 and one.config == two.config
        for name in one.layer_names:
            assert torch.equal(one.layer(name).codes, two.layer(name).codes)
            assert torch.equal(one.layer(name).scales, two.layer(name).scales)
        for name in (f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)):
            with CheckpointReader(Path(str(settings.model))) as before:
                assert torch.equal(one.get(name), before.get(name))
