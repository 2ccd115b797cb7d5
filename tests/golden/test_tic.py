"""TIC's transforms against the outputs of TransTIC's own, and its bitstream against their estimate of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import Tensor

from shared.bitstream import Bitstream
from shared.codecs.artefact import write_artefact
from shared.codecs.codec import Codec
from shared.codecs.tic import Tic, TicConfig, from_published
from shared.images import Photo

pytestmark = pytest.mark.golden


@pytest.fixture
def case(golden):
    return golden("tic_hp")


@pytest.fixture
def tic(case) -> Tic:
    tensors = from_published(case.weights())
    tic = Tic(TicConfig()).eval()
    tic.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("bottleneck.")})
    return tic


@pytest.fixture
def bottleneck(case) -> EntropyBottleneck:
    tensors = {
        name.removeprefix("bottleneck."): tensor
        for name, tensor in from_published(case.weights()).items()
        if name.startswith("bottleneck.")
    }
    bottleneck = EntropyBottleneck(128).eval()
    assert tensors.keys() == dict(bottleneck.named_parameters()).keys()
    bottleneck.load_state_dict(tensors, strict=False)
    return bottleneck


@torch.inference_mode()
def test_tic_reproduces_the_originals_latents_symbols_bits_and_picture(case, tic: Tic, bottleneck) -> None:
    y = tic.g_a(case.input("image"))
    z = tic.h_a(y)
    z_hat, z_likelihood = bottleneck(z)
    mean, scale = tic.h_s(z_hat)
    y_hat, y_likelihood = GaussianConditional(None).eval()(y, scale, mean)
    case.check("y", y)
    case.check("z", z)
    case.check("z_hat", z_hat)
    case.check("means", mean)
    case.check("scales", scale)
    np.testing.assert_array_equal((y - mean).round().numpy(), case.arrays["y_symbols"])
    case.check("y_hat", y_hat)
    case.check("x_hat", tic.g_s(y_hat))
    assert bits(y_likelihood) == pytest.approx(float(case.arrays["bits_y"]), rel=1e-6)
    assert bits(z_likelihood) == pytest.approx(float(case.arrays["bits_z"]), rel=1e-6)


@torch.inference_mode()
def test_tic_reproduces_the_originals_latents_of_a_picture_twice_as_wide(case, tic: Tic) -> None:
    y = tic.g_a(case.input("image_rect"))
    case.check("y_rect", y)
    case.check("z_rect", tic.h_a(y))


@torch.inference_mode()
def test_an_artefact_of_tic_decodes_its_own_stream_which_is_as_large_as_the_original_estimates(
    case, tic: Tic, bottleneck, tmp_path: Path
) -> None:
    path = tmp_path / "tic.safetensors"
    ones = torch.ones(tic.M)
    write_artefact(path, tic, bottleneck.state_dict(), {1: (ones, ones)}, storage="float32")
    codec = Codec.load(path)
    y = codec.network.g_a(case.input("image"))
    bitstream = codec.encode(Photo(np.zeros((256, 256, 3), np.uint8), (256, 256)), "d1", 1, y)
    y_hat = codec.decode(Bitstream.parse(bytes(bitstream))).y_hat
    assert (y_hat - y).abs().max() <= 0.5 + 1e-4
    # The estimate knows neither of integers nor of tables.
    estimate = float(case.arrays["bits_y"]) + float(case.arrays["bits_z"])
    assert 8 * len(bitstream.payload) == pytest.approx(estimate, rel=0.01)
    (spec,) = (spec for spec in case.case["outputs"] if spec["name"] == "y_hat")
    near = np.abs(y_hat.numpy().reshape(-1)[:: spec["stride"]] - case.arrays["y_hat"].reshape(-1)) < 0.05
    assert near.mean() > 0.99  # the others are symbols that were as near to one integer as to the next


def test_tic_has_the_originals_number_of_parameters() -> None:
    modules = (Tic(TicConfig()), EntropyBottleneck(128))
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == 7_510_723


def bits(likelihood: Tensor) -> float:
    return -float(likelihood.double().log2().sum())
