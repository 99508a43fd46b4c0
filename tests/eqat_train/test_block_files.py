"""Finished blocks on disk."""

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eqat_train.block_ap.block_files import BlockFiles
from formats.errors import CheckpointError


@pytest.fixture
def no_file_over_a_megabyte() -> Iterator[None]:
    """Writing beyond it fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("no_file_over_a_megabyte")
def test_a_block_that_does_not_fit_on_the_disk_is_one_line_and_leaves_no_file(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path / "blocks", {})
    with pytest.raises(CheckpointError, match=r"cannot write .*000\.safetensors: .*; free space there"):
        files.save(0, {"weight": torch.zeros(10**6)}, {})
    assert [file.name for file in (tmp_path / "blocks").iterdir()] == ["started_with.json"]
    assert BlockFiles(tmp_path / "blocks", {}).reports == []
