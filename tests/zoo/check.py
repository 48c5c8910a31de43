"""Convert every feed-forward layer of one model with unit gates and full retrieval, save, load, compare."""

from __future__ import annotations

import dataclasses
import tempfile
import traceback
from typing import Any

import torch
import transformers
from build import NOT_EXPORTED, Built, auto_classes, build, first_line
from exact import exact_layer
from torch import nn

from peerify.conversion.feedforward import read_feedforward, replace
from peerify.discovery.sites import Site, find_feedforwards
from peerify.modeling.modeling_peer import FORMAT, adopt

TOLERANCE = 1e-5


@dataclasses.dataclass
class Result:
    """What became of one class of one type."""

    model_type: str
    class_name: str
    outcome: str
    """One of table.OUTCOMES."""
    reason: str = ""
    sites: int = 0
    not_convertible: dict[str, str] = dataclasses.field(default_factory=dict)
    error: float = 0.0
    layer_error: float = 0.0


def check_type(model_type: str, only: str | None = None) -> list[Result]:
    """One result per class that an Auto class builds for the type."""
    classes = auto_classes(model_type)
    if not classes:
        return [Result(model_type, "", "part", "no Auto class builds it: it is part of other models")]
    results = []
    for name, autos in classes.items():
        if only is not None and name != only:
            continue
        try:
            built = build(model_type, name, autos)
            result = check(model_type, built)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{first_line(error)} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
            result = Result(model_type, name, "defect", reason)
        if result.outcome == "defect" and not survives(build(model_type, name, autos)):
            result = Result(model_type, name, "unbuilt", "the dense model itself does not survive save and load")
        for seed in range(1, 6):
            if result.outcome != "defect" or steady(built):
                break
            built = build(model_type, name, autos, seed)
            result = check(model_type, built)
        results.append(result)
    return results


@torch.no_grad()
def survives(built: Built) -> bool:
    """Whether the dense model computes the same after save and load."""
    if built.model is None:
        return True
    before = built.outputs()
    try:
        with tempfile.TemporaryDirectory() as folder:
            built.model.save_pretrained(folder)
            loaded = type(built.model).from_pretrained(folder).eval()
        return worst_error(built.outputs(loaded), before) <= TOLERANCE
    except Exception:
        return False


@torch.no_grad()
def steady(built: Built) -> bool:
    """Whether the outputs of a fresh dense model stand a rounding error: those of a model that goes on with the best
    few of many things may not, where two of them are nearly equal."""
    fresh = build(built.model_type, built.class_name, built.autos, built.seed)
    if fresh.model is None:
        return True
    before = fresh.outputs()
    for module in fresh.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(1 + 1e-7 * torch.randn_like(module.weight))
    return worst_error(fresh.outputs(), before) <= TOLERANCE


@torch.no_grad()
def check(model_type: str, built: Built) -> Result:
    """Convert, save, load and compare one model."""
    model = built.model
    if model is None:
        if built.problem == NOT_EXPORTED:
            return Result(model_type, built.class_name, "part", built.problem)
        outcome = "missing" if built.problem.startswith("needs ") else "unbuilt"
        return Result(model_type, built.class_name, outcome, built.problem)
    result = Result(model_type, built.class_name, "defect")
    before = built.outputs()
    again = built.outputs()
    noise = worst_error(again, before)
    if noise > 1e-7:
        return dataclasses.replace(result, outcome="defect", reason=f"two runs of the dense model differ ({noise:.1e})")
    idle = built.idle()
    sites = all_sites(built)
    able = [site for site in sites if site.convertible]
    # Projectors and heads are no feed-forward layers, though they look like them but for their widths.
    result.not_convertible = {
        site.path: site.reason
        for site in sites
        if not site.convertible and not site.reason.endswith(("as in a projector", "as in a head"))
    }
    result.sites = len(able)
    if not able:
        outcome = "refused" if result.not_convertible else "none"
        return dataclasses.replace(result, outcome=outcome, reason=reasons(result) or what_instead(model, sites))
    own_type = type(model.config).model_type
    layers: dict[str, dict[str, Any]] = {}
    for site in able:
        layer, plan = exact_layer(read_feedforward(model, site), site)
        replace(model, site, layer)
        layers[site.path] = plan
    changed = worst_error(built.outputs(), before)
    if changed > TOLERANCE:
        return dataclasses.replace(result, outcome="defect", reason="differs in memory", error=changed)
    adopt(model, {"format": FORMAT, "layers": layers, "identities": [i for s in able for i in s.identities]})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # The class itself where no Auto class builds it from its own config (the text part of a larger model).
        known = auto_classes(own_type).get(built.class_name)
        loader = getattr(transformers, known[0]) if known else type(model)
        loaded = loader.from_pretrained(folder, trust_remote_code=False).eval()
    if type(loaded).__name__ != "Peer" + built.class_name:
        return dataclasses.replace(result, outcome="defect", reason=f"loads as {type(loaded).__name__}")
    result.error = max(changed, worst_error(built.outputs(loaded), before))
    if not sensitive(built, loaded, able, before):
        return dataclasses.replace(result, outcome="defect", reason="the comparison cannot fail: no layer shows")
    if result.error > TOLERANCE:
        return dataclasses.replace(result, reason="differs after save and load")
    if result.not_convertible:
        return dataclasses.replace(result, outcome="partly", reason=reasons(result))
    if not idle:
        return dataclasses.replace(result, outcome="exact")
    return dataclasses.replace(result, outcome="halfrun", reason=f"not run: {', '.join(idle)}")


def all_sites(built: Built) -> list[Site]:
    """The feed-forward layers of the model, and of the parts that are run on their own."""
    assert built.model is not None
    sites = [] if built.inputs is None else find_feedforwards(built.model, built.inputs)
    for path, inputs in built.parts.items():
        for site in find_feedforwards(built.model.get_submodule(path), inputs):
            sites.append(site.below(path))
    return sites


def reasons(result: Result) -> str:
    """Why some of its feed-forward layers stay dense."""
    return "; ".join(sorted(set(result.not_convertible.values())))


def worst_error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative error of any output; infinite if shapes differ."""
    if len(actual) != len(expected) or any(a.shape != e.shape for a, e in zip(actual, expected, strict=False)):
        return float("inf")
    errors = []
    for a, e in zip(actual, expected, strict=True):
        masked = e.abs() > 1e20  # logits of tokens that must not be generated
        a, e = a.masked_fill(masked, 0.0), e.masked_fill(masked, 0.0)
        errors.append(float((a - e).norm() / e.norm().clamp_min(1e-12)))
    return max(errors, default=0.0)


def sensitive(built: Built, model: nn.Module, sites: list[Site], before: list[torch.Tensor]) -> bool:
    """Whether the outputs change when the layers' experts do."""
    for site in sites:
        model.get_submodule(site.path).pool.v.data.mul_(-1.5)
    return worst_error(built.outputs(model), before) > 1e-3


def what_instead(model: nn.Module, sites: list[Site]) -> str:
    """What a model without a dense feed-forward layer has in its place."""
    names = {type(m).__name__.lower() for m in model.modules()}
    if any("expert" in n or "moe" in n for n in names):
        return "routed experts"
    if any(word in n for n in names for word in ("mamba", "rwkv", "ssm", "xlstm", "mlstm")):
        return "state space or recurrent blocks"
    if any(n.startswith("quant") for n in names):
        return "linear layers simulated in integers"
    if sites:
        return "projectors and heads only"
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    convolutions = sum(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in model.modules())
    return "convolutions" if convolutions > linears or not linears else "attention only"
