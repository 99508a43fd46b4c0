"""What a user gets from ``pip install .``: the packages, their data files and the command."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LARGEST_WHEEL = 12 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "formats", "eqat_train", "eqat_export"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True)
    (built,) = folder.glob("eqat-*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_exactly_the_three_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info" not in name}
    assert tops == {"formats", "eqat_train", "eqat_export"}


def test_wheel_holds_every_module_and_data_file_of_the_tree(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for package in ("formats", "eqat_train", "eqat_export")
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".yaml", ".json", ".safetensors", ".xz"} or path.parent == ROOT / "formats"
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected <= set(wheel.namelist())


def test_wheel_declares_the_command_and_stays_small(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "eqat = eqat_export.cli:main" in wheel.read(entry_points).decode()
    assert sum(info.compress_size for info in wheel.infolist()) < LARGEST_WHEEL
