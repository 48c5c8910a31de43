"""Gradients through the selection of experts, and statistics of the selection.

With unit gates an expert is kept or not, and the loss has no gradient with respect to the scores that decide. The dense
path computes every expert, so the change of the loss by keeping one is known. The score gets this as its gradient, as
if the step from 0 to 1 were a sigmoid around the threshold: a straight-through estimate (Bengio et al., 1308.3432).
With softmax and sigmoid gates the scores are weights of the experts and have gradients anyway.

Suffixes: t tokens, s tokens that teach the router, d d_model, n experts, h heads, c cells of one head's grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerify.modeling.peer_selection import cell_scores, kept
from peerify.modules import peer_layers

AT_ONCE = 256  # tokens


class _Weighted(torch.autograd.Function):
    """Activations times weights of 0 and 1, with a gradient to the scores.

    Backward, a routed expert's weight is sigmoid((score - level) / width). Scores are given for the tokens `taught`
    only; their gradient is scaled up to stand for all. The sigmoid is evaluated in the backward pass, so a forward pass
    costs no more than without a gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        a_tn: Tensor,
        weight_tn: Tensor,
        score_sn: Tensor,
        level: Tensor,
        width: Tensor,
        taught: slice,
    ) -> Tensor:
        ctx.save_for_backward(a_tn, weight_tn, score_sn, level, width)
        ctx.taught = taught
        return a_tn * weight_tn

    @staticmethod
    def backward(ctx: Any, slope_tn: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a_tn, weight_tn, score_sn, level, width = ctx.saved_tensors
        step_sn = (score_sn - level).div_(width).sigmoid_()
        step_sn.addcmul_(step_sn, step_sn, value=-1)  # the sigmoid's slope; in place, since memory is what this costs
        gain_sn = (slope_tn[ctx.taught] * a_tn[ctx.taught])[:, -score_sn.shape[1] :]  # shared experts come first
        step_sn.mul_(gain_sn).div_(width / ctx.taught.step)
        return slope_tn * weight_tn, None, step_sn, None, None, None


def _kept(layer: Any, x_td: Tensor, score_thn: Tensor | None) -> tuple[Tensor, ...]:
    """`kept`, with scores made here unless given; on a CPU for few tokens at once, which fit its cache."""
    parts = []
    size = AT_ONCE if x_td.device.type == "cpu" else max(1, len(x_td))
    for start in range(0, max(1, len(x_td)), size):
        part = slice(start, start + size)
        score = cell_scores(layer.keys, *layer.keys.sub_scores(x_td[part])) if score_thn is None else score_thn[part]
        parts.append(kept(layer, score))
    return tuple(torch.cat(masks) for masks in zip(*parts, strict=True))


def _weighted(
    a_tn: Tensor,
    weight_tn: Tensor,
    score_shn: Tensor,
    level: Tensor,
    temperature: float,
    taught: slice,
) -> Tensor:
    """Activations times weights, with a gradient to the scores of the tokens `taught`."""
    # Where several heads search one pool, the one with the largest margin decides.
    one_head = score_shn.shape[1] == 1
    margin_sn = score_shn[:, 0] if one_head else (score_shn - level).amax(1)
    level = level[:, 0] if one_head else torch.zeros_like(level[:, 0])
    given_shn = score_shn.detach()
    centred_shn = given_shn - given_shn.mean(-1, keepdim=True)  # by hand: `std` takes ten times as long
    deviation_sh = centred_shn.norm(dim=-1) / max(1, centred_shn.shape[-1] - 1) ** 0.5
    width_s1 = temperature * deviation_sh.mean(1, keepdim=True).clamp_min(1e-12)
    return _Weighted.apply(a_tn, weight_tn, margin_sn, level, width_s1, taught)  # type: ignore[no-any-return]


class StraightThrough:
    """The selection of experts in every PEER layer of a model, while it trains.

    Use as a context. Inside, layers with unit gates pass gradients to their scores. While `recording`, the selection of
    the last forward pass with gradients is kept for the router's losses, the balance of its biases and the statistics.
    """

    def __init__(
        self, model: nn.Module, *, temperature: float | None, every: int = 1, with_losses: bool = True
    ) -> None:
        """Find the layers.

        Args:
            temperature: width of the sigmoid, in standard deviations of a token's scores; None: no gradient.
            every: one token in so many gives its gradient to the router, in `losses`, too.
            with_losses: keep what the gradient of `losses` needs while `recording`.
        """
        self.layers = {path: layer for path, layer in peer_layers(model).items() if hasattr(layer, "keys")}
        self._elastic = {path: layer for path, layer in peer_layers(model).items() if path not in self.layers}
        self._used: dict[str, tuple[Tensor, float, float]] = {}
        self.temperature = temperature
        self.every = every
        self.with_losses = with_losses
        self.recording = False
        self._seen: dict[str, _Seen] = {}

    def __enter__(self) -> StraightThrough:
        for path, layer in self._elastic.items():

            def used(mask_tn: Tensor, read: float, done: float, path: str = path) -> None:
                if self.recording:
                    self._used[path] = mask_tn.sum(0), read, done

            layer.watch(used)
        for path, layer in self.layers.items():
            layer.forward = self._forward_of(path, layer)
        return self

    def __exit__(self, *_: Any) -> None:
        for layer in self._elastic.values():
            layer.watch(None)
        for layer in self.layers.values():
            del layer.forward  # the method of the class shows again

    def _forward_of(self, path: str, layer: Any) -> Any:
        original = layer.forward

        def forward(hidden_states: Tensor) -> Tensor:
            if not torch.is_grad_enabled() or not layer.needs_routing:
                return original(hidden_states)  # type: ignore[no-any-return]
            x_td = hidden_states.reshape(-1, layer.d_model)
            if layer.gates == "unit":
                return self._soft_forward(path, layer, x_td).view(hidden_states.shape)
            if self.recording:
                with torch.set_grad_enabled(self.with_losses):
                    found = layer.retrieve(x_td)
                    self._record(
                        path, layer, layer.keys.sub_scores(x_td), found.index_tk - layer.num_shared, found.weight_tk
                    )
            return original(hidden_states)  # type: ignore[no-any-return]

        return forward

    def _soft_forward(self, path: str, layer: Any, x_td: Tensor) -> Tensor:
        """What the layer computes for x_td, with a gradient to the scores that chose the experts."""
        pool, shared, temperature = layer.pool, layer.num_shared, self.temperature
        a_tn = pool.products(x_td)[2]
        # Running statistics of a query norm are of all tokens, and taken once.
        every = 1 if temperature is None or layer.keys.query_norm is not None else self.every
        scores = score_thn = None
        if self.recording or layer.keys.query_norm is not None or (every == 1 and temperature is not None):
            wanted = temperature is not None or (self.recording and self.with_losses)
            with torch.set_grad_enabled(every == 1 and wanted):
                scores = layer.keys.sub_scores(x_td)
                score_thn = cell_scores(layer.keys, *scores)
        with torch.no_grad():
            level, kept_tn = _kept(layer, x_td, score_thn)
            if scores is not None and self.recording:
                self._record(path, layer, scores, None, kept_tn)
            weight_tn = kept_tn.to(a_tn.dtype)
            if shared:
                weight_tn = torch.cat([weight_tn.new_ones(len(x_td), shared), weight_tn], dim=1)
        if temperature is None:
            a_tn = a_tn * weight_tn
        else:
            taught = slice(every // 2, None, every)
            score_shn = score_thn
            if score_shn is None or every > 1:
                score_shn = cell_scores(layer.keys, *layer.keys.sub_scores(x_td[taught]))
            a_tn = _weighted(a_tn, weight_tn, score_shn, level[taught], temperature, taught)
        return layer.rest(x_td, a_tn @ pool.v)  # type: ignore[no-any-return]

    def _record(
        self, path: str, layer: Any, scores: tuple[Tensor, Tensor], index_tk: Tensor | None, weight: Tensor
    ) -> None:
        row_tha, column_thb = scores
        cells = layer.keys.num_keys
        with torch.no_grad():
            if index_tk is None:
                count_n = (weight > 0).sum(0).float()
                gate = weight.new_ones(())
            else:
                used_tk = weight > 0
                count_n = torch.zeros(cells, device=weight.device).index_add(
                    0, index_tk.clamp(0, cells - 1).flatten(), used_tk.float().flatten()
                )
                gate = weight.sum() / used_tk.sum().clamp_min(1)
        self._seen[path] = _Seen(row_tha, column_thb, count_n, gate)

    def losses(self) -> tuple[Tensor, Tensor]:
        """(load balance, z loss) of the last forward pass, means over layers and tokens.

        Both over sub-keys: the softmax over the cells of a grid is that over its rows times that over its columns.
        Load balance is 1 when every sub-key is as probable and as much retrieved as every other.
        """
        balance, z = [], []
        for path, seen in self._seen.items():
            for score, share in zip((seen.row_tha, seen.column_thb), self._shares(path), strict=True):
                p_ha = score.softmax(-1).mean(0)
                balance.append((share * p_ha).sum(-1).mean() * score.shape[-1])
            lse_th = seen.row_tha.logsumexp(-1) + seen.column_thb.logsumexp(-1)
            z.append(lse_th.pow(2).mean())
        return torch.stack(balance).mean(), torch.stack(z).mean()

    def _shares(self, path: str) -> tuple[Tensor, Tensor]:
        """Share of a head's retrievals that fall on each row, and on each column: (h, a) and (h, b)."""
        keys, count_n = self.layers[path].keys, self._seen[path].count_n
        rows, columns = keys.grid
        heads = 1 if keys.share_pool else keys.num_heads
        count_hab = F.pad(count_n, (0, heads * rows * columns - len(count_n))).view(heads, rows, columns)
        total = count_hab.sum((1, 2)).clamp_min(1)[:, None]
        return count_hab.sum(2) / total, count_hab.sum(1) / total

    @torch.no_grad()
    def load_steps(self) -> dict[str, Tensor]:
        """Path -> direction, -1 to 1, in which each sub-key's bias should move to even out retrieval: (h, m).

        Auxiliary-loss-free balancing, 2408.15664, eq. 3, on rows and columns, in spreads of the scores.
        """
        steps = {}
        for path, seen in self._seen.items():
            keys = self.layers[path].keys
            parts = []
            for score, share in zip((seen.row_tha, seen.column_thb), self._shares(path), strict=True):
                parts.append((1 / score.shape[-1] - share).sign() * score.std())
            step_hm = torch.cat(parts, dim=-1)
            steps[path] = step_hm if len(step_hm) == len(keys.sub_keys) else step_hm.expand(len(keys.sub_keys), -1)
        return steps

    @torch.no_grad()
    def statistics(self) -> dict[str, dict[str, float]]:
        """Path -> {"used": share of experts retrieved, "kl_uniform": their unevenness, "gate": mean gate value of
        those retrieved, "score_mean", "score_std"}, of the last recorded forward pass; of layers with budgets {"used",
        "kl_uniform", "bytes", "macs"}, the last two as shares of the dense layer's."""
        result: dict[str, dict[str, float]] = {}
        for path, (count_n, read, done) in self._used.items():
            result[path] = {**_evenness(count_n), "bytes": read, "macs": done}
        for path, seen in self._seen.items():
            cell = seen.row_tha.float().mean() + seen.column_thb.float().mean()
            variance = seen.row_tha.float().var() + seen.column_thb.float().var()
            result[path] = {
                **_evenness(seen.count_n),
                "gate": seen.gate.item(),
                "score_mean": cell.item(),
                "score_std": variance.sqrt().item(),
            }
        return result

    def forget(self) -> None:
        """Drop what is on record, and with it the graph it holds."""
        self._seen.clear()
        self._used.clear()


def _evenness(count_n: Tensor) -> dict[str, float]:
    """Share of experts that were used, and how unevenly."""
    share_n = count_n.double() / count_n.sum().clamp_min(1)
    return {
        "used": (count_n > 0).double().mean().item(),
        "kl_uniform": max(0.0, math.log(len(share_n)) - torch.special.entr(share_n).sum().item()),
    }


@dataclass(frozen=True, eq=False)
class _Seen:
    """One layer's retrieval of one batch."""

    row_tha: Tensor
    column_thb: Tensor
    count_n: Tensor
    gate: Tensor
