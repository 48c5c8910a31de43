"""What `train.precision: auto` is on a device."""

from __future__ import annotations

import logging

import torch

from peerify.config.recipe import Recipe
from peerify.conversion.precision import has_fast_bfloat16
from peerify.training.distribution import launched

logger = logging.getLogger(__name__)


def with_precision(recipe: Recipe, begun: str | None = None) -> Recipe:
    """The recipe with another `train.precision` than auto, for the device that it will be trained on.

    Args:
        begun: the precision of the run that goes on, which stays what it was on another machine, too.
    """
    config, device = recipe.training, torch.device(recipe.device)
    if launched() and torch.cuda.is_available():
        device = torch.device("cuda")
    fast = has_fast_bfloat16(device)
    if config.precision == "auto":
        config = config.model_copy(update={"precision": begun or ("bf16" if fast else "no")})
    elif config.precision == "bf16" and device.type == "cpu" and not fast:
        logger.warning(
            "train.precision is bf16, and this CPU has no instructions for it: steps take many times as long as in "
            "float32. Take auto, or no"
        )
    return recipe.model_copy(update={"train": config})
