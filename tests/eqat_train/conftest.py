"""A tiny model, texts for it, and a cheap run over them."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny_model

from eqat_train.config import TrainConfig, build_config

WORDS = "the cat sat on a mat and then it ran far away from home".split()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with one token a byte, named ``tiny``."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with ``train.txt`` and ``test.txt``."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    draw = random.Random(0)
    for name, count in (("train.txt", 60), ("test.txt", 6)):
        documents = (" ".join(draw.choices(WORDS, k=50)) for _ in range(count))
        (folder / name).write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return folder


@pytest.fixture
def cheap_run(tiny_folder: Path) -> dict[str, Any]:
    """Settings of a run that takes a second or two: both stages on a few short windows."""
    return {
        "model": str(tiny_folder),
        "data": "train.txt",
        "group": 32,
        "samples": 8,
        "seq_len": 32,
        "val_samples": 2,
        "epochs": 1,
        "lr_weight": 1e-3,
        "e2e_samples": 8,
        "e2e_seq_len": 32,
        "e2e_batch": 4,
        "lr_e2e": 1e-3,
        "sample_tokens": 4,
    }


@pytest.fixture
def config(cheap_run: dict[str, Any]) -> Callable[..., TrainConfig]:
    """Builds the cheap run's settings with some of them changed; None takes one out."""
    return lambda **changed: build_config(cheap_run | changed)
