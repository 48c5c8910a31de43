"""Layers are selected by number, range, path or word, and a selection that finds none says so."""

from __future__ import annotations

import pytest
from feedforward_layers import D_FF, D
from hypothesis import given
from hypothesis import strategies as st

from peerify.discovery.formula import Projection
from peerify.discovery.sites import Site, select_sites
from peerify.errors import ConversionError


def site(path: str, reason: str = "") -> Site:
    return Site(
        path=path,
        identities=(),
        up=Projection(path=f"{path}.up"),
        gate=None,
        down=f"{path}.down",
        kind="plain",
        d_model=D,
        d_ff=D_FF,
        activation="relu",
        parameters=2 * D * D_FF,
        convertible=not reason,
        reason=reason,
    )


SITES = [site(f"model.layers.{i}.mlp", "it is odd" if i == 3 else "") for i in range(12)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("middle", [6]),
        ("first-last", [0, 11]),
        ("0,4,9", [0, 4, 9]),
        ("9, 4 ,0,4", [0, 4, 9]),
        ("7-9", [7, 8, 9]),
        ("2,7-9,middle", [2, 6, 7, 8, 9]),
        ("model.layers.1.mlp", [1]),
        ("model.layers.1*", [1, 10, 11]),
        ("*.mlp", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_layers_are_selected(spec: str, expected: list[int]) -> None:
    assert select_sites(SITES, spec) == [SITES[i] for i in expected]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("12", "feed-forward layers 0-11"),
        ("0,99", "'99'.*feed-forward layers 0-11"),
        ("9-7", "'9-7'"),
        ("3", r"layer 3 \(model.layers.3.mlp\) cannot be converted: it is odd"),
        ("2-4", "it is odd"),
        ("model.layers.3.mlp", "it is odd"),
        ("encoder.*", "no feed-forward layer has that path.*'model.layers.0.mlp'"),
        ("-1", "no feed-forward layer has that path"),
        ("", "no feed-forward layer has that path"),
        ("1,,2", "no feed-forward layer has that path"),
        ("9" * 5000, "no feed-forward layer has that path"),
    ],
)
def test_wrong_layers_are_named(spec: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        select_sites(SITES, spec)


@pytest.mark.parametrize(("sites", "message"), [([], "routed experts"), ([SITES[3]], "it is odd")])
def test_a_model_without_convertible_layers_is_named(sites: list[Site], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        select_sites(sites, "all")


@given(chosen=st.sets(st.sampled_from([i for i in range(12) if i != 3]), min_size=1))
def test_selection_does_not_depend_on_how_it_is_written(chosen: set[int]) -> None:
    expected = [SITES[i] for i in sorted(chosen)]
    assert select_sites(SITES, ",".join(str(i) for i in chosen)) == expected
    assert select_sites(SITES, ",".join(SITES[i].path for i in chosen)) == expected
    assert select_sites(SITES, ",".join(f"{i}-{i}" for i in sorted(chosen, reverse=True))) == expected
