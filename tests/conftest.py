"""What every test runs under: few threads, no network, caches in a temporary folder."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two threads in all, those of commands that tests start included: one in each of the suite's two processes.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2")
os.environ["EQAT_CACHE"] = tempfile.mkdtemp(prefix="eqat-test-cache-")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run interpreted on a CPU; Triton looks when it is first imported

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def shared_root() -> Path:
    """Folder of reference models and golden files outside the repository: EQAT_SHARED, by default ``../shared``."""
    folder = Path(os.environ.get("EQAT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("needs the shared reference files: set EQAT_SHARED to their folder")
    return folder


@pytest.fixture(scope="session")
def golden_root(shared_root: Path) -> Path:
    """Checkpoints written by upstream's own code, with its dequantized weights, token ids and logits."""
    return shared_root / "golden" / "upstream"


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where Triton kernels are tested: the GPU, or the CPU under Triton's interpreter."""
    pytest.importorskip("triton", reason="needs triton, which has wheels for Linux alone")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
