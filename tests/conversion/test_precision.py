"""Conversions whose products run in bfloat16 come as near to the dense layers as those in float32."""

from __future__ import annotations

import pytest
import torch
from test_conversion import data_for, layer_problem
from tiny import FAMILIES, inputs_for, logits, relative_error

from peerify.config.peer import PeerConfig
from peerify.conversion import precision
from peerify.conversion.layer import convert_layer
from peerify.conversion.model import convert
from peerify.conversion.precision import fast_products, product_dtype


@pytest.fixture
def half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that gains by them, for products of any size."""
    monkeypatch.setattr(precision, "SMALLEST", 0)
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: True)


def test_small_and_other_types_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: True)
    assert product_dtype(torch.empty(512, 512)) == torch.bfloat16
    assert product_dtype(torch.empty(511, 512)) == torch.float32
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert product_dtype(torch.empty(512, 512, dtype=dtype)) == dtype
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda _: False)
    assert product_dtype(torch.empty(512, 512)) == torch.float32


@pytest.mark.usefixtures("half_products")
def test_products_are_in_bfloat16() -> None:
    x = torch.randn(8, 8)
    with fast_products(x):
        assert (x @ x).dtype == torch.bfloat16
    with fast_products(x.double()):
        assert (x.double() @ x.double()).dtype == torch.float64


@pytest.mark.parametrize(("gated", "gates"), [(True, "unit"), (False, "unit"), (True, "softmax"), (False, "sigmoid")])
def test_a_layer_loses_nothing(gated: bool, gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On average: clusters tip at a rounding, so that a single layer's error may differ by 6 %."""
    config = PeerConfig(active=0.4, keys="product", gates=gates)
    ratios = []
    for _ in range(8):
        ff, data = layer_problem(gated)
        errors = []
        for half in (False, True):
            with monkeypatch.context() as patch:
                if half:
                    patch.setattr(precision, "SMALLEST", 0)
                    patch.setattr(precision, "has_fast_bfloat16", lambda _: True)
                layer, _, error = convert_layer(ff, data, config)
            assert all(parameter.dtype == torch.float32 for parameter in layer.parameters())
            assert data.converted_td is not None
            assert data.converted_td.dtype == torch.float32
            assert error == pytest.approx(relative_error(layer(data.x_td), data.y_td) ** 2, rel=0.01)
            errors.append(error)
        ratios.append(errors[1] / errors[0])
    assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("keys", ["copies", "product"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs(family: str, keys: str, seed: int, request: pytest.FixtureRequest) -> None:
    """Blocks under autocast, and streams made of them. Equal shares: measured ones are decided by small differences."""
    errors = []
    for half in (False, True):
        if half:
            request.getfixturevalue("half_products")
        torch.manual_seed(seed)
        model = FAMILIES[family](seed=seed)
        inputs = inputs_for(model, seed=seed + 1)
        expected = logits(model, inputs)
        # At more, layers with ReLU whose zeros copies know are whole.
        active = 0.4 if keys == "copies" else 0.8
        config = PeerConfig(active=active, keys=keys, allocation="uniform")  # type: ignore[arg-type]
        conversion = convert(model, config, data_for(model))
        model.set_active(active, prefill="budget")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        errors.append(relative_error(logits(conversion.model, inputs), expected))
    assert errors[0] > 1e-6, "something is left out"
    assert errors[1] < 1.5 * errors[0] + 0.02
