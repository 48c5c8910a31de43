"""What should tell a token which experts matter? Estimates of the experts' projections, side by side, layer by layer.

    python benchmarks/estimates.py --model MODEL --calibration TEXT --test TEXT [--layers 2,10,20]

For each estimate: what it costs, in bytes and multiply-adds over the dense layer's, and the squared error of the
layer's output over the output's square at several budgets of bytes, the estimate counted. Three ways to spend what is
left:

    choose   experts are read in full, those of which the estimate expects most;
    reuse    likewise, where the estimate has multiplied some inputs with the real weights, which are not read again;
    copies   experts are left out, taken from the estimate with a 4-bit copy of their output vector, or read in full,
             by one price (peerify/modeling/peer_elastic.py).

The oracle knows all projections and pays nothing for it. Estimates are fitted to the calibration text in closed form,
and their errors' deviations are measured there; the output is compared on the test text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from peerify import load_dense
from peerify.conversion.calibration import token_batches, walk
from peerify.conversion.feedforward import FeedForward, read_feedforward
from peerify.data import load_windows
from peerify.discovery.replay import activation_function
from peerify.discovery.sites import calibrated_feedforwards, select_sites
from peerify.modeling.peer_copies import EXPONENT, NODE, in_few_bits, largest_inputs

BUDGETS = (0.125, 0.25, 0.5, 0.75)
TOKENS = 1024  # of the test text
GROUP = 64
STEP = 2 / GROUP  # bytes of a group's step for each number
VALUE = (0.5 + STEP) / 6  # bytes of a copy's output vector over those of an expert in bfloat16

Predict = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Estimate:
    """Gate and up projections of all experts (t, n), and what they cost."""

    name: str
    bytes: float
    macs: float
    predict: Predict
    reused: float = 0.0
    """Share of an expert's bytes that need not be read again."""


