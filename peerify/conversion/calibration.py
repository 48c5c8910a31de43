"""Run a model block by block and hand out what each feed-forward layer sees.

Two residual streams go through the blocks side by side: that of the dense model and that of the model as converted so
far. So each layer is fitted to the input that it will really get, and its target can bring the residual stream back to
the dense model's. Memory holds the two streams and one layer's input, never the activations of all layers.

Suffixes: t tokens of all batches, d d_model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peerify.conversion.precision import fast_products
from peerify.discovery.sites import Site
from peerify.errors import ConversionError
from peerify.modules import blocks_around

Batch = dict[str, Any]
BATCH_TOKENS = 2048


@dataclass(kw_only=True, eq=False)
class SiteData:
    """What one feed-forward layer sees on the calibration data."""

    site: Site
    x_td: Tensor
    """Its input in the model as converted so far, float32."""
    y_td: Tensor
    """The dense layer's output for it, float32."""
    correction_td: Tensor | None
    """What to add to its output so that the residual stream is the dense model's again; None where the output is not
    simply added to that (a norm follows it), or where the model does not run block by block."""
    converted_td: Tensor | None = None
    """To be set to the output of what replaces the layer, where it is known: saves running the block once more.
    `y_td` itself where the layer stays."""


def token_batches(windows_bt: Tensor, model: nn.Module) -> list[Batch]:
    """Windows of token ids as inputs of `model`, in batches of equal size."""
    count, context = windows_bt.shape
    size = max(n for n in range(1, max(1, BATCH_TOKENS // context) + 1) if count % n == 0)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return [
        {"input_ids": ids} | ({"decoder_input_ids": ids} if encoder_decoder else {}) for ids in windows_bt.split(size)
    ]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The same inputs with their tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@torch.no_grad()  # as a decorator: a `with` would leave gradients off in the caller between two yields
def walk(model: nn.Module, sites: list[Site], batches: list[Batch]) -> Iterator[SiteData]:
    """The data of each site in the order in which the model runs them; replace the site before asking for the next.

    Raises:
        ConversionError: a layer's input is not finite.
    """
    device = next(model.parameters()).device
    batches = [on_device(batch, device) for batch in batches]
    paths = {site.path for site in sites}
    with evaluating(model):
        body = _body(model, sites)
        for chain in _chains(model, body, sites, batches):
            here = [site for site in sites if any(inside(site.path, block) for block in chain)]
            paths -= {site.path for site in here}
            yield from _walk_chain(model, body, chain, here, batches)
        for site in sites:
            if site.path in paths:
                yield _whole_model(model, body, site, batches)


def _walk_chain(
    model: nn.Module, body: nn.Module, chain: list[str], sites: list[Site], batches: list[Batch]
) -> Iterator[SiteData]:
    last = max(i for i, block in enumerate(chain) if any(inside(site.path, block) for site in sites))
    chain = chain[: last + 1]
    inputs = _block_inputs(model, body, chain, batches)
    dense = [call.hidden for call in inputs[0]]
    stream = dense  # the same list as long as nothing is converted
    for block_path, calls in zip(chain, inputs, strict=True):
        block = model.get_submodule(block_path)
        here = [site for site in sites if inside(site.path, block_path)]
        shared = stream is dense
        seen = _Seen([], [])
        if here and shared:
            with _capture(model, here[0], seen):
                dense = [call.run(block, hidden) for call, hidden in zip(calls, dense, strict=True)]
        else:
            dense = [call.run(block, hidden) for call, hidden in zip(calls, dense, strict=True)]
        after: list[Tensor] | None = None
        for i, site in enumerate(here):
            outputs = dense
            if not (shared and i == 0):
                with _capture(model, site, seen):
                    outputs = [call.run(block, hidden) for call, hidden in zip(calls, stream, strict=True)]
            adds_up = _adds_up(model, block, site, calls[0], stream[0], outputs[0])
            correction = None
            if adds_up and outputs is not dense:
                correction = torch.cat([_flat(a) - _flat(b) for a, b in zip(dense, outputs, strict=True)])
            data = _site_data(site, seen, correction)
            yield data
            if data.converted_td is data.y_td:  # nothing is changed
                after = outputs
            elif adds_up and data.converted_td is not None:
                change = (data.converted_td - data.y_td).split([_flat(hidden).shape[0] for hidden in outputs])
                after = [h + c.view_as(h).to(h.dtype) for h, c in zip(outputs, change, strict=True)]
            else:
                after = None
            seen = _Seen([], [])
        if after is not None:
            stream = after
        elif here or not shared:
            stream = [call.run(block, hidden) for call, hidden in zip(calls, stream, strict=True)]
        else:
            stream = dense


def _flat(hidden: Tensor) -> Tensor:
    return hidden.float().flatten(0, -2)


def _whole_model(model: nn.Module, body: nn.Module, site: Site, batches: list[Batch]) -> SiteData:
    """For models that do not run block by block: one pass through all of it for each site."""
    seen = _Seen([], [])
    with _capture(model, site, seen):
        for batch in batches:
            body(**batch)
    return _site_data(site, seen, None)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Inputs and outputs of a layer, one tensor (t, d) per batch."""

    x: list[Tensor]
    y: list[Tensor]


def _site_data(site: Site, seen: _Seen, correction_td: Tensor | None) -> SiteData:
    x_td, y_td = (torch.cat(tensors).float() for tensors in (seen.x, seen.y))
    for name, tensor in (("input", x_td), ("output", y_td), ("block's output", correction_td)):
        if tensor is not None and not tensor.isfinite().all():
            raise ConversionError(
                f"{site.path}: its {name} on the calibration data is NaN or infinite; "
                "the weights may be damaged, or float16 may overflow (try --dtype float32)"
            )
    return SiteData(site=site, x_td=x_td, y_td=y_td, correction_td=correction_td)


@dataclass(frozen=True, eq=False)
class _Call:
    """One recorded call of a block, to be repeated with other hidden states."""

    hidden: Tensor
    name: str | None  # keyword of the hidden states, None if they come first
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        with fast_products(hidden):
            if self.name is None:
                output = block(hidden, *self.args, **self.kwargs)
            else:
                output = block(*self.args, **{self.name: hidden}, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


def _recorded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    if args and isinstance(args[0], Tensor):
        return _Call(args[0], None, args[1:], kwargs)
    name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
    if name is None:
        return None
    return _Call(kwargs[name], name, args, {key: value for key, value in kwargs.items() if key != name})


def _chains(model: nn.Module, body: nn.Module, sites: list[Site], batches: list[Batch]) -> list[list[str]]:
    """Runs of blocks around the sites in which each one's output is the next one's input; others are left out."""
    blocks = blocks_around(model, (site.path for site in sites))
    order: list[tuple[str, _Call | None, Any]] = []
    with ExitStack() as stack:
        for path in blocks:

            def note(_: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                first = output[0] if isinstance(output, tuple) else output
                order.append((path, _recorded(args, kwargs), first))

            stack.enter_context(hooked(model.get_submodule(path).register_forward_hook(note, with_kwargs=True)))
        body(**{name: _short(value) for name, value in batches[0].items()})
    chains: list[list[str]] = []
    previous: Any = None
    for path, call, output in order:
        once = sum(other == path for other, _, _ in order) == 1
        if call is None or not once or not isinstance(output, Tensor) or output.shape != call.hidden.shape:
            previous = None
            continue
        if previous is not None and call.hidden is previous:
            chains[-1].append(path)
        else:
            chains.append([path])
        previous = output
    return [chain for chain in chains if any(inside(site.path, block) for site in sites for block in chain)]


def _short(value: Any) -> Any:
    """One sample of an input, and only the start of it if that is a row of tokens; a waveform must stay whole."""
    if not isinstance(value, Tensor):
        return value
    return value[:1, :8] if value.dim() == 2 and not value.is_floating_point() else value[:1]


def _block_inputs(model: nn.Module, body: nn.Module, chain: list[str], batches: list[Batch]) -> list[list[_Call]]:
    """For each block, its call for each batch; only the first block's hidden states are kept.

    What blocks get besides hidden states (masks, position embeddings) mostly depends on the shape of a batch alone.
    Two batches tell; only where they differ is the whole model run on all of them.
    """

    def run(batch: Batch, stop_at_first: bool) -> list[_Call]:
        calls: list[_Call] = []
        with ExitStack() as stack:
            for i, path in enumerate(chain):

                def note(_: Any, args: Any, kwargs: Any, i: int = i) -> None:
                    call = _recorded(args, kwargs)
                    assert call is not None
                    calls.append(call if i == 0 else _Call(call.hidden[:0], call.name, call.args, call.kwargs))
                    if stop_at_first or i == len(chain) - 1:
                        raise StopForwardError

                hook = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
                stack.enter_context(hooked(hook))
            with suppress(StopForwardError):
                body(**batch)
        return calls

    first = run(batches[0], False)
    if len(batches) == 1:
        return [[call] for call in first]
    second = run(batches[1], False)
    if all(_equal((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(first, second, strict=True)):
        starts = [first[0], second[0], *(run(batch, True)[0] for batch in batches[2:])]
        return [starts, *([call] * len(batches) for call in first[1:])]
    every = [first, second, *(run(batch, False) for batch in batches[2:])]
    return [list(calls) for calls in zip(*every, strict=True)]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, bool | int | float | str) and a == b)


def _adds_up(model: nn.Module, block: nn.Module, site: Site, call: _Call, hidden: Tensor, output: Tensor) -> bool:
    """Whether the layer's output is just added to the residual stream: the block without it, plus it, is the block."""
    own: list[Tensor] = []

    def silence(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        own.append(y)
        return torch.zeros_like(y)

    with hooked(model.get_submodule(_end(site)).register_forward_hook(silence)):
        without = call.run(block, hidden)
    if len(own) != 1 or own[0].numel() != output.numel():
        return False
    total = without.float() + own[0].float().view_as(output)
    tolerance = 1e-4 if output.dtype == torch.float32 else 2e-2
    return bool((total - output.float()).norm() <= tolerance * output.float().norm())


class StopForwardError(Exception):
    """Ends a forward pass early."""


def _body(model: nn.Module, sites: list[Site]) -> nn.Module:
    """The model without its head where all sites lie below: logits of a whole batch are large and of no use here."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix) and all(site.path.startswith(prefix + ".") for site in sites):
        return getattr(model, prefix)  # type: ignore[no-any-return]
    return model


def inside(path: str, block: str) -> bool:
    """Whether the module at `path` lies in that block."""
    return path.startswith(block + ".")


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    """As long as a hook is there."""
    try:
        yield
    finally:
        handle.remove()


def _end(site: Site) -> str:
    """The module whose output is the layer's."""
    return site.down if site.identities else site.path


@contextmanager
def _capture(model: nn.Module, site: Site, into: _Seen) -> Iterator[None]:
    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        into.x.append(args[0].detach().flatten(0, -2))

    def leave(_: nn.Module, args: Any, y: Tensor) -> None:
        into.y.append(y.detach().flatten(0, -2).clone())  # some blocks add to it in place

    with (
        hooked(model.get_submodule(site.path).register_forward_pre_hook(enter)),
        hooked(model.get_submodule(_end(site)).register_forward_hook(leave)),
    ):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and no key-value cache: a block that is run again must not find its own past."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None)]  # T5's decoder has its own
    training = model.training
    model.eval()
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True
        model.train(training)
