"""A release as the authors publish it, rebuilt from formulas at full size, through ``comneck weights import``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR

from cloud_server.vision.neck import TransformNeck
from comneck.cli import main
from shared.bitstream import Bitstream
from shared.codecs.artefact import Artefact, read_artefact
from shared.codecs.codec import Codec
from shared.codecs.interface import Pass
from shared.images import Photo
from shared.weights.catalogue import catalogue
from shared.weights.digest import load_tensors
from shared.weights.store import Store

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def elic(golden) -> Any:
    return golden("comneck_elic")


@pytest.fixture(scope="module")
def neck(golden) -> Any:
    return golden("comneck_neck")


@pytest.fixture(scope="module")
def store(elic, neck, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A machine on which d1_2.pth.tar has been imported: all that a training run saves, under DataParallel's names."""
    folder = tmp_path_factory.mktemp("import")
    derived = {spec["name"]: torch.zeros(spec["shape"]) for spec in elic.case["excluded_tensors"]}
    weights = neck.weights()
    optimizer = Adam([torch.nn.Parameter(weights["class_embedding"])])
    contents = {
        "epoch": 59,
        "state_dict": {f"module.base_coder.{name}": value for name, value in (elic.weights() | derived).items()},
        "adapter": {f"module.{name}": value for name, value in weights.items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": MultiStepLR(optimizer, [20]).state_dict(),
    }
    torch.save(contents, folder / "d1_2.pth.tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMNECK_HOME", str(folder / "home"))
        catalogue.cache_clear()
        assert main(["weights", "import", str(folder / "d1_2.pth.tar")]) == 0
        yield Store()
    catalogue.cache_clear()


@pytest.fixture(scope="module")
def artefact(store: Store) -> Artefact:
    return read_artefact(store.path("comneck-codec-d1-2"))


@torch.inference_mode()
def test_an_imported_codec_computes_what_the_authors_compute(elic, artefact: Artefact) -> None:
    network = artefact.network
    y = network.g_a(elic.input("image"))
    z = network.h_a(y)
    medians = artefact.bottleneck["quantiles"][:, 0, 1, None, None]
    z_hat = (z - medians).round() + medians
    given = {name: torch.zeros_like(y) for name in ("means", "scales", "symbols")}

    def code(step: Pass) -> Tensor:
        symbols = (y[:, step.channels] - step.mean).round()
        for name, values in (("means", step.mean), ("scales", step.scale), ("symbols", symbols)):
            given[name][:, step.channels] += values * step.mask
        return symbols + step.mean

    y_hat = network.walk(z_hat, code)
    outputs = {"y": y, "z": z, "z_hat": z_hat, "y_hat": y_hat, "x_hat": network.g_s(y_hat)}
    outputs |= {"hyper": network.h_s(z_hat), "means": given["means"], "scales": given["scales"]}
    for name, values in outputs.items():
        elic.check(name, values)
    np.testing.assert_array_equal(given["symbols"].numpy(), elic.arrays["y_symbols"])


@torch.inference_mode()
def test_an_imported_neck_reproduces_the_authors_tokens(neck, store: Store) -> None:
    imported = TransformNeck(channels=320, grid=16, width=1024, heads=16).eval()
    imported.load_state_dict(load_tensors(store.path("comneck-neck-d1-2")))
    tokens = imported(neck.input("y_hat"))
    neck.check("tokens", tokens)
    neck.check("tokens_cls", tokens[:, 0])
    neck.check("tokens_last", tokens[:, -1])


@torch.inference_mode()
def test_an_imported_codecs_bitstreams_decode_to_the_authors_latents_at_their_rate(elic, store: Store) -> None:
    codec = Codec.load(store.path("comneck-codec-d1-2"))
    pixels = elic.input("image")
    y = codec.network.g_a(pixels)
    photo = Photo((255 * pixels[0].permute(1, 2, 0)).round().byte().numpy(), (192, 128))
    bitstream = codec.encode(photo, "d1", 2, y)
    y_hat = codec.decode(Bitstream.parse(bytes(bitstream))).y_hat
    assert (y_hat - y).abs().max() < 0.501, "what was decoded is what was quantised"
    # Means are integers in units of 1 / 128 of layers in 8 bits; where one falls beyond a half, y_hat is another value
    # that is as near to y.
    theirs = torch.from_numpy(elic.arrays["y_hat"])
    assert (y_hat - theirs).abs().mean() < 0.06
    assert (y_hat - y).abs().mean() < 1.01 * (theirs - y).abs().mean()
    bits = 8 * len(bytes(bitstream))
    assert bits == pytest.approx(float(elic.arrays["bits_y"]) + float(elic.arrays["bits_z"]), rel=0.03)


def test_an_imported_release_is_as_it_was_installed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "verify"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert {f"comneck-{kind}-d1-2 is as it was installed" for kind in ("codec", "neck")} <= {*said}
