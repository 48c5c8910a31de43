"""Products in bfloat16 where a machine is several times as fast at them as in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from peerify.modeling.peer_products import has_bfloat16

SMALLEST = 2**18  # elements: products of less take no time to speak of, and may as well be exact


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which products with `x` are fastest, bfloat16 or that of `x`."""
    half = x.dtype == torch.float32 and x.numel() >= SMALLEST and has_fast_bfloat16(x.device)
    return torch.bfloat16 if half else x.dtype


def fast_products(x: Tensor) -> torch.autocast:
    """Context in which products with `x` run in `product_dtype`.

    For what is measured over many tokens, where an error of half a percent in each product does not matter. Sums over
    tokens and systems of equations belong outside.
    """
    return torch.autocast(x.device.type, torch.bfloat16, enabled=product_dtype(x) != x.dtype)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16; a CPU without them takes 40 times as long."""
    if device.type == "cpu":
        return has_bfloat16()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
