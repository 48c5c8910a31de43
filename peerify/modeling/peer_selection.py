# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Which experts a token keeps."""

from __future__ import annotations

import numpy as np
import torch

FAR_BELOW = 1e5  # in logarithms of sizes; differences of .01 are still seen there


def best(score: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` largest along the last dimension, in no order.

    Many equal values make it several times as slow on a CPU.
    """
    if score.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        place = score.shape[-1] - k
        index = np.argpartition(score.detach().numpy(), place, axis=-1)  # several times as fast as topk
        return torch.from_numpy(index[..., place:].copy())
    return score.topk(k, dim=-1, sorted=False).indices
