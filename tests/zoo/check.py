"""Convert every feed-forward layer of one model with unit gates and full retrieval, save, load, compare."""

from __future__ import annotations

import dataclasses
import tempfile
import traceback
from typing import Any

import torch
import transformers
from build import Built, auto_classes, build, first_line, tensors
from torch import nn
from transformers import PreTrainedModel

from peerify.conversion import exact_layer
from peerify.feedforward import Site, find_feedforwards, read_feedforward, replace
from peerify.modeling_peer import FORMAT, adopt

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
        results.append(result)
    return results


@torch.no_grad()
def survives(built: Built) -> bool:
    """Whether the dense model computes the same after save and load."""
    if built.model is None:
        return True
    before = outputs(built.model, built.inputs)
    try:
        with tempfile.TemporaryDirectory() as folder:
            built.model.save_pretrained(folder)
            loaded = type(built.model).from_pretrained(folder).eval()
        return worst_error(outputs(loaded, built.inputs), before) <= TOLERANCE
    except Exception:
        return False


@torch.no_grad()
def check(model_type: str, built: Built) -> Result:
    """Convert, save, load and compare one model."""
    model = built.model
    if model is None:
        outcome = "missing" if built.problem.startswith("needs ") else "unbuilt"
        return Result(model_type, built.class_name, outcome, built.problem)
    result = Result(model_type, built.class_name, "defect")
    before = outputs(model, built.inputs)
    again = outputs(model, built.inputs)
    noise = worst_error(again, before)
    if noise > 1e-7:
        return dataclasses.replace(result, outcome="defect", reason=f"two runs of the dense model differ ({noise:.1e})")
    idle = idle_parts(model, built.inputs)
    sites = find_feedforwards(model, built.inputs)
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
    changed = worst_error(outputs(model, built.inputs), before)
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
    result.error = max(changed, worst_error(outputs(loaded, built.inputs), before))
    if not sensitive(loaded, able, built.inputs, before):
        return dataclasses.replace(result, outcome="defect", reason="the comparison cannot fail: no layer shows")
    if result.error > TOLERANCE:
        return dataclasses.replace(result, reason="differs after save and load")
    if result.not_convertible:
        return dataclasses.replace(result, outcome="partly", reason=reasons(result))
    if not idle:
        return dataclasses.replace(result, outcome="exact")
    return dataclasses.replace(result, outcome="halfrun", reason=f"not run: {', '.join(idle)}")


def idle_parts(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Models inside the model, such as a vision tower, of which the inputs run nothing: nothing is found in them."""
    ran: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda m, *_: ran.add(m)) for m in model.modules() if isinstance(m, nn.Linear)]
    outputs(model, inputs)
    for handle in handles:
        handle.remove()
    found: list[str] = []
    for name, part in model.named_modules():
        linears = [m for m in part.modules() if isinstance(m, nn.Linear)]
        inside = any(name.startswith(other + ".") for other in found)
        if isinstance(part, PreTrainedModel) and len(linears) > 1 and not inside and not ran & set(linears):
            found.append(name)
    return found


def reasons(result: Result) -> str:
    """Why some of its feed-forward layers stay dense."""
    return "; ".join(sorted(set(result.not_convertible.values())))


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that the model returns, with the random state at the same place each time."""
    torch.manual_seed(0)
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return [t.clone() for t in tensors(model(**copies))]


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


def sensitive(model: nn.Module, sites: list[Site], inputs: dict[str, Any], before: list[torch.Tensor]) -> bool:
    """Whether the outputs change when the layers' experts do."""
    for site in sites:
        model.get_submodule(site.path).pool.v.data.mul_(-1.5)
    return worst_error(outputs(model, inputs), before) > 1e-3


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
