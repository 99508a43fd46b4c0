"""Importing one module as soon as another one has been imported, and not before.

transformers keeps its quantizers in a registry that others extend by calling it, which takes importing transformers:
seconds that ``import eqat_train`` must not cost. So the call is left with Python's own import system. A finder at the
head of ``sys.meta_path`` knows a single name; when that module is looked for, it lets the usual finders find it and has
its loader followed by the import that was asked for, after which the finder leaves. Nothing of the awaited module is
replaced.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["import_after"]


def import_after(awaited: str, follower: str) -> None:
    """Imports ``follower`` now if ``awaited`` has been imported, otherwise right after it is.

    Args:
        awaited: full name of a module that need not be installed.
        follower: full name of the module to import then.
    """
    if awaited in sys.modules:
        importlib.import_module(follower)
    else:
        sys.meta_path.insert(0, _Finder(awaited, follower))


class _Finder(MetaPathFinder):
    def __init__(self, awaited: str, follower: str) -> None:
        self.awaited, self.follower = awaited, follower
        self._asking_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking_others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """A module's own loader, and the import that follows."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # from here on the module says that its own loader loaded it, as readers of its source files expect
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        sys.meta_path.remove(self.finder)  # only now: an import that failed may be tried again
        importlib.import_module(self.finder.follower)
