"""The dense layer itself as a PEER layer."""

from __future__ import annotations

from typing import Any

import torch

from peerify.config.peer import PeerConfig
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.layer import copy_neurons, plan_for
from peerify.discovery.sites import Site
from peerify.modeling.peer_layer import PEER


@torch.no_grad()
def exact_layer(ff: FeedForward, site: Site) -> tuple[PEER, dict[str, Any]]:
    """A PEER layer that retrieves every neuron with gate 1, which is the dense layer, and its keyword arguments.

    Its keys are random: nothing depends on them until fewer are retrieved.
    """
    plan = plan_for(ff, site, PeerConfig(active=1.0))
    plan["rerank"] = None
    with torch.random.fork_rng(devices=[]):
        layer = PEER(**plan).to(ff.u_fd.device, ff.u_fd.dtype)
    copy_neurons(layer, ff, torch.arange(site.d_ff, device=ff.u_fd.device))
    return layer.eval(), plan