def main() -> None:
    """Parse, measure, print."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model with gated feed-forward layers")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--layers", default="2,10,20", help="indices (%(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dense = load_dense(options.model)
    chosen = [int(part) for part in options.layers.split(",")]
    inputs: list[dict[int, Tensor]] = []
    layers: dict[int, FeedForward] = {}
    for text, tokens in ((options.calibration, options.calibration_tokens), (options.test, TOKENS)):
        windows = load_windows([text], dense.tokenizer, context=512, max_tokens=tokens)
        batches = token_batches(windows, dense.model)
        sites = select_sites(calibrated_feedforwards(dense.model, batches[0]), "all")
        seen = {}
        for i, data in enumerate(walk(dense.model, sites, batches)):
            data.converted_td = data.y_td
            if i in chosen:
                seen[i] = data.x_td
                layers[i] = read_feedforward(dense.model, data.site).to(data.x_td.device, torch.float32)
        inputs.append(seen)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for i in chosen:
            for estimate in estimates(layers[i], inputs[0][i]):
                rows += [{"layer": i, **row} for row in measure(layers[i], estimate, inputs[0][i], inputs[1][i])]
    print(json.dumps(rows, indent=1) if options.json else table(rows, chosen))


def estimates(ff: FeedForward, x_td: Tensor) -> list[Estimate]:
    """All that are compared, fitted to `x_td`."""
    assert ff.gate_fd is not None
    gate_fd, up_fd, d_model = ff.gate_fd, ff.u_fd, ff.u_fd.shape[1]
    rms_d = x_td.square().mean(0).sqrt()
    scale_d = (rms_d / rms_d.mean()) ** EXPONENT
    reach_d = torch.cat([gate_fd, up_fd]).norm(dim=0)

    def linear(gate: Tensor, up: Tensor, share: float = 1.0) -> Predict:
        def predict(x: Tensor) -> tuple[Tensor, Tensor]:
            read, _ = largest_inputs(x, reach_d, share)
            return read @ gate.T, read @ up.T

        return predict

    found = [Estimate("oracle", 0.0, 0.0, linear(gate_fd, up_fd))]
    for rank in (d_model // 6, d_model // 3):
        low, cost = low_rank(gate_fd, x_td, rank), rank * (d_model + len(gate_fd)) / (3 * gate_fd.numel())
        deviation_f = (x_td @ up_fd.T).std(0)

        def predict(x: Tensor, low: Tensor = low, deviation_f: Tensor = deviation_f) -> tuple[Tensor, Tensor]:
            return x @ low.T, deviation_f.expand(len(x), -1)

        found.append(Estimate(f"low rank of the gate, {rank}", cost, cost, predict))
    for share in (0.125, 0.25):
        exact = linear(gate_fd, up_fd, share)
        found.append(
            Estimate(f"real weights, {share:.3g} of the inputs", 2 / 3 * share, 2 / 3 * share, exact, 2 / 3 * share)
        )
    for bits in (8, 4, 3, 2):
        gate, up = (in_few_bits(w, bits, GROUP, scale_d) for w in (gate_fd, up_fd))
        for share in (1.0, 0.5, 0.25):
            cost = (bits / 8 * share + STEP) / 3
            name = f"{bits} bits" + ("" if share == 1 else f", {share:.3g} of the inputs")
            found.append(Estimate(name, cost, 2 / 3 * share, linear(gate, up, share)))
    plain = linear(in_few_bits(gate_fd, 4, GROUP), in_few_bits(up_fd, 4, GROUP))
    found.append(Estimate("4 bits, inputs not scaled", (0.5 + STEP) / 3, 2 / 3, plain))
    gate4 = in_few_bits(gate_fd, 4, GROUP, scale_d)
    deviation_f = (x_td @ up_fd.T).std(0)
    found.append(
        Estimate(
            "4 bits of the gate alone", (0.5 + STEP) / 6, 1 / 3, lambda x: (x @ gate4.T, deviation_f.expand(len(x), -1))
        )
    )
    for part in (2, 4):
        gate, up = (product_quantised(w * scale_d, part) / scale_d for w in (gate_fd, up_fd))
        codes = 1 / part / 3  # a byte for each part of each vector
        books = 2 * 256 * d_model * 2 / (6 * gate_fd.numel())
        macs = 2 * 256 * d_model / (3 * gate_fd.numel())  # and a look-up for each code
        found.append(Estimate(f"product quantisation, {part} inputs a code", codes + books, macs, linear(gate, up)))
    return found


def low_rank(w_fd: Tensor, x_td: Tensor, rank: int) -> Tensor:
    """The matrix of that rank whose products with the inputs are nearest."""
    moment_dd = x_td.T @ x_td / len(x_td)
    root_dd = torch.linalg.cholesky(moment_dd + 1e-4 * moment_dd.diagonal().mean() * torch.eye(len(moment_dd)))
    left, size, right = torch.linalg.svd(w_fd @ root_dd, full_matrices=False)
    cut = (left[:, :rank] * size[:rank]) @ right[:rank]
    return torch.linalg.solve_triangular(root_dd, cut, upper=False, left=False)


def product_quantised(w_fd: Tensor, part: int, rounds: int = 8) -> Tensor:
    """Each run of `part` numbers replaced by the nearest of 256 centres of its own place, by k-means."""
    runs_pfr = w_fd.unflatten(1, (-1, part)).transpose(0, 1)
    generator = torch.Generator().manual_seed(0)
    centre_pcr = runs_pfr[:, torch.randperm(w_fd.shape[0], generator=generator)[:256]].clone()
    for _ in range(rounds):
        nearest_pf = torch.cdist(runs_pfr, centre_pcr).argmin(-1)
        index = nearest_pf[..., None].expand(-1, -1, part)
        total = torch.zeros_like(centre_pcr).scatter_add_(1, index, runs_pfr)
        count = torch.zeros_like(centre_pcr).scatter_add_(1, index, torch.ones_like(runs_pfr))
        centre_pcr = torch.where(count > 0, total / count.clamp_min(1), centre_pcr)
    return centre_pcr.gather(1, nearest_pf[..., None].expand(-1, -1, part)).transpose(0, 1).flatten(1)


def measure(ff: FeedForward, estimate: Estimate, fit_td: Tensor, x_td: Tensor) -> list[dict[str, Any]]:
    """Errors at each budget, for each way to spend it."""
    assert ff.gate_fd is not None
    act = activation_function(ff.activation)
    seen = fit_td[:: max(1, len(fit_td) // 2048)]
    gate_tf, up_tf = estimate.predict(seen)
    gate_off = (gate_tf - seen @ ff.gate_fd.T).square().mean(0).sqrt()
    alone = bool((up_tf == up_tf[:1]).all())  # nothing is known of the up projections but their size
    up_off = up_tf.new_zeros(()) if alone else (up_tf - seen @ ff.u_fd.T).square().mean(0).sqrt()

    a_tf, (gate_tf, up_tf) = ff.hidden(x_td), estimate.predict(x_td)
    low, middle, high = act(gate_tf - NODE * gate_off), act(gate_tf), act(gate_tf + NODE * gate_off)
    mean, square = (low + 4 * middle + high) / 6, (low**2 + 4 * middle**2 + high**2) / 6
    v_fd = in_few_bits(ff.v_fd, 4, GROUP)
    energy_f, left_f = ff.v_fd.square().sum(1), (ff.v_fd - v_fd).square().sum(1)
    second = square * (up_tf**2 + up_off**2)
    mean_a = mean * up_tf
    known = SimpleNamespace(
        left_out=second * energy_f,
        copied=(second - mean_a**2).clamp_min(0) * energy_f + second * left_f,
    )
    y_td = a_tf @ ff.v_fd
    rows = []
    ways = ["choose"] + ["reuse"] * (estimate.reused > 0) + ["copies"] * (estimate.name != "oracle" and not alone)
    for way in ways:
        full_cost = 1 - (estimate.reused if way == "reuse" else 0.0)

        def tiers(price: float, way: str = way) -> tuple[Tensor, Tensor]:
            if way != "copies":
                return torch.zeros_like(known.left_out, dtype=torch.bool), known.left_out >= price
            limit = price * (1 - VALUE)
            kept = known.left_out >= price * VALUE + known.copied.clamp(max=limit)
            full = kept & (known.copied >= limit)
            return kept & ~full, full

        errors: dict[str, float | None] = {}
        for budget in BUDGETS:
            low_price, high_price = -60.0, 20.0
            for _ in range(40):
                price = (low_price + high_price) / 2
                copied, full = tiers(2.0**price)
                spent = estimate.bytes + float(copied.float().mean()) * VALUE + float(full.float().mean()) * full_cost
                low_price, high_price = (price, high_price) if spent > budget else (low_price, price)
            copied, full = tiers(2.0**high_price)
            off = (a_tf * full) @ ff.v_fd + (mean_a * copied) @ v_fd - y_td
            error = float((off.square().sum(1) / y_td.square().sum(1)).mean())
            errors[f"{budget:g}"] = error if estimate.bytes < budget else None
        rows.append(
            {"estimate": estimate.name, "way": way, "bytes": estimate.bytes, "macs": estimate.macs, "errors": errors}
        )
    return rows


def table(rows: list[dict[str, Any]], layers: list[int]) -> str:
    """One line for each estimate and way; errors of the layers beside each other."""
    lines = [f"errors in layers {', '.join(map(str, layers))}", ""]
    lines.append(f"{'estimate':<36} {'way':<7} {'bytes':>6} {'macs':>6}  " + "  ".join(f"{b:^20.1%}" for b in BUDGETS))
    for row in [row for row in rows if row["layer"] == layers[0]]:
        same = [other for other in rows if (other["estimate"], other["way"]) == (row["estimate"], row["way"])]
        cells = []
        for budget in BUDGETS:
            values = [other["errors"][f"{budget:g}"] for other in same]
            cells.append("–" if None in values else " ".join(f"{value:.4f}" for value in values))
        lines.append(
            f"{row['estimate']:<36} {row['way']:<7} {row['bytes']:>6.1%} {row['macs']:>6.1%}  "
            + "  ".join(f"{cell:^20}" for cell in cells)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
