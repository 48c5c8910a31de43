"""Refit the experts' output vectors to what the router really retrieves.

Retrieval leaves neurons out, and those that are left in can make up for part of it. With the weighted activations a(x)
of the converted layer fixed, the output vectors that minimise |a(x) V - target(x)|^2 have a closed form in second
moments. The target is the dense layer's output, moved by what brings the stream of hidden states back to the dense
model's, so that each layer also corrects the errors of those before it.

Suffixes: t tokens, d d_model, n experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peerify.conversion.precision import fast_products, product_dtype
from peerify.modeling.peer_layer import PEER

CHUNK_ELEMENTS = 4_000_000  # of the (tokens, n) activations computed at a time
KEPT_ELEMENTS = 250_000_000  # of them kept (1 GB) rather than computed again
LARGEST_GRAM = 16_384  # experts; beyond it the n x n moments (1 GB) and their factorisation cost more than they bring
# Towards the output vectors as they are, in units of an expert's own activation energy: the best on held-out tokens.
SHRINKAGES = (0.3, 1.0, 3.0, 10.0)
HELD_OUT, RUN = 4, 512  # one in so many runs of so many tokens: from all of the text, and not from amid what is fitted


def fit_outputs(layer: PEER, x_td: Tensor, target_td: Tensor, *, refit: bool) -> Tensor:
    """Refit the layer's output vectors, in place, so that its output for `x_td` comes near `target_td`.

    Layers of more than LARGEST_GRAM experts keep their output vectors, as do all without `refit`.

    Returns:
        The layer's output (t, d).
    """
    chunks = x_td.split(max(1, CHUNK_ELEMENTS // layer.num_experts))
    kept = [_activations(layer, x) for x in chunks] if len(x_td) * layer.num_experts <= KEPT_ELEMENTS else None

    def all_activations() -> Iterator[Tensor]:
        yield from kept if kept is not None else (_activations(layer, x) for x in chunks)

    def experts_td() -> Tensor:
        with fast_products(x_td):
            return torch.cat([(a_tn @ layer.pool.v).to(x_td.dtype) for a_tn in all_activations()])

    bias = 0.0 if layer.bias is None else layer.bias
    if refit and layer.num_experts <= LARGEST_GRAM:
        v_nd, wanted_td = layer.pool.v.data, target_td - bias
        if layer.gates != "unit":
            # Such gates shrink every expert: first the one factor that undoes it best, then each vector by itself.
            y_td, tiny = experts_td(), torch.finfo(x_td.dtype).tiny
            v_nd.mul_(float((y_td * wanted_td).sum()) / max(float(y_td.square().sum()), tiny))
        v_nd.add_(_ridge(all_activations(), v_nd, wanted_td))
    return experts_td() + bias


def _activations(layer: PEER, x_td: Tensor) -> Tensor:
    with fast_products(x_td):
        a_tn = layer.activations(x_td)
    return a_tn.to(product_dtype(x_td))


def _ridge(activations: Iterator[Tensor], v_nd: Tensor, wanted_td: Tensor) -> Tensor:
    """What to add to the output vectors, by ridge regression of what the output misses on the activations.

    How strongly to shrink is decided on held-out tokens.
    """
    run = min(RUN, max(1, len(wanted_td) // HELD_OUT))
    held_out_t = torch.arange(len(wanted_td), device=wanted_td.device) // run % HELD_OUT == HELD_OUT - 1
    gram_snn, moment_snd = v_nd.new_zeros(2, len(v_nd), len(v_nd)), v_nd.new_zeros(2, *v_nd.shape)
    start = 0
    for a_tn in activations:
        wanted, held_out = (whole[start : start + len(a_tn)] for whole in (wanted_td, held_out_t))
        with fast_products(wanted_td):
            missing = wanted - a_tn @ v_nd
            for part, chosen in enumerate((~held_out, held_out)):
                a = a_tn[chosen]
                gram_snn[part] += a.T @ a
                moment_snd[part] += a.T @ missing[chosen]
        start += len(a_tn)

    def change(gram_nn: Tensor, moment_nd: Tensor, shrinkage: float) -> Tensor:
        energy_n = gram_nn.diagonal()
        penalty_n = shrinkage * energy_n + 1e-3 * energy_n.mean() + torch.finfo(gram_nn.dtype).tiny
        factor_nn = torch.linalg.cholesky(gram_nn.diagonal_scatter(energy_n + penalty_n))
        return torch.cholesky_solve(moment_nd, factor_nn)

    def loss_held_out(shrinkage: float) -> float:
        change_nd = change(gram_snn[0], moment_snd[0], shrinkage)
        return float((change_nd * (gram_snn[1] @ change_nd - 2 * moment_snd[1])).sum())

    return change(gram_snn.sum(0), moment_snd.sum(0), min(SHRINKAGES, key=loss_held_out))


def relative_error(y_td: Tensor, wanted_td: Tensor) -> float:
    """|y - wanted|^2 / |wanted|^2."""
    total = float(wanted_td.pow(2).sum())
    return float((y_td - wanted_td).pow(2).sum()) / max(total, torch.finfo(wanted_td.dtype).tiny)
