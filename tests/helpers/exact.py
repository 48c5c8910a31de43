"""The dense layer itself as a PEER layer."""

from __future__ import annotations

from typing import Any

import torch

from peerify.config.peer import PeerConfig
from peerify.conversion.elastic import build_elastic, plan_elastic
from peerify.conversion.feedforward import FeedForward
from peerify.discovery.sites import Site
from peerify.modeling.peer_elastic import ElasticPEER


@torch.no_grad()
def exact_layer(ff: FeedForward, site: Site) -> tuple[ElasticPEER, dict[str, Any]]:
    """A PEER layer that evaluates every neuron in full, which is the dense layer, and its entry of config.json."""
    options = plan_elastic(ff, site, PeerConfig()) | {"budgets": []}
    input_rms_d = torch.ones(site.d_model, device=ff.u_fd.device)
    return build_elastic(ff, options, input_rms_d).to(ff.u_fd.dtype), options
