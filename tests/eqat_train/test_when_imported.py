"""An import that follows another one, and what ``import eqat_train`` costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from eqat_train.inference.when_imported import import_after

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules: ``follower`` notes what it finds ``awaited`` to be."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_x").mkdir()
    (tmp_path / "package_x" / "__init__.py").write_text("")
    (tmp_path / "package_x" / "awaited.py").write_text("value = 1\n")
    (tmp_path / "follower_x.py").write_text("from package_x.awaited import value\n")
    before = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = before
    for name in ("package_x", "package_x.awaited", "follower_x"):
        sys.modules.pop(name, None)


def test_the_follower_comes_right_after_the_awaited_module(modules: Path) -> None:
    finders = list(sys.meta_path)
    import_after("package_x.awaited", "follower_x")
    assert "package_x" not in sys.modules and "follower_x" not in sys.modules
    import package_x.awaited  # noqa: PLC0415

    assert sys.modules["follower_x"].value == 1
    assert sys.meta_path == finders
    assert type(package_x.awaited.__loader__).__name__ == "SourceFileLoader"
    assert package_x.awaited.__spec__.loader is package_x.awaited.__loader__


def test_the_follower_comes_at_once_where_the_module_is_there(modules: Path) -> None:
    import package_x.awaited  # noqa: F401, PLC0415

    import_after("package_x.awaited", "follower_x")
    assert "follower_x" in sys.modules


def test_an_import_that_failed_may_be_tried_again(modules: Path) -> None:
    source = modules / "package_x" / "awaited.py"
    source.write_text("raise RuntimeError('not yet')\n")
    import_after("package_x.awaited", "follower_x")
    with pytest.raises(RuntimeError):
        import package_x.awaited  # noqa: PLC0415
    source.write_text("value = 'now it works'\n")
    import package_x.awaited  # noqa: F401, PLC0415

    assert sys.modules["follower_x"].value == "now it works"


def test_a_module_that_does_not_exist_stays_missing(modules: Path) -> None:
    import_after("package_x.nowhere", "follower_x")
    with pytest.raises(ModuleNotFoundError):
        __import__("package_x.nowhere")
    assert "follower_x" not in sys.modules


@pytest.mark.parametrize(
    "code",
    [
        "import sys, eqat_train; assert not {'torch', 'transformers', 'formats'} & set(sys.modules)",
        "import eqat_train, transformers.quantizers.auto as auto; assert 'eqat' in auto.AUTO_QUANTIZER_MAPPING",
        "import transformers.quantizers.auto as auto, eqat_train; assert 'eqat' in auto.AUTO_QUANTIZER_MAPPING",
        "import eqat_train, transformers.quantizers.auto as auto; assert auto.AUTO_QUANTIZER_MAPPING['gptq'].__module__"
        ".startswith('transformers.')",
    ],
    ids=["light", "before transformers", "after transformers", "others untouched"],
)
def test_importing_the_package(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
