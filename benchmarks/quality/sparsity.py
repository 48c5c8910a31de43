"""What needs no experts: fewer inputs, or fewer bits, of a dense feed-forward layer.

- TEAL, arXiv 2408.14690: inputs of each projection below a threshold count as 0; thresholds are quantiles on
  calibration text, here the same share for all projections (TEAL's own greedy search over projections is left out).
- WINA, arXiv 2505.19427: the same, with inputs weighed by the norms of what they are multiplied with.
- few-bits: the whole layer rounded to the most bits that the share pays for, as peerify rounds its copies: what a
  quantised model costs and loses, without choosing anything for a token.
"""

from __future__ import annotations

import dataclasses

import torch
from baselines import CHUNK, Fit, Fitted
from torch import Tensor, nn
from torch.nn import functional as F

from peerify.conversion.feedforward import FeedForward
from peerify.modeling.peer_copies import EXPONENT, in_few_bits

GROUP = 64
SAMPLE = 2048  # tokens that thresholds are taken from


class Thresholded(nn.Module):
    """A dense layer that reads, for each token, the columns of its large inputs only."""

    def __init__(self, ff: FeedForward, weight_d: Tensor, weight_f: Tensor, level_x: float, level_a: float) -> None:
        super().__init__()
        self.ff, self.weight_d, self.weight_f, self.level_x, self.level_a = ff, weight_d, weight_f, level_x, level_a
        self.read, self.tokens = 0.0, 0

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)."""
        x_td = x.flatten(0, -2)
        keep_td = x_td.abs() * self.weight_d >= self.level_x
        a_tf = self.ff.hidden(x_td * keep_td)
        keep_tf = a_tf.abs() * self.weight_f >= self.level_a
        vectors = 2 if self.ff.gate_fd is None else 3
        self.read += float(keep_td.float().mean(1).sum() * (vectors - 1) + keep_tf.float().mean(1).sum()) / vectors
        self.tokens += len(x_td)
        return F.linear(a_tf * keep_tf, self.ff.v_fd.T, self.ff.bias_d).view(x.shape)

    def costs(self) -> tuple[float, float]:
        """Bytes and multiply-adds spent so far, over the dense layer's."""
        return (self.read / max(1, self.tokens),) * 2

    def forget(self) -> None:
        """Count anew."""
        self.read, self.tokens = 0.0, 0


def fit_teal(ff: FeedForward, x_td: Tensor, seed: int, *, weighted: bool = False) -> Fitted:
    """TEAL, or WINA where `weighted`."""
    x_td = x_td[:: max(1, len(x_td) // SAMPLE)][:SAMPLE]
    weight_d, weight_f = x_td.new_ones(x_td.shape[1]), x_td.new_ones(len(ff.u_fd))
    if weighted:
        tables = [ff.u_fd] if ff.gate_fd is None else [ff.u_fd, ff.gate_fd]
        weight_d, weight_f = torch.cat(tables).norm(dim=0), ff.v_fd.norm(dim=1)

    def level(value: Tensor, share: float) -> float:
        flat = value.flatten()[:: max(1, value.numel() // 10**6)]
        return float("-inf") if share >= 1 else float(flat.sort().values[int((1 - share) * len(flat))])

    def at(share: float) -> nn.Module:
        level_x = level(x_td.abs() * weight_d, share)
        hidden = [ff.hidden(x * (x.abs() * weight_d >= level_x)) for x in x_td.split(CHUNK)]
        return Thresholded(ff, weight_d, weight_f, level_x, level(torch.cat(hidden).abs() * weight_f, share))

    return at  # type: ignore[return-value]


def fit_wina(ff: FeedForward, x_td: Tensor, seed: int) -> Fitted:
    """See `fit_teal`."""
    return fit_teal(ff, x_td, seed, weighted=True)


class Rounded(nn.Module):
    """A dense layer in few bits."""

    def __init__(self, ff: FeedForward, share: float) -> None:
        super().__init__()
        self.ff, self.share = ff, share

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)."""
        return self.ff(x)

    def costs(self) -> tuple[float, float]:
        """Bytes and multiply-adds, over the dense layer's."""
        return self.share, 1.0

    def forget(self) -> None:
        """Nothing is counted."""


def fit_few_bits(ff: FeedForward, x_td: Tensor, seed: int) -> Fitted:
    """Round to nearest, inputs weighed as peerify weighs them."""
    rms_d = x_td.square().mean(0).sqrt()
    scale_d = (rms_d / rms_d.mean()).clamp_min(1e-4) ** EXPONENT
    step = 2 / GROUP  # bytes of a group's step for each of its numbers

    def at(share: float) -> nn.Module:
        if share >= 1:
            return Rounded(ff, 1.0)
        bits = max((b for b in range(2, 9) if b / 8 + step <= 2 * share), default=2)
        rounded = dataclasses.replace(
            ff,
            u_fd=in_few_bits(ff.u_fd, bits, GROUP, scale_d),
            gate_fd=None if ff.gate_fd is None else in_few_bits(ff.gate_fd, bits, GROUP, scale_d),
            v_fd=in_few_bits(ff.v_fd, bits, GROUP),
        )
        return Rounded(rounded, (bits / 8 + step) / 2)

    return at  # type: ignore[return-value]


SPARSITY: dict[str, tuple[Fit, bool]] = {
    "teal": (fit_teal, False),
    "wina": (fit_wina, False),
    "few-bits": (fit_few_bits, False),
}
"""As `baselines.BASELINES`."""
