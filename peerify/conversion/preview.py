"""What a conversion would do to each layer of a model, and what it is expected to cost: measured, nothing converted."""

from __future__ import annotations

import time
from typing import Any

from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import load_for_conversion
from peerify.conversion.model import plan_conversion
from peerify.progress import Progress


def plan_checkpoint(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Load the dense model of `recipe` and plan its conversion; `recipe.output` is neither read nor written.

    `convert_checkpoint` of the same recipe measures the same again, and does what the plan says.

    Returns:
        ``{"model", "layers": [...], "converted", "bytes_fraction", "macs_fraction", "predicted_ratio", "seconds"}``.
        Each layer has ``{"path", "d_model", "d_ff", "sensitivity", "converted", "bytes_fraction", "macs_fraction",
        "num_heads", "topk"}``: sensitivity as of `ConversionPlan`, the fractions of the dense layer's bytes and
        multiply-adds; the last two are None without product keys.
        The fractions of the whole are over all these layers. predicted_ratio is the perplexity over the dense model's.

    Raises:
        PeerifyError: whatever is wrong with the model, the text or the recipe.
    """
    start = time.perf_counter()
    dense, windows_bt = load_for_conversion(recipe, progress)
    plan = plan_conversion(dense.model, recipe.convert, windows_bt, progress=progress)
    rows = []
    for site in plan.sites:
        options = plan.layers.get(site.path)
        read, done = plan.fractions[site.path]
        rows.append(
            {
                "path": site.path,
                "d_model": site.d_model,
                "d_ff": site.d_ff,
                "sensitivity": plan.sensitivity[site.path],
                "converted": options is not None,
                "bytes_fraction": read,
                "macs_fraction": done,
                **{key: (options or {}).get(key) for key in ("num_heads", "topk")},
            }
        )
    return {
        "model": recipe.model,
        "layers": rows,
        "converted": len(plan.layers),
        "bytes_fraction": plan.bytes_fraction,
        "macs_fraction": plan.macs_fraction,
        "predicted_ratio": plan.predicted_ratio,
        "seconds": time.perf_counter() - start,
    }
