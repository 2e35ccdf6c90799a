"""Registers the checkpoint format with transformers at the moment transformers can take it.

Without this transformers only warns about the unknown format and fills the pruned weights with random numbers. If
its quantizer registry is loaded already the format is registered at once, else right after the registry loads.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
HOOK = "secateur.checkpoint.hook"


class _RegisteringLoader(Loader):
    """Runs the registry's own loader, then imports our hook."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(HOOK)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _RegistryFinder(MetaPathFinder):
    """Finds the registry module once, by asking the other finders, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def install() -> None:
    """Register the format now, or as soon as transformers is imported; doing it twice changes nothing."""
    if REGISTRY in sys.modules:
        importlib.import_module(HOOK)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
