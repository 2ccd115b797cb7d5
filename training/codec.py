"""Trains a codec for rate and distortion on photographs: the base codec that d1 keeps frozen.

loss = bits per pixel + lambda * 255^2 * MSE      (CompressAI's convention for lambda)

One network serves several qualities, a lambda each: y is multiplied by a gain for each quality and channel before it is
coded, and y_hat by another after (asymmetric gains of Cui et al., CVPR 2021). Every batch has photos of every quality.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.ops import quantize_ste
from torch import Tensor, nn

from shared.codecs.artefact import read_artefact, write_artefact
from shared.codecs.elic import Elic, ElicConfig
from shared.codecs.interface import Network, Pass
from shared.errors import BadInput
from shared.images import Preparation
from shared.options import option
from training.loop import Losses, Schedule, generator, train
from training.photos import pixel_cache, read_photo_set


@dataclass(frozen=True)
class CodecTraining:
    """``comneck train codec``: an ELIC for rate and distortion at several qualities, resumable."""

    photos: Path = option("folder of photos, with an index.jsonl or without")
    out: Path = option("folder of the run: checkpoint, curve")
    cache: Path = option("folder for prepared photos, kept between runs")
    start: Path | None = option("a trainable codec to start from, of an earlier run or imported", None)
    keep_g_a: bool = option("leave g_a as it was at the start, so that necks trained on it stay good", False)
    N: int = option("channels of the transforms", 96)
    M: int = option("channels of the latents y", 192)
    groups: tuple[int, ...] = option("channels of y per context group", (16, 16, 32, 64, 64))
    lmbdas: tuple[float, ...] = option(
        "weight of the distortion for quality 1, 2, ..., in CompressAI's convention", (0.0003, 0.0008, 0.0022, 0.006)
    )
    steps: int = option("optimiser steps", 6000)
    batch: int = option("crops a step, a multiple of the number of qualities", 8)
    crop: int = option("side of a crop, in pixels", 128)
    rate: float = option("peak learning rate; of the gains, eight times that", 2.5e-4)
    seed: int = option("seed of crops and weights", 1)


class TrainedCodec(nn.Module):
    """A codec with everything that is trained: network, probability model of z, gains.

    Args:
        lmbdas: one for each quality; where a network starts fresh, the gains start from their ratios.
    """

    lmbdas: Tensor

    def __init__(self, network: Network, lmbdas: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.bottleneck = EntropyBottleneck(network.N)
        self.gaussian = GaussianConditional(None)
        self.register_buffer("lmbdas", torch.tensor(lmbdas), persistent=False)
        usual = self.lmbdas[len(lmbdas) // 2]
        gains = (self.lmbdas / usual).pow(0.4)[:, None].repeat(1, network.M)
        self.log_gains = nn.Parameter(gains.log())
        self.log_inverse_gains = nn.Parameter(-gains.log())

    def forward(self, pixels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Reconstruction and estimated bits, differentiable.

        Rounding is straight through where a value is used and uniform noise where its bits are estimated.

        Args:
            pixels: (B, 3, H, W) in 0..1.
            rows: (B,) which quality each photo is coded at, from 0.

        Returns:
            ``x_hat`` (B, 3, H, W), ``y_hat`` (B, M, H/16, W/16), ``bits`` (B,) estimated from the likelihoods.
        """
        y = self.network.g_a(pixels).float()
        y_hat, bits = self.quantise(y * self.log_gains[rows].exp()[:, :, None, None])
        y_hat = y_hat * self.log_inverse_gains[rows].exp()[:, :, None, None]
        return {"x_hat": self.network.g_s(y_hat), "y_hat": y_hat, "bits": bits}

    def quantise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, M, h, w), gained -> y_hat (B, M, h, w) as a decoder would get it, and its estimated bits (B,)."""
        z = self.network.h_a(y).float()
        medians = self.bottleneck.quantiles[:, 0, 1, None, None]
        _, likelihood = self.bottleneck(z)
        bits = -likelihood.log2().sum((1, 2, 3))

        def code(step: Pass) -> Tensor:
            nonlocal bits
            target, mean, scale = y[:, step.channels], step.mean.float(), step.scale.float()
            _, likelihood = self.gaussian(target, scale, mean)
            bits = bits - (likelihood.log2() * step.mask).sum((1, 2, 3))
            return quantize_ste(target - mean) + mean

        return self.network.walk(quantize_ste(z - medians) + medians, code), bits


def run(options: CodecTraining) -> None:
    if not options.lmbdas or options.batch % len(options.lmbdas):
        raise BadInput(f"a batch of {options.batch} crops does not divide among {len(options.lmbdas)} qualities")
    entries = [entry for entry in read_photo_set(options.photos) if entry.split == "train"]
    pixels = pixel_cache(entries, Preparation(), options.cache)
    torch.manual_seed(options.seed)
    codec = start_codec(options).to(memory_format=torch.channels_last)
    gains = [codec.log_gains, codec.log_inverse_gains]
    if options.keep_g_a:
        codec.network.g_a.requires_grad_(False)
    others = [each for name, each in codec.named_parameters() if each.requires_grad and not name.startswith("log_")]
    optimizer = torch.optim.Adam(
        [{"params": others, "lr": options.rate}, {"params": gains, "lr": 8 * options.rate}], lr=options.rate
    )
    rows = torch.arange(options.batch) % len(options.lmbdas)

    def batches(step: int) -> Iterator[Tensor]:
        while True:
            yield random_crops(pixels, options.batch, options.crop, generator(options.seed, step))
            step += 1

    def losses(crops: Tensor, step: int) -> Losses:
        out = codec(crops, rows)
        bpp = out["bits"] / options.crop**2
        mse = (out["x_hat"].float() - crops).square().mean((1, 2, 3))
        # Costs grow about as lambda's square root: divided by it, every quality has its say.
        loss = ((bpp + codec.lmbdas[rows] * 255**2 * mse) / codec.lmbdas[rows].sqrt()).mean()
        values = {"loss": loss}
        for row in range(len(options.lmbdas)):
            values[f"bpp{row + 1}"] = bpp[rows == row].mean()
            values[f"psnr{row + 1}"] = -10 * mse[rows == row].mean().log10()
        return values

    train(codec, optimizer, Schedule(options.steps), batches, losses, options.out)
    save_codec(codec, options.out / "codec.safetensors")


def start_codec(options: CodecTraining) -> TrainedCodec:
    """A fresh codec, or the one to go on from with gains that start level."""
    if options.start is None:
        return TrainedCodec(Elic(ElicConfig(options.N, options.M, options.groups)), options.lmbdas)
    artefact = read_artefact(options.start)
    if not artefact.bottleneck:
        raise BadInput(
            f"{options.start} has no entropy path to train on; start from a training run's codec.safetensors"
        )
    codec = TrainedCodec(artefact.network.requires_grad_(True), options.lmbdas)
    codec.bottleneck.load_state_dict(artefact.bottleneck, strict=False)
    if len(artefact.gains) == len(options.lmbdas):
        with torch.no_grad():
            codec.log_gains.copy_(artefact.gains.log())
            codec.log_inverse_gains.copy_(artefact.inverse_gains.log())
    return codec


def save_codec(codec: TrainedCodec, path: Path, trainable: bool = True) -> None:
    """Writes a trained codec as an artefact, in half precision; ``trainable``: training can go on from it."""
    gains = zip(codec.log_gains.detach().exp(), codec.log_inverse_gains.detach().exp(), strict=True)
    bottleneck = codec.bottleneck.state_dict()
    write_artefact(path, codec.network, bottleneck, dict(enumerate(gains, start=1)), trainable=trainable)


def random_crops(pixels: npt.NDArray[np.uint8], count: int, side: int, source: torch.Generator) -> Tensor:
    """``count`` random square crops, half of them mirrored: (count, 3, side, side) in 0..1, channels last."""
    which, top, left, mirrored = (
        torch.randint(bound, (count,), generator=source).tolist()
        for bound in (len(pixels), pixels.shape[1] - side + 1, pixels.shape[2] - side + 1, 2)
    )
    crops = np.stack(
        [
            pixels[i, y : y + side, x : x + side][:, :: -1 if flip else 1]
            for i, y, x, flip in zip(which, top, left, mirrored, strict=True)
        ]
    )
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
