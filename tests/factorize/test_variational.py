"""Ranks by variational Bayes, and whole networks compressed with them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from sparsecnn.factorize import (
    EVBMF,
    METHODS,
    ChannelSVD,
    LayerProblem,
    UnsupportedLayer,
    factorize_,
    kim,
)


def planted(t, s, k, r_t, r_s, noise, groups=1):
    """A convolution whose kernel has multilinear rank (r_t, r_s) under noise."""
    source = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64)

    conv = nn.Conv2d(groups * s, groups * t, k, padding=k // 2, groups=groups, bias=False)
    blocks = [
        torch.einsum("ta,sb,abij->tsij", randn(t, r_t), randn(s, r_s), randn(r_t, r_s, k, k))
        for _ in range(groups)
    ]
    with torch.no_grad():
        conv.weight.copy_(torch.cat(blocks) + noise * randn(groups * t, s, k, k))
    return conv


@pytest.mark.parametrize("groups", [1, 2])
def test_evbmf_finds_the_planted_ranks(groups):
    p = LayerProblem.of(planted(48, 40, 3, 6, 5, 0.5, groups))
    assert EVBMF().select(p, METHODS["tucker2"]()) == (6, 5)
    assert EVBMF().select(p, ChannelSVD()) == (6,)
    with pytest.raises(UnsupportedLayer, match="no matrix"):
        EVBMF().select(p, METHODS["cp"]())


def test_pure_noise_has_rank_one_and_a_warning():
    p = LayerProblem.of(planted(48, 40, 3, 1, 1, 1e3), name="conv")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("sparsecnn")
    log.addHandler(handler)
    try:
        assert EVBMF().select(p, METHODS["tucker2"]()) == (1, 1)
    finally:
        log.removeHandler(handler)
    (record,) = records
    assert "conv: nothing but noise, ranks (0, 0)" in record.getMessage()


def test_kim_touches_the_ends_by_one_side_only():
    torch.manual_seed(0)
    model = nn.Sequential(
        planted(32, 3, 3, 4, 3, 0.1), nn.ReLU(), planted(32, 32, 3, 6, 5, 0.1), nn.ReLU(),
        planted(48, 32, 3, 6, 5, 0.1), nn.ReLU(), planted(32, 48, 3, 6, 5, 0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.Linear(64, 10),
    )  # fmt: skip
    x = torch.randn(1, 3, 8, 8)
    config = kim(model, x)
    assert list(config) == ["0", "2", "4", "6", "9", "10"]
    report = factorize_(model, config, x, measure=False)
    assert [r.method for r in report] == ["channel_svd", *["tucker2"] * 3, "fc_svd", "fc_svd"]
    assert [report[n].ranks for n in "0246"] == [(4,), (6, 5), (6, 5), (6, 5)]
    assert len(model[0]) == 2 and len(model[2]) == 3 and len(model[10]) == 2
