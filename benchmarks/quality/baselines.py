"""What others do, or could do at best, with a dense feed-forward layer: evaluate only some of its neurons.

A method looks at a layer once (`fit`) and then says, for a share of the neurons, which of them a token gets. The dense
weights stay as they are; what is not chosen is masked. Compute is counted in neurons evaluated, and beside it the
multiply-adds of whatever chooses them, as for converted models.

Written from the papers:

- MoEfication, arXiv 2110.01786, section 3: experts are balanced k-means clusters of the neurons' input vectors; they
  are selected by similarity to the cluster's centre, or by a network that predicts how active each expert is. That
  network is one linear layer here, fitted in closed form: ridge regression beats gradient descent on data this small.
- CMoE, arXiv 2502.04416, sections 3 and 4: shared experts are the neurons most often among a token's most active;
  the others are assigned in equal parts to the experts whose first member fires for the same tokens; an expert's
  score is the activation of its most representative neuron.

Both have plain or SwiGLU layers in mind. For GLU layers, MoEfication's input vectors are the gate's, which decide
whether a neuron is on.

Suffixes: t tokens, d d_model, f neurons, e experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from peerify.conversion.calibration import Batch, walk
from peerify.conversion.feedforward import FeedForward, read_feedforward, replace
from peerify.discovery.sites import Site

CHUNK = 2048  # tokens at a time: bounds the (tokens, d_ff) activations in memory
EXPERT_NEURONS = 32  # of an expert in MoEfication
KMEANS_ROUNDS = 10
RIDGE = 0.3  # of the variance of an input, as in peerify's own fit
CMOE_EXPERTS = 8
CMOE_MARKED = 10  # neurons of largest activation that count as active for a token, CMoE's K_a

Select = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[str, int, int], None]


class Masked(nn.Module):
    """A dense feed-forward layer of which each token evaluates some neurons.

    Args:
        ff: the layer.
        select: (x (t, d), what enters the down projection (t, f)) → which neurons to evaluate, bool (t, f).
        router: multiply-adds per token of choosing them; None: it looks at all of them, which no real method can.
    """

    def __init__(self, ff: FeedForward, select: Select, router: int | None) -> None:
        super().__init__()
        self.ff, self.select, self.router = ff, select, router
        self.evaluated, self.tokens = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) → (..., d_model)."""
        x_td = x.flatten(0, -2)
        a_tf = self.ff.hidden(x_td)
        mask_tf = self.select(x_td, a_tf)
        self.evaluated += int(mask_tf.sum())
        self.tokens += len(x_td)
        return F.linear(a_tf * mask_tf, self.ff.v_fd.T, self.ff.bias_d).view(x.shape)

    @property
    def dense_cost(self) -> int:
        """Multiply-adds per token of the dense layer."""
        return (2 if self.ff.gate_fd is None else 3) * self.ff.u_fd.numel()

    @property
    def spent(self) -> float:
        """Share of the neurons evaluated so far, per token."""
        return self.evaluated / max(1, self.tokens) / len(self.ff.u_fd)

    def costs(self) -> tuple[float, float]:
        """Bytes and multiply-adds spent so far, over the dense layer's; each weight is read and used once."""
        return (self.spent + (self.router or 0) / self.dense_cost,) * 2

    def forget(self) -> None:
        """Count anew."""
        self.evaluated = self.tokens = 0


Fitted = Callable[[float], Masked]
"""Share of the neurons to evaluate → the layer that does so."""
Fit = Callable[[FeedForward, Tensor, int], Fitted]
"""(dense layer, its calibration input (t, d), seed) → Fitted."""


def fit_oracle(ff: FeedForward, x_td: Tensor, seed: int) -> Fitted:
    """The truly largest |a_i| ||v_i|| of each token: not a method, but how good choosing neurons could be."""
    norm_f = ff.v_fd.norm(dim=1)

    def at(share: float) -> Masked:
        count = _part(share, len(norm_f))
        return Masked(ff, lambda x_td, a_tf: _largest(a_tf.abs() * norm_f, count), None)

    return at


def fit_static(ff: FeedForward, x_td: Tensor, seed: int) -> Fitted:
    """Always the neurons of largest mean |a_i| ||v_i||: pruning."""
    total_f = sum((ff.hidden(x).abs().sum(0) for x in x_td.split(CHUNK)), x_td.new_zeros(len(ff.u_fd)))
    importance_f = total_f * ff.v_fd.norm(dim=1)

    def at(share: float) -> Masked:
        mask_f = _largest(importance_f[None], _part(share, len(importance_f)))[0]
        return Masked(ff, lambda x_td, a_tf: mask_f.expand_as(a_tf), 0)

    return at


