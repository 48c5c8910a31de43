"""What peerify runs on."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from peerify import __version__
from peerify.modeling import peer_cpu, peer_triton

PACKAGES = ("torch", "transformers", "accelerate", "peft", "numba", "triton", "numpy")


def environment() -> dict[str, Any]:
    """``{"peerify", "python", "platform", "packages", "threads", "devices", "kernels"}``.

    packages maps names to versions, or to None where one is not installed; kernels maps each fast path to None where it
    is there, else to the reason why not.
    """
    return {
        "peerify": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "kernels": {"cpu, few tokens": peer_cpu.obstacle(), "gpu, few tokens": peer_triton.obstacle()},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
