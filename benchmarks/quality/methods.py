"""The methods side by side: a name for each, and how a dense model becomes one of them.

To add a peerify variant, add a line to `VARIANTS`; to try one without that, append options to a name on the command
line: `--methods peerify,peerify+refine_steps=0+num_shared=64`.
"""

from __future__ import annotations

import copy
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from baselines import BASELINES, Fitted, Progress, fit_all, install, install_in_order
from pydantic import ValidationError
from sparsity import SPARSITY
from torch import Tensor, nn

import peerify
from peerify.conversion.calibration import token_batches
from peerify.discovery.sites import Site, calibrated_feedforwards, select_sites
from peerify.errors import UsageError
from peerify.modeling.peer_layer import PEER
from peerify.modules import peer_layers

VARIANTS: dict[str, dict[str, Any]] = {
    "peerify": {},
    "uniform": {"allocation": "uniform"},
    "bits-3": {"bits": 3},
    "bits-2": {"bits": 2},
    "product-keys": {"keys": "product"},
    "peer-paper": {"preset": "peer-paper"},
}
"""Options of `PeerConfig` by name; the active share is added to them."""

_UNFITTED = {"refit": False, "refine_steps": 0, "allocation": "uniform"}
RANDOM: dict[str, dict[str, Any]] = {
    "random-keys": {**_UNFITTED, "keys": "product"},
    "random-peer": {**_UNFITTED, "preset": "peer-paper"},
}
"""PEER layers of which nothing is fitted: random keys over copied neurons whose gates are 1, in the grids that peerify
would take; and the paper's own layer, experts random as well, as one gets it when starting from nothing."""

OTHERS = {**BASELINES, **SPARSITY}
METHODS = [*OTHERS, *RANDOM, *VARIANTS]

ELSEWHERE = {"errors", "config", "discovery"}  # files and packages


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the plot."""

    name: str
    options: dict[str, Any]
    """Of `PeerConfig`; empty for baselines."""

    @property
    def base(self) -> str:
        """The name without what was added on the command line."""
        return self.name.partition("+")[0]

    def identity(self, active: float) -> dict[str, Any]:
        """All that a result depends on besides model and text: with the same identity it need not be computed again.

        Raises:
            UsageError: options that `PeerConfig` does not take.
        """
        here = Path(__file__).parent
        if self.base in OTHERS:
            file = here / ("baselines.py" if self.base in BASELINES else "sparsity.py")
            return {"kind": self.base, "active": active, "code": _digest([file])}
        config = self.config(active).model_dump(mode="json")
        kind = self.base if self.base in RANDOM else "peerify"  # variants of one configuration are one
        return {"kind": kind, "active": active, "config": config, "code": _digest(conversion_code())}

    def config(self, active: float) -> peerify.PeerConfig:
        """The configuration of a conversion; not for baselines."""
        try:
            return peerify.PeerConfig(**{**self.options, "active": active})
        except ValidationError as error:
            first = error.errors()[0]
            raise UsageError(f"--methods {self.name}: {'.'.join(map(str, first['loc']))} {first['msg']}") from None


def parse_method(text: str) -> Method:
    """`name` or `name+option=value+...`; UsageError where there is no such name."""
    name, *extra = text.split("+")
    if name not in METHODS:
        raise UsageError(f"--methods: there is no method {name!r}; choose from {', '.join(METHODS)}")
    if extra and name in OTHERS:
        raise UsageError(f"--methods {text}: {name} takes no options")
    options = dict(VARIANTS.get(name) or RANDOM.get(name) or {})
    for part in extra:
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"--methods {text}: write options as key=value")
        options[key] = yaml.safe_load(value)
    return Method(name=text, options=options)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model with a method in the place of its feed-forward layers."""

    model: nn.Module
    layers: list[Any]
    """The `PEER` layers, or what takes their place."""
    seconds: float
    """What the conversion took, without loading; of a model with several budgets the same for all of them."""

    def costs(self, measured: list[dict[str, Any]]) -> dict[str, float]:
        """Shares of the dense layers' bytes and multiply-adds that a token took.

        Args:
            measured: the "layers" of an evaluation; empty for baselines, which count themselves.
        """
        found = [(row["bytes_fraction"], row["macs_fraction"]) for row in measured]
        found = found or [layer.costs() for layer in self.layers]
        size = [_size(layer) for layer in self.layers]
        read, done = (
            sum(part * n for part, n in zip(parts, size, strict=True)) / sum(size) for parts in zip(*found, strict=True)
        )
        return {"bytes": read, "macs": done}


