"""Register the PEER classes with transformers as soon as transformers is there, without importing it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODELING = "peerify.modeling.modeling_peer"


class _Watch(MetaPathFinder):
    """Imports modeling_peer right after transformers, and registers right after modeling_peer."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ("transformers", MODELING):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            if fullname == MODELING:
                module.register()
            elif MODELING not in sys.modules:  # else it is just being imported, and comes here when done
                _import_modeling()

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def _import_modeling() -> None:
    try:
        importlib.import_module(MODELING)
    except ImportError as error:  # an old transformers must stay importable
        warnings.warn(f"peerify: converted models need trust_remote_code here ({error})", stacklevel=2)


def install() -> None:
    """Watch for transformers; register now if it is already imported."""
    sys.meta_path.insert(0, _Watch())
    if "transformers" in sys.modules:
        _import_modeling()
