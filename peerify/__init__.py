"""Turn dense transformers checkpoints into PEER checkpoints.

Importing this package is cheap: torch and transformers come in with the first name that needs them. Once both
peerify and transformers are imported, in either order, transformers knows the converted models' classes, so
they load without trust_remote_code.
"""

from __future__ import annotations

import importlib
from typing import Any

from peerify import _registration

__version__ = "0.1.0"

_EXPORTS = {
    "PEER": "peerify.modeling.peer_layer",
    "CalibrationConfig": "peerify.config.recipe",
    "GrowConfig": "peerify.config.grow",
    "PeerConfig": "peerify.config.peer",
    "PeerifyError": "peerify.errors",
    "Recipe": "peerify.config.recipe",
    "convert": "peerify.conversion.model",
    "densify": "peerify.conversion.densify",
    "evaluate": "peerify.evaluation",
    "grow": "peerify.conversion.growth",
    "load_dense": "peerify.checkpoint.load",
    "load_for_eval": "peerify.checkpoint.load",
    "perplexity": "peerify.evaluation",
    "plan_conversion": "peerify.conversion.model",
    "push": "peerify.publishing.push",
    "save": "peerify.conversion.checkpoint",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'peerify' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


_registration.install()
