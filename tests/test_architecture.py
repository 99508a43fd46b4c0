"""Who may import whom: eqat_train -> formats <- eqat_export, and only the root command sees both."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("formats", "eqat_train", "eqat_export")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ROOT_COMMAND = "eqat_export.cli"
CLI_MODULES = ("eqat_train.cli", ROOT_COMMAND)
ENTRY_POINTS = (ROOT_COMMAND, "eqat_export.__main__", "eqat_train.__main__")
FORMATS_MAY_IMPORT = {"formats", "torch", "numpy", "safetensors"}
FORMATS_MAY_IMPORT_WHEN_ASKED = {"onnx", "google"}  # inside functions: what some containers are read and written with
HEAVY = {"torch", "numpy", "safetensors", "transformers", "accelerate", "datasets", "formats", "gptqmodel"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, nodes: Iterator[ast.AST] | None = None) -> set[str]:
    """Absolute names of everything a file imports, inside functions too; ``from a import b`` counts as ``a.b``."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in nodes or ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def at_module_level(path: Path) -> Iterator[ast.AST]:
    """Statements that run on import: everything outside functions and ``if TYPE_CHECKING``."""
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        pending.extend(ast.iter_child_nodes(node))


def top(name: str) -> str:
    return name.partition(".")[0]


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_the_packages_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_arrows(path: Path) -> None:
    module, imported = module_name(path), imports_of(path)
    rooms = {top(name) for name in imported} & set(PACKAGES)
    if top(module) == "formats":
        foreign = {top(name) for name in imported} - set(sys.stdlib_module_names) - FORMATS_MAY_IMPORT
        assert foreign <= FORMATS_MAY_IMPORT_WHEN_ASKED
        assert not foreign & {top(name) for name in imports_of(path, at_module_level(path))}
    elif module == "eqat_train.__main__":  # torchrun starts modules, and this one is the root command
        assert imported == {"sys", f"{ROOT_COMMAND}.main"}
    elif top(module) == "eqat_train":
        assert "eqat_export" not in rooms
    elif module == ROOT_COMMAND:
        mounted = {name for name in imported if top(name) == "eqat_train"}
        assert all(within(name, "eqat_train.cli") for name in mounted)
    else:
        assert "eqat_train" not in rooms


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_the_root_command_imports_a_cli_module(path: Path) -> None:
    if module_name(path) not in ENTRY_POINTS:
        assert not {name for name in imports_of(path) if any(within(name, cli) for cli in CLI_MODULES)}


@pytest.mark.parametrize("module", CLI_MODULES)
def test_cli_modules_load_nothing_heavy(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not path.exists():
        pytest.skip(f"{module} is not in this tree")
    assert not {top(name) for name in imports_of(path, at_module_level(path))} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not {top(name) for name in imports_of(path)} & {"pickle", "marshal", "shelve", "dill", "joblib"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