def fit_moefication(ff: FeedForward, x_td: Tensor, seed: int, *, similarity: bool = False) -> Fitted:
    """MoEfication: parameter clustering, and selection by a linear network or by `similarity`."""
    d_ff = len(ff.u_fd)
    rows_fd = F.normalize((ff.u_fd if ff.gate_fd is None else ff.gate_fd).to(x_td), dim=1)
    sizes = even_sizes(d_ff, min(d_ff, max(8, d_ff // EXPERT_NEURONS)))
    member_f = balanced_kmeans(rows_fd, sizes, seed)
    member_fe = F.one_hot(member_f, len(sizes)).to(x_td)
    if similarity:
        key_ed, bias_e = F.normalize(member_fe.T @ rows_fd, dim=1), x_td.new_zeros(len(sizes))
    else:
        key_ed, bias_e = _linear_network(ff, x_td, member_fe)

    def at(share: float) -> Masked:
        count = _part(share, len(sizes))

        def select(x_td: Tensor, a_tf: Tensor) -> Tensor:
            return _largest(F.linear(x_td, key_ed, bias_e), count)[:, member_f]

        return Masked(ff, select, key_ed.numel())

    return at


def fit_moefication_similarity(ff: FeedForward, x_td: Tensor, seed: int) -> Fitted:
    """MoEfication with the selection that needs no data: cosine of the token and the cluster's centre."""
    return fit_moefication(ff, x_td, seed, similarity=True)


def fit_cmoe(ff: FeedForward, x_td: Tensor, seed: int) -> Fitted:
    """CMoE: shared experts, balanced assignment of the rest, router from representative neurons.

    Half of the active experts are shared, of 8 in all as in the paper's 75 % and 25 %, of more where 8 are too coarse.
    """
    # Activations are taken of normalised inputs and weights; the layers CMoE was made for have no biases.
    unit = dataclasses.replace(
        ff,
        u_fd=F.normalize(ff.u_fd, dim=1),
        gate_fd=None if ff.gate_fd is None else F.normalize(ff.gate_fd, dim=1),
        u_bias_f=None,
        gate_bias_f=None,
        clamp=None,
    )
    d_ff = len(ff.u_fd)
    together_ff = x_td.new_zeros(d_ff, d_ff)  # for how many tokens both neurons are among the most active
    for x in x_td.split(CHUNK):
        marked_tf = _largest(unit.hidden(F.normalize(x, dim=1)).abs(), min(CMOE_MARKED, d_ff)).to(x)
        together_ff.addmm_(marked_tf.T, marked_tf)

    def at(share: float) -> Masked:
        experts = CMOE_EXPERTS
        while share * experts < 2 and experts < d_ff:
            experts *= 2
        sizes = even_sizes(d_ff, min(experts, d_ff))
        active = _part(share, len(sizes))
        shared = active // 2
        member_f, representative_e = carve(together_ff, sizes, shared)
        chosen = dataclasses.replace(
            unit,
            u_fd=unit.u_fd[representative_e],
            gate_fd=None if unit.gate_fd is None else unit.gate_fd[representative_e],
        )

        def select(x_td: Tensor, a_tf: Tensor) -> Tensor:
            routed_te = _largest(chosen.hidden(x_td).abs(), active - shared)
            always_te = routed_te.new_ones(len(x_td), shared)
            return torch.cat([always_te, routed_te], dim=1)[:, member_f]

        return Masked(ff, select, len(representative_e) * x_td.shape[1] * (1 if ff.gate_fd is None else 2))

    return at


BASELINES: dict[str, tuple[Fit, bool]] = {
    "oracle": (fit_oracle, False),
    "static": (fit_static, False),
    "moefication": (fit_moefication, False),
    "moefication-similarity": (fit_moefication_similarity, False),
    "cmoe": (fit_cmoe, True),
}
"""Name → (fit, whether each layer is fitted to what it sees behind the converted ones, as its authors do)."""


@torch.no_grad()
def fit_all(
    model: nn.Module, sites: list[Site], batches: list[Batch], fit: Fit, seed: int, progress: Progress
) -> dict[str, Fitted]:
    """`fit` of each site, by path, on the dense model's own stream; without batches, on no data."""
    found: dict[str, Fitted] = {}
    if not batches:
        for site in sites:
            ff = read_feedforward(model, site)
            found[site.path] = fit(ff, ff.u_fd[:0], seed)
        return found
    for data in walk(model, sites, batches):
        progress("Fitting layers", len(found), len(sites))
        found[data.site.path] = fit(read_feedforward(model, data.site), data.x_td, seed)
    progress("Fitting layers", len(sites), len(sites))
    return found


@torch.no_grad()
def install(model: nn.Module, sites: list[Site], fitted: dict[str, Fitted], share: float) -> list[Masked]:
    """Put the fitted layers in place in `model`."""
    layers = []
    for site in sites:
        layers.append(fitted[site.path](share))
        replace(model, site, layers[-1])
    return layers


@torch.no_grad()
def install_in_order(
    model: nn.Module, sites: list[Site], batches: list[Batch], fit: Fit, share: float, seed: int, progress: Progress
) -> list[Masked]:
    """Fit and replace layer after layer, each on the stream of the model as far as it is converted."""
    layers: list[Masked] = []
    for data in walk(model, sites, batches):
        progress("Converting layers", len(layers), len(sites))
        layer = fit(read_feedforward(model, data.site), data.x_td, seed)(share)
        data.converted_td = torch.cat([layer(x) for x in data.x_td.split(CHUNK)])
        layer.forget()
        replace(model, data.site, layer)
        layers.append(layer)
    progress("Converting layers", len(sites), len(sites))
    return layers


def even_sizes(count: int, parts: int) -> list[int]:
    """`count` in `parts` as equal as can be."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def assign(gain_fe: Tensor, sizes: list[int]) -> Tensor:
    """The part each row goes to, (f,), such that part e gets sizes[e] rows and the total gain is largest.

    An exact solution of the assignment problem with a column for each place, (f, f) in memory.
    """
    part_f = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows, places = linear_sum_assignment(gain_fe.cpu().double()[:, part_f].numpy(), maximize=True)
    assert (rows == range(len(rows))).all()
    return part_f[torch.from_numpy(places)].to(gain_fe.device)


def balanced_kmeans(rows_fd: Tensor, sizes: list[int], seed: int) -> Tensor:
    """The cluster of each row, (f,), with sizes[e] rows in cluster e."""
    generator = torch.Generator().manual_seed(seed)
    start = [int(torch.randint(len(rows_fd), (1,), generator=generator))]
    distance_f = (rows_fd - rows_fd[start[0]]).pow(2).sum(1)
    while len(start) < len(sizes):  # k-means++: centres far from those there are
        weight_f = distance_f.cpu().double() + 1e-12
        weight_f[start] = 0
        start.append(int(torch.multinomial(weight_f, 1, generator=generator)))
        distance_f = torch.minimum(distance_f, (rows_fd - rows_fd[start[-1]]).pow(2).sum(1))
    centre_ed = rows_fd[start]
    member_f = torch.full((len(rows_fd),), -1, device=rows_fd.device)
    for _ in range(KMEANS_ROUNDS):
        # -|row - centre|^2, without what is the same in all columns.
        before, member_f = member_f, assign(2 * rows_fd @ centre_ed.T - centre_ed.pow(2).sum(1), sizes)
        if torch.equal(before, member_f):
            break
        member_fe = F.one_hot(member_f, len(sizes)).to(rows_fd)
        centre_ed = member_fe.T @ rows_fd / member_fe.sum(0)[:, None]
    return member_f


def carve(together_ff: Tensor, sizes: list[int], shared: int) -> tuple[Tensor, Tensor]:
    """CMoE's experts, from how often two neurons are active for the same token.

    Returns:
        The expert of each neuron (f,), the `shared` ones first, and the representative neuron of each routed expert.
    """
    rate_f = together_ff.diagonal()
    order = rate_f.argsort(descending=True, stable=True)
    always, rest = order[: sum(sizes[:shared])], order[sum(sizes[:shared]) :]
    member_f = torch.empty_like(order)
    member_f[always] = torch.arange(shared, device=order.device).repeat_interleave(
        torch.tensor(sizes[:shared], dtype=torch.long, device=order.device)
    )
    # Binary features m of neurons over tokens: |m - c|^2 = |m|^2 + |c|^2 - 2 m.c, m.c being in `together`.
    centre = rest[: len(sizes) - shared]  # the most active of the rest
    place = assign(2 * together_ff[rest][:, centre] - rate_f[centre], sizes[shared:])
    member_f[rest] = place + shared
    representative = []
    for expert in range(len(sizes) - shared):
        members = rest[place == expert]
        # Of the members, the one nearest to their mean.
        distance = rate_f[members] - 2 * together_ff[members][:, members].mean(1)
        representative.append(members[distance.argmin()])
    return member_f, torch.stack(representative)


def _linear_network(ff: FeedForward, x_td: Tensor, member_fe: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (e, d) and biases (e,) that predict from x the sum of |a_i| in each expert, by ridge regression."""
    mean_d = x_td.mean(0)
    second_dd = x_td.new_zeros(x_td.shape[1], x_td.shape[1])
    cross_de, mean_e = x_td.new_zeros(x_td.shape[1], member_fe.shape[1]), x_td.new_zeros(member_fe.shape[1])
    for x in x_td.split(CHUNK):
        active_te = ff.hidden(x).abs() @ member_fe
        centred = x - mean_d
        second_dd.addmm_(centred.T, centred)
        cross_de.addmm_(centred.T, active_te)
        mean_e += active_te.sum(0) / len(x_td)
    variance_d = second_dd.diagonal()
    floor = 1e-6 * variance_d.mean() + torch.finfo(x_td.dtype).tiny
    factor_dd = torch.linalg.cholesky(second_dd + torch.diag(RIDGE * variance_d + floor))
    key_ed = torch.cholesky_solve(cross_de, factor_dd).T.contiguous()
    return key_ed, mean_e - key_ed @ mean_d


def _part(share: float, count: int) -> int:
    """How many of `count` a share pays for, at least one."""
    return max(1, min(count, int(share * count + 1e-6)))


def _largest(score_tn: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest of each row."""
    if count >= score_tn.shape[1]:
        return torch.ones_like(score_tn, dtype=torch.bool)
    index = score_tn.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(score_tn, dtype=torch.bool).scatter_(1, index, True)
