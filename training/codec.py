"""Trains a codec for rate and distortion on photographs: the base codec that d1 keeps frozen.

loss = bits per pixel + lambda * 255^2 * MSE      (CompressAI's convention for lambda)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from compressai.models.base import get_scale_table
from torch import Tensor

from shared.codecs.elic import Elic, ElicConfig, is_derived
from shared.images import Preparation
from shared.options import option
from shared.weights.digest import save_tensors
from training.loop import Losses, Schedule, generator, train
from training.photos import pixel_cache, read_photo_set


@dataclass(frozen=True)
class CodecTraining:
    """``comneck train codec``: an ELIC for rate and distortion, resumable."""

    photos: Path = option("folder of photos, with an index.jsonl or without")
    out: Path = option("folder of the run: checkpoint, curve")
    cache: Path = option("folder for prepared photos, kept between runs")
    N: int = option("channels of the transforms", 96)
    M: int = option("channels of the latents y", 192)
    groups: tuple[int, ...] = option("channels of y per context group", (16, 16, 32, 64, 64))
    lmbda: float = option("weight of the distortion, in CompressAI's convention: higher is better and larger", 0.0024)
    steps: int = option("optimiser steps", 5000)
    batch: int = option("crops a step", 8)
    crop: int = option("side of a crop, in pixels", 128)
    rate: float = option("peak learning rate", 4e-4)
    seed: int = option("seed of crops and weights", 1)


def run(options: CodecTraining) -> None:
    entries = [entry for entry in read_photo_set(options.photos) if entry.split == "train"]
    pixels = pixel_cache(entries, Preparation(), options.cache)
    torch.manual_seed(options.seed)
    codec = Elic(ElicConfig(options.N, options.M, options.groups)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(codec.parameters(), lr=options.rate)

    def batches(step: int) -> Iterator[Tensor]:
        while True:
            yield random_crops(pixels, options.batch, options.crop, generator(options.seed, step))
            step += 1

    def losses(crops: Tensor, step: int) -> Losses:
        out = codec(crops)
        bpp = out["bits"].mean() / options.crop**2
        mse = (out["x_hat"].float() - crops).square().mean()
        return {"loss": bpp + options.lmbda * 255**2 * mse, "bpp": bpp, "psnr": -10 * mse.log10()}

    train(codec, optimizer, Schedule(options.steps), batches, losses, options.out)
    save_codec(codec, options.out / "codec.safetensors")


def save_codec(codec: Elic, path: Path) -> None:
    """Writes a trained codec as an artefact: weights in half precision, and its probability tables as data.

    The tables are made from the weights as stored, so that they fit what a reader will load.
    """
    weights = {name: value.half().float() for name, value in codec.state_dict().items() if not is_derived(name)}
    codec.load_state_dict(weights, strict=False)
    bottleneck, gaussian = codec.bottleneck, codec.gaussian
    medians = bottleneck.quantiles[:, :, 1].detach().clone()
    bottleneck._update_quantiles()  # how far the tables reach; the medians stay where training had them
    with torch.no_grad():
        bottleneck.quantiles[:, :, 1] = medians
    bottleneck.update(force=True)
    gaussian.update_scale_table(get_scale_table(), force=True)
    weights |= {name: value for name, value in codec.state_dict().items() if name.endswith("quantiles")}
    tables = {}
    for name, model in (("z", bottleneck), ("y", gaussian)):
        rows = zip(model.quantized_cdf, model.cdf_length.tolist(), strict=True)
        tables[f"tables.{name}.cdf"] = torch.cat([row[:length] for row, length in rows])
        tables[f"tables.{name}.lengths"] = model.cdf_length.clone()
        tables[f"tables.{name}.offsets"] = model.offset.clone()
    config = {"N": codec.config.N, "M": codec.config.M, "groups": list(codec.config.groups)}
    metadata = {"codec": "elic-chandelier", "config": json.dumps(config)}
    scales = {"tables.scales": gaussian.scale_table.half().float()}
    save_tensors(path, weights | tables | scales, metadata=metadata)


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
