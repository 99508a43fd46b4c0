"""Importing formats is light, and every module says what it offers."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import formats

MODULES = [f"formats.{module.name}" for module in pkgutil.iter_modules(formats.__path__)]


def test_import_brings_no_heavy_library() -> None:
    script = f"import sys, {', '.join(MODULES)}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    loaded = set(output.split())
    assert {"torch", "formats"} <= loaded
    heavy = {"triton", "transformers", "accelerate", "datasets", "gptqmodel", "optimum", "onnx", "gguf", "mlx"}
    assert not loaded & {*heavy, "eqat_train"}


@pytest.mark.parametrize("name", ["formats", *MODULES])
def test_all_names_exist_and_are_sorted(name) -> None:
    module = importlib.import_module(name)
    assert all(hasattr(module, public) for public in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


def test_version_is_the_projects(pytestconfig) -> None:
    text = (pytestconfig.rootpath / "pyproject.toml").read_text()
    assert f'version = "{importlib.import_module("formats.version").__version__}"' in text