class Maker:
    """Makes models of one dense model, on one calibration text; what does not depend on the share is fitted once."""

    def __init__(self, dense: Any, windows_bt: Tensor, seed: int) -> None:
        self.dense, self.windows_bt, self.seed = dense, windows_bt, seed
        self.batches = token_batches(windows_bt, dense)
        self.sites: list[Site] = select_sites(calibrated_feedforwards(dense, self.batches[0]), "all")
        self._fitted: dict[str, tuple[dict[str, Fitted], float]] = {}
        self._elastic: tuple[Any, Any] = (None, None)

    def make(self, method: Method, active: float, progress: Progress = lambda *_: None) -> Made:
        """The dense model, copied, with `method` in it."""
        if method.base in OTHERS:
            return self._baseline(method.base, active, progress)
        config = method.config(active)
        if config.has_copies:
            return self._at_budget(config, active, progress)
        model = copy.deepcopy(self.dense)
        is_random = method.base in RANDOM
        windows_bt = self.windows_bt[:1] if is_random else self.windows_bt  # what it is fitted to is overwritten
        conversion = peerify.convert(model, config, windows_bt, progress=progress)
        layers = [module for module in conversion.model.modules() if isinstance(module, PEER)]
        if is_random:
            forget(layers, experts=method.base == "random-peer", seed=self.seed)
        return Made(model=conversion.model.eval(), layers=layers, seconds=conversion.seconds)

    def _at_budget(self, config: peerify.PeerConfig, active: float, progress: Progress) -> Made:
        """One conversion serves every budget."""
        key = config.model_copy(update={"active": 0.5})
        if self._elastic[0] != key:
            self._elastic = (None, None)  # before the next one takes as much memory
            conversion = peerify.convert(copy.deepcopy(self.dense), key, self.windows_bt, progress=progress)
            self._elastic = key, conversion
        conversion = self._elastic[1]
        conversion.model.eval().set_active(active)
        layers = list(peer_layers(conversion.model).values())
        return Made(model=conversion.model, layers=layers, seconds=conversion.seconds)

    def _baseline(self, name: str, active: float, progress: Progress) -> Made:
        fit, in_order = OTHERS[name]
        start = time.perf_counter()
        model = copy.deepcopy(self.dense)
        if in_order:
            layers = install_in_order(model, self.sites, self.batches, fit, active, self.seed, progress)
            return Made(model=model, layers=layers, seconds=time.perf_counter() - start)
        if name not in self._fitted:
            batches = [] if name == "oracle" else self.batches  # it knows already
            fitted = fit_all(self.dense, self.sites, batches, fit, self.seed, progress)
            self._fitted[name] = fitted, time.perf_counter() - start
        fitted, seconds = self._fitted[name]
        return Made(model=model, layers=install(model, self.sites, fitted, active), seconds=seconds)


@torch.no_grad()
def forget(layers: list[PEER], *, experts: bool, seed: int) -> None:
    """Random keys in place of fitted ones, over neurons in random order; or random `experts` as well."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            keys, pool = layer.keys, layer.pool
            keys.sub_keys.normal_(std=keys.sub_keys.shape[-1] ** -0.5)
            if keys.sub_key_bias is not None:
                keys.sub_key_bias.zero_()
            if keys.query_proj is not None:
                keys.query_proj.reset_parameters()
            if keys.query_norm is not None:
                keys.query_norm.reset_parameters()
            tables = [pool.u, pool.v, pool.gate, pool.u_bias, pool.gate_bias]
            order = torch.randperm(layer.num_experts)
            for table in tables:
                if table is not None:
                    # As large as the neurons are: transformers' own initialisation would not fit every model.
                    new = (
                        torch.randn(table.shape).to(table) * table.std()
                        if experts
                        else table[order.to(table.device)].clone()
                    )
                    table.copy_(new)


def _size(layer: Any) -> int:
    """Numbers of the dense layer that `layer` stands for."""
    if hasattr(layer, "pool"):
        return int(layer.d_ff * layer.d_model * (2 if layer.pool.gate is None else 3))
    return (2 if layer.ff.gate_fd is None else 3) * layer.ff.u_fd.numel()


def conversion_code() -> list[Path]:
    """The files of peerify that decide how good a conversion is: what conversion.py imports, and what these import.

    Left out is what says which layers there are and how options are written: its changes seldom change a figure, and
    would have everything measured again.
    """
    package = Path(peerify.__file__).parent

    def file_of(name: str) -> Path:
        return package.joinpath(*name.split(".")).with_suffix(".py")

    found, todo = set[str](), ["conversion.model"]
    while todo:
        name = todo.pop()
        if name in found or name.partition(".")[0] in ELSEWHERE or not file_of(name).exists():
            continue
        found.add(name)
        text, folder = file_of(name).read_text("utf-8"), name.rpartition(".")[0]
        todo += re.findall(r"^ *from peerify\.([\w.]+) import", text, re.MULTILINE)
        todo += [f"{folder}.{module}" for module in re.findall(r"^ *from \.(\w+) import", text, re.MULTILINE)]
    return [file_of(name) for name in sorted(found)]


def _digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
