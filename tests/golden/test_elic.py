"""ELIC in both layouts against the implementations that they come from, at full size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import Tensor

from shared.codecs.elic import Elic, ElicConfig, Layout, from_published
from shared.codecs.interface import Pass

pytestmark = pytest.mark.golden


@pytest.mark.parametrize(("case", "layout"), [("comneck_elic", "chandelier"), ("elic2022_official", "official")])
def test_an_elic_computes_what_the_original_computes(case: str, layout: Layout, golden: Callable) -> None:
    recorded = golden(case)
    weights = from_published(recorded.weights())
    network = Elic(ElicConfig(layout=layout)).eval().requires_grad_(False)
    bottleneck, gaussian = EntropyBottleneck(192).eval(), GaussianConditional(None)
    unknown = bottleneck.load_state_dict(
        {
            name.removeprefix("bottleneck."): weights.pop(name)
            for name in list(weights)
            if name.startswith("bottleneck.")
        },
        strict=False,
    ).unexpected_keys
    assert not unknown
    network.load_state_dict(weights)
    y = network.g_a(recorded.input("image"))
    z = network.h_a(y)
    with torch.no_grad():
        z_hat, likelihood = bottleneck(z, training=False)
    bits_z = -likelihood.double().log2().sum()
    given = {name: torch.zeros_like(y) for name in ("means", "scales", "symbols")}

    def code(step: Pass) -> Tensor:
        symbols = (y[:, step.channels] - step.mean).round()
        for name, values in (("means", step.mean), ("scales", step.scale), ("symbols", symbols)):
            given[name][:, step.channels] += values * step.mask
        return symbols + step.mean

    y_hat = network.walk(z_hat, code)
    _, likelihood = gaussian(y, given["scales"], means=given["means"], training=False)
    outputs = {"y": y, "z": z, "z_hat": z_hat, "hyper": network.h_s(z_hat), "y_hat": y_hat, "x_hat": network.g_s(y_hat)}
    for name, values in outputs.items():
        recorded.check(name, values)
    recorded.check("means", given["means"])
    recorded.check("scales", given["scales"])
    np.testing.assert_array_equal(given["symbols"].numpy(), recorded.arrays["y_symbols"])
    assert float(bits_z) == pytest.approx(float(recorded.arrays["bits_z"]), rel=1e-4)
    assert float(-likelihood.double().log2().sum()) == pytest.approx(float(recorded.arrays["bits_y"]), rel=1e-4)
