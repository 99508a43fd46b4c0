"""E2E-QP on tiny models: what it learns, what it leaves alone, and how it fails."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eqat_train.data import TokenWindows
from eqat_train.e2e_qp.next_token import mean_loss
from eqat_train.e2e_qp.run import E2eReport, E2eSettings, run_e2e_qp
from eqat_train.end_to_end.schedule import learning_rate_factor
from eqat_train.models.loading import load_dense_model
from eqat_train.reporting.progress import Reporter
from formats import QuantScheme, dequantize
from formats.checkpoint import CheckpointReader
from formats.errors import InputError, OutputExistsError, TrainingDivergedError
from formats.model import open_checkpoint
from tests.tiny_checkpoints import act_order_layer, quantize_folder, raw_tensors, rewrite
from tests.tiny_models import ARCHITECTURES, VOCABULARY, save_tiny_model, tiny_tokens

CPU = torch.device("cpu")
TEXT = b"the quick brown fox jumps over the lazy dog and runs away from it, "
FAST = E2eSettings(epochs=1, batch_size=8, lr=2e-3, device="cpu")


def text_windows(count: int, first: int = 0, seq_len: int = 24) -> TokenWindows:
    """Windows of one repeated sentence from different places in it."""
    ids = torch.tensor([[1 + TEXT[(first + 5 * i + t) % len(TEXT)] for t in range(seq_len)] for i in range(count)])
    return TokenWindows.from_ids(ids)


def run(start: Path, out: Path, data: TokenWindows, settings: E2eSettings = FAST, **more: Any) -> E2eReport:
    work = more.pop("work_dir", out.with_name(f"{out.name}.work"))
    return run_e2e_qp(start, data, settings, out, work_dir=work, reporter=more.pop("reporter", Reporter()), **more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="module")
def full_precision(root: Path) -> Path:
    return save_tiny_model(root / "fp", "qwen2", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def start(root: Path, full_precision: Path) -> Path:
    return quantize_folder(full_precision, root / "w2g32", QuantScheme(2, 32))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_loss_falls_on_the_training_text_and_on_the_rest_of_it(start: Path, tmp_path: Path) -> None:
    data, val = text_windows(64), text_windows(13, first=2)
    report = run(start, tmp_path / "out", data, replace(FAST, epochs=4), val=val)
    assert report.steps == len(report.losses) == len(report.grad_norms) == 32
    assert report.val_loss_before is not None and report.val_loss_after is not None
    assert sum(report.losses[-4:]) / 4 < report.losses[0] - 0.5
    assert report.val_loss_after < report.val_loss_before - 0.5
    assert report.tokens == 4 * 64 * 24 and report.lr == 2e-3
    assert report.seconds > 0 and report.peak_memory > 2**20
    # the written checkpoint, dequantized, has exactly the loss that the trained model had
    for folder, loss in ((start, report.val_loss_before), (tmp_path / "out", report.val_loss_after)):
        assert mean_loss(load_dense_model(folder), val, FAST.batch_size, CPU).item() == loss


def test_only_scales_change(start: Path, tmp_path: Path) -> None:
    report = run(start, tmp_path / "out", text_windows(16))
    before, after = raw_tensors(start), raw_tensors(tmp_path / "out")
    assert set(before) == set(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.endswith(".scales")}
    assert all(before[name][:2] == after[name][:2] for name in before)  # dtypes and shapes
    assert after["model.embed_tokens.weight"][0] == torch.bfloat16
    assert report.scales == sum(math.prod(after[name][1]) for name in changed)
    with CheckpointReader(start) as source, CheckpointReader(tmp_path / "out") as out:
        kept = {key: value for key, value in source.config.items() if key != "quantization_config"}
        assert kept == {key: value for key, value in out.config.items() if key != "quantization_config"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_gptq_v2_start_gives_the_bytes_of_a_native_start(
    full_precision: Path, tmp_path: Path, bits: int, act_order: bool
) -> None:
    change = act_order_layer if act_order else None
    native = quantize_folder(full_precision, tmp_path / "native", QuantScheme(bits, 64), change=change)
    gptq = rewrite(native, tmp_path / "gptq", "gptq_v2")
    from_native = run(native, tmp_path / "a", text_windows(8))
    from_gptq = run(gptq, tmp_path / "b", text_windows(8))
    assert from_native.losses == from_gptq.losses
    ours, theirs = raw_tensors(tmp_path / "a"), raw_tensors(tmp_path / "b")
    biases = {name for name in ours if name.endswith(".bias")}  # GPTQ stores them in float16
    assert {name: ours[name] for name in ours if name not in biases} == {
        name: theirs[name] for name in theirs if name not in biases
    }


def test_a_gptq_v1_start_trains_to_the_same_weights(full_precision: Path, tmp_path: Path) -> None:
    native = quantize_folder(full_precision, tmp_path / "native", QuantScheme(2, 32))
    gptq = rewrite(native, tmp_path / "gptq", "gptq")
    from_native = run(native, tmp_path / "a", text_windows(8))
    from_gptq = run(gptq, tmp_path / "b", text_windows(8))
    assert from_native.losses == from_gptq.losses
    with open_checkpoint(tmp_path / "a") as a, open_checkpoint(tmp_path / "b") as b:
        assert a.layer_names == b.layer_names
        for name in a.layer_names:
            assert torch.equal(dequantize(a.layer(name)), dequantize(b.layer(name)))


@pytest.mark.parametrize("name", ["w2g64", "w3g128"])
def test_an_upstream_checkpoint_is_a_start(golden_root: Path, tmp_path: Path, name: str) -> None:
    data = text_windows(16, seq_len=32)
    report = run(golden_root / name, tmp_path / "out", data, replace(FAST, lr=1e-3), val=data)
    assert report.val_loss_before is not None and report.val_loss_after is not None
    assert report.val_loss_after < report.val_loss_before
    before, after = raw_tensors(golden_root / name), raw_tensors(tmp_path / "out")
    assert {key for key in before if before[key] != after[key]} == {key for key in before if key.endswith(".scales")}
    with open_checkpoint(tmp_path / "out") as out:
        assert out.format is not None and out.format.id == "native" and str(out.scheme) == name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains(tmp_path: Path, architecture: str) -> None:
    fp = save_tiny_model(tmp_path / "fp", architecture)
    start = quantize_folder(fp, tmp_path / "q", QuantScheme(3, 32))
    report = run(start, tmp_path / "out", text_windows(16), replace(FAST, gradient_checkpointing=True))
    assert report.losses[-1] < report.losses[0]


def test_the_same_seed_gives_the_same_bytes(start: Path, tmp_path: Path) -> None:
    data = text_windows(24)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(start, tmp_path / name, data, replace(FAST, seed=seed))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_loss_is_taken_on_answers_only(start: Path, tmp_path: Path) -> None:
    ids = text_windows(8).input_ids
    labels = ids.clone()
    labels[:, :16] = -100
    answers = TokenWindows(ids, labels)
    report = run(start, tmp_path / "out", answers)
    assert report.losses[0] == pytest.approx(mean_loss(load_dense_model(start), answers, 8, CPU).item(), rel=1e-6)
    other = ids.clone()
    other[:, -1] = 7  # the last token is only ever a label
    masked = labels.clone()
    masked[:, -1] = -100
    first = run(start, tmp_path / "x", TokenWindows(ids, masked))
    second = run(start, tmp_path / "y", TokenWindows(other, masked))
    assert first.losses == second.losses


def test_bfloat16_compute_trains_and_leaves_the_rest_alone(start: Path, tmp_path: Path) -> None:
    settings = replace(FAST, compute_dtype=torch.bfloat16, epochs=3)
    report = run(start, tmp_path / "out", text_windows(16), settings)
    assert report.losses[-1] < report.losses[0]
    before, after = raw_tensors(start), raw_tensors(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {n for n in before if n.endswith(".scales")}


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_scales_are_stored_in_the_asked_dtype(start: Path, tmp_path: Path, scale_dtype: torch.dtype) -> None:
    val = text_windows(5, first=3)
    report = run(start, tmp_path / "out", text_windows(8), replace(FAST, scale_dtype=scale_dtype), val=val)
    assert {kind for name, (kind, _, _) in raw_tensors(tmp_path / "out").items() if name.endswith(".scales")} == {
        scale_dtype
    }
    assert mean_loss(load_dense_model(tmp_path / "out"), val, 5, CPU).item() == report.val_loss_after


def test_gradients_are_clipped_by_their_global_norm(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[float] = []
    step = torch.optim.AdamW.step

    def record(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        applied.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    report = run(start, tmp_path / "out", text_windows(32))
    assert len(applied) == 4 and max(report.grad_norms) > 0.3
    assert applied == pytest.approx([min(norm, 0.3) for norm in report.grad_norms], rel=1e-4)


def test_a_diverging_run_names_step_and_rate_and_writes_nothing(start: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    with pytest.raises(TrainingDivergedError, match=r"step 2 of 4, lr .* starting checkpoint is unchanged"):
        run(start, tmp_path / "out", text_windows(32), replace(FAST, lr=1e30))
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in start.iterdir()} == before


def test_a_scale_lost_in_the_last_step_is_noticed(start: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="a scale is not finite"):
        run(start, tmp_path / "out", text_windows(8), replace(FAST, lr=1e30))
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_anything_is_read(start: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        run(start, tmp_path / "out", text_windows(8))


def test_an_interrupted_run_leaves_the_old_output(start: Path, tmp_path: Path) -> None:
    run(start, tmp_path / "out", text_windows(8))
    before = raw_tensors(tmp_path / "out")

    class Interrupt(Reporter):
        def event(self, kind: str, **fields: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(start, tmp_path / "out", text_windows(8), force=True, reporter=Interrupt(), work_dir=tmp_path / "work")
    assert raw_tensors(tmp_path / "out") == before


def test_windows_without_a_target_are_refused(start: Path, tmp_path: Path) -> None:
    ids = text_windows(4).input_ids
    labels = ids.clone()
    labels[2, 1:] = -100  # the first position is never predicted
    with pytest.raises(InputError, match=r"1 of 4 training windows have no token to learn from \(first: window 2\)"):
        run(start, tmp_path / "out", TokenWindows(ids, labels))
    nothing = TokenWindows(ids, torch.full_like(ids, -100))
    with pytest.raises(InputError, match="4 validation windows have no token"):
        run(start, tmp_path / "out", text_windows(4), val=nothing)


def test_tokens_of_another_tokenizer_are_refused(start: Path, tmp_path: Path) -> None:
    ids = tiny_tokens(2)
    ids[1, 3] = VOCABULARY
    with pytest.raises(InputError, match=r"span \d+..257; the model knows 0..256"):
        run(start, tmp_path / "out", TokenWindows.from_ids(ids))


def test_reporter_hears_every_step(start: Path, tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []

    class Listener(Reporter):
        def event(self, kind: str, **fields: Any) -> None:
            events.append((kind, fields))

    report = run(start, tmp_path / "out", text_windows(20), val=text_windows(3), reporter=Listener())
    assert [kind for kind, _ in events] == ["e2e_validation", *["e2e_step"] * 3, "e2e_validation"]
    steps = [fields for kind, fields in events if kind == "e2e_step"]
    assert [fields["loss"] for fields in steps] == list(report.losses)
    assert [fields["step"] for fields in steps] == [1, 2, 3]


def test_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    factors = [learning_rate_factor(step, 100, 0.03) for step in range(100)]
    assert factors[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert factors[3 + 97 // 2] == pytest.approx(0.5, abs=0.01)
    assert 0 < factors[-1] < 0.001
    assert learning_rate_factor(0, 1, 0.03) == 1 and learning_rate_factor(0, 5, 0) == 1
    assert [learning_rate_factor(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1]


def test_default_rate_is_the_papers_for_the_width_of_the_codes() -> None:
    settings = E2eSettings()
    assert [settings.resolved_lr(bits) for bits in (2, 3, 4)] == [2e-5, 1e-5, 1e-5]
    assert replace(settings, lr=3e-4).resolved_lr(2) == 3e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("micro_batch_size", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("warmup_ratio", 1.5),
        ("max_grad_norm", 0.0),
        ("weight_decay", -1.0),
        ("scale_dtype", torch.float64),
        ("compute_dtype", torch.float16),
    ],
)
def test_settings_name_what_is_wrong(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field} is .*allowed are"):
        E2eSettings(**{field: value})  # type: ignore[arg-type]
