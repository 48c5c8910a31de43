"""The losses of continued training: next token, KL to the dense teacher, and hidden states matched to the teacher's.

Suffixes: b windows, t tokens of a window, p predictions (the tokens of all windows that have a next one), v vocabulary,
k of it kept, d d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peerify.config.train import ObjectiveConfig

ROWS = 128  # rows of the vocabulary softmax in float32 at a time; bounds memory, changes no result
IGNORED = -100  # label of a token that is not predicted: padding


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The teacher's largest log-probabilities: what a store of teacher outputs can afford to keep."""

    logp_pk: Tensor
    index_pk: Tensor


def top_logits(logits_pv: Tensor, k: int) -> TopLogits:
    """The `k` largest log-probabilities of each row."""
    parts = [rows.float().log_softmax(-1).topk(min(k, logits_pv.shape[-1]), dim=-1) for rows in logits_pv.split(ROWS)]
    return TopLogits(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def prediction_loss(
    logits_pv: Tensor,
    target_p: Tensor,
    teacher: Tensor | TopLogits | None,
    *,
    next_token: float,
    kl: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`next_token` * cross entropy + `kl` * KL(teacher || student), summed over predictions.

    The gradient with respect to the logits is written down while the loss is computed, a few rows at a time, so that
    the softmax is never held in float32 for all of them.

    Args:
        logits_pv: the student's logits.
        target_p: the token that really follows; IGNORED leaves a row out of both losses.
        teacher: its logits (p, v), the largest of them, or None where `kl` is 0. Of the vocabulary outside the
            teacher's top logits, the total probability is compared.

    Returns:
        (loss, cross entropy, KL), scalars in float32; only the first carries a gradient. Each is a sum over rows.
    """
    loss, cross_entropy, divergence = _PredictionLoss.apply(logits_pv, target_p, teacher, next_token, kl)
    return loss, cross_entropy, divergence


def combined(
    terms: ObjectiveConfig,
    ours: Any,
    teacher: Any | None,
    router: tuple[Tensor, Tensor] | None,
    ids: Tensor,
    used: Tensor,
    *,
    predicted: int,
    tokens: int,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of a micro-batch as a part of its step's.

    Args:
        terms: weights of the objectives.
        ours, teacher: outputs of the two models, with hidden states where `terms` asks for them.
        router: load balance and z loss of the micro-batch, where `terms` asks for them.
        ids, used: the windows, and which of their tokens are no padding, (b, t).
        predicted, tokens: how many tokens the whole step predicts, and has.

    Returns:
        The loss, and its parts: next token, KL, layerwise, load balance, z.
    """
    loss = cross_entropy = kl = layerwise = balance = z = torch.zeros((), device=ids.device)
    if terms.next_token or terms.kl:
        logits, targets = shifted(ours.logits, ids, used)
        wanted: Tensor | TopLogits | None = None
        if terms.kl and teacher is not None:
            wanted, _ = shifted(teacher.logits, ids, used)
            if terms.kl_topk is not None:
                wanted = top_logits(wanted, terms.kl_topk)
        loss, cross_entropy, kl = prediction_loss(logits, targets, wanted, next_token=terms.next_token, kl=terms.kl)
        loss, cross_entropy, kl = (value / predicted for value in (loss, cross_entropy, kl))
    if terms.layerwise and teacher is not None:
        layerwise = layerwise_loss(list(ours.hidden_states[1:]), list(teacher.hidden_states[1:]), used) / tokens
        loss = loss + terms.layerwise * layerwise
    if router is not None:
        share = int(used.sum()) / tokens
        balance, z = (value * share for value in router)
        loss = loss + terms.load_balance * balance + terms.z_loss * z
    return loss, [cross_entropy, kl, layerwise, balance, z]


class _PredictionLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits_pv: Tensor,
        target_p: Tensor,
        teacher: Tensor | TopLogits | None,
        ce_weight: float,
        kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_pv = torch.empty_like(logits_pv)
        cross_entropy, divergence = (torch.zeros((), dtype=torch.float64, device=logits_pv.device) for _ in range(2))
        for start in range(0, len(target_p), ROWS):
            rows = slice(start, start + ROWS)
            used_p1 = (target_p[rows] != IGNORED)[:, None].float()
            target_p1 = target_p[rows].clamp_min(0)[:, None]
            logp_pv = logits_pv[rows].float().log_softmax(-1)
            cross_entropy -= (logp_pv.gather(1, target_p1) * used_p1).sum(dtype=torch.float64)
            p_pv = logp_pv.exp()
            slope_pv = p_pv * (ce_weight + kl_weight)
            slope_pv.scatter_add_(1, target_p1, torch.full_like(target_p1, -ce_weight, dtype=slope_pv.dtype))
            if isinstance(teacher, TopLogits):
                divergence += _top_kl(p_pv, logp_pv, teacher, rows, used_p1, slope_pv, kl_weight)
            elif teacher is not None:
                wanted_pv = teacher[rows].float().log_softmax(-1)
                q_pv = wanted_pv.exp()
                divergence += ((q_pv * (wanted_pv - logp_pv)).sum(-1, keepdim=True) * used_p1).sum(dtype=torch.float64)
                slope_pv.sub_(q_pv, alpha=kl_weight)
            grad_pv[rows] = slope_pv.mul_(used_p1)
        ctx.save_for_backward(grad_pv)
        loss = ce_weight * cross_entropy + kl_weight * divergence
        results = loss.float(), cross_entropy.float(), divergence.float()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (grad_pv,) = ctx.saved_tensors
        return grad_pv * slope.to(grad_pv.dtype), None, None, None, None


def _top_kl(
    p_pv: Tensor, logp_pv: Tensor, teacher: TopLogits, rows: slice, used_p1: Tensor, slope_pv: Tensor, weight: float
) -> Tensor:
    """KL where the tokens outside the teacher's top are one; moves `slope_pv` from the weighted p to the gradient."""
    index_pk, wanted_pk = teacher.index_pk[rows], teacher.logp_pk[rows].float()
    q_pk = wanted_pk.exp()
    tiny = torch.finfo(torch.float32).tiny
    rest_q_p1 = (1 - q_pk.sum(-1, keepdim=True)).clamp_min(0)
    rest_p_p1 = (1 - p_pv.gather(1, index_pk).sum(-1, keepdim=True)).clamp_min(1e-6)
    rest_kl_p1 = torch.special.xlogy(rest_q_p1, rest_q_p1.clamp_min(tiny) / rest_p_p1)
    kl_p1 = (q_pk * (wanted_pk - logp_pv.gather(1, index_pk))).sum(-1, keepdim=True) + rest_kl_p1
    # d KL / d logit: p - q for a token of the top, p (1 - rest of q / rest of p) for one outside.
    ratio_p1 = rest_q_p1 / rest_p_p1
    inside_pk = weight * (ratio_p1 * p_pv.gather(1, index_pk) - q_pk)
    slope_pv.sub_(weight * ratio_p1 * p_pv).scatter_add_(1, index_pk, inside_pk)
    return (kl_p1 * used_p1).sum(dtype=torch.float64)


def layerwise_loss(hidden: list[Tensor], wanted: list[Tensor], used_bt: Tensor) -> Tensor:
    """Distance of hidden states (b, t, d) from the teacher's, |h - w|^2 / |w|^2 for each token, mean over layers.

    Relative for each token, since the few tokens with massive activations would otherwise be all that counts.
    Returns a sum over tokens, like the other losses.
    """
    total = hidden[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(hidden, wanted, strict=True):
        error_bt = (ours.float() - theirs.float()).pow(2).sum(-1)
        size_bt = theirs.float().pow(2).sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        total = total + (error_bt / size_bt * used_bt).sum()
    return total / len(hidden)


def shifted(logits_btv: Tensor, ids_bt: Tensor, used_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (p, v) of the tokens that have a next one, and that next one, IGNORED where it is padding."""
    target_bt = ids_bt[:, 1:].masked_fill(~used_bt[:, 1:], IGNORED)
    return logits_btv[:, :-1].flatten(0, 1), target_bt.flatten()
