"""Configs as TOML and JSON."""

from __future__ import annotations

import json

import pytest

from sparsecnn.factorize import (
    CP,
    EVBMF,
    METHODS,
    VH,
    ChannelSVD,
    Energy,
    Factorize,
    Fixed,
    Latency,
    ParamRatio,
    PCAEnergyGlobal,
    Ratio,
    Sensitivity,
    TargetSpeedup,
    config_from_dict,
    config_to_dict,
)

from ..toml import to_toml


def assert_round_trip(config):
    data = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(data))) == config
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    assert config_from_dict(tomllib.loads(to_toml(data))) == config


POLICIES = [
    3, (4, 8), Fixed(3), Fixed((4, 8)), Ratio(0.5), Energy(0.9), TargetSpeedup(2.5), ParamRatio(3),
    EVBMF(), Latency(1.5, multiple_of=16), PCAEnergyGlobal(2.0),
]  # fmt: skip


@pytest.mark.parametrize("rank", POLICIES, ids=repr)
def test_round_trip_of_every_policy(rank):
    config = Factorize("tucker2", rank, objective="params", min_gain=1.5, multiple_of=4)
    assert_round_trip(config)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_round_trip_of_every_method(name):
    for method in (name, METHODS[name]()):
        assert_round_trip(Factorize(method, 2))


def test_options_and_layers():
    config = {
        "conv1": None,
        "re:layer[12]\\..*": Factorize(VH(order="hv"), Latency(2.0)),
        "method": Factorize(CP(modes=3, solver="nls"), 7),
        "_default": Factorize(ChannelSVD(metric="cov"), Ratio(0.25)),
    }
    data = config_to_dict(config)
    assert data["conv1"] == "dense"
    assert data["method"]["method"] == {"name": "cp", "modes": 3, "solver": "nls"}
    assert_round_trip(config)
    assert config_from_dict({"fc": None, "_default": {"method": "vh", "rank": 2}}) == {
        "fc": None, "_default": Factorize("vh", 2),
    }  # fmt: skip
    short = {"method": {"name": "vh"}, "rank": {"policy": "Latency"}}
    assert config_from_dict(short) == Factorize(VH(), Latency())


class Own(VH):
    """Not registered."""

    name = "own"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: config_to_dict(3), TypeError, "config a Factorize or a mapping .*, got 3"),
        (lambda: config_to_dict({"a": 3}), TypeError, "config a Factorize or a mapping"),
        (lambda: config_to_dict(Factorize(Own(), 3)), ValueError, "register_method makes it known"),
        (lambda: config_to_dict(Factorize("cp", Sensitivity(3, len))), ValueError,
         "expected rank one of EVBMF, .*, got Sensitivity"),
        (lambda: config_from_dict("vh"), TypeError, "expected a mapping, got 'vh'"),
        (lambda: config_from_dict({"rank": 3}), ValueError, r"expected a method, got \['rank'\]"),
        (lambda: config_from_dict({"method": "vh"}), ValueError, "expected a rank"),
        (lambda: config_from_dict({"method": 3, "rank": 3}), TypeError, "method a name, got 3"),
        (lambda: config_from_dict({"method": {"order": "hv"}, "rank": 3}), TypeError,
         "method a name, got None"),
        (lambda: config_from_dict({"method": "vv", "rank": 3}), ValueError, "method one of"),
        (lambda: config_from_dict({"method": {"name": "vh", "side": "in"}, "rank": 3}), ValueError,
         "vh: expected fields order, got side"),
        (lambda: config_from_dict({"method": {"name": "vh", "order": "x"}, "rank": 3}), ValueError,
         "expected order 'vh' or 'hv', got 'x'"),
        (lambda: config_from_dict({"method": "vh", "rank": 3, "ranks": 4}), ValueError,
         "expected fields method, min_gain, multiple_of, objective, rank, got ranks"),
        (lambda: config_from_dict({"method": "vh", "rank": {"policy": "All"}}), ValueError,
         "expected policy one of EVBMF, .*, got 'All'"),
        (lambda: config_from_dict({"method": "vh", "rank": {"policy": "Ratio", "r": 1}}),
         ValueError, "Ratio: expected fields q, got r"),
        (lambda: config_from_dict({"method": "vh", "rank": {"policy": "Ratio", "q": 2}}),
         ValueError, r"expected q in \(0, 1\], got 2"),
        (lambda: config_from_dict({"method": "vh", "rank": [2.5]}), TypeError, "rank an integer"),
    ],
)  # fmt: skip
def test_wrong_values(call, error, message):
    with pytest.raises(error, match=message):
        call()
