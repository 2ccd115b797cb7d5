"""A codec of a few channels with random weights, decoded in milliseconds: for tests and for fuzzing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck

from shared.codecs.artefact import write_artefact
from shared.codecs.elic import Elic, ElicConfig, Layout
from shared.images import Photo

GAINS = {1: 1.0, 3: 4.0, 15: 80.0}  # by quality; under the last, latents outgrow what wide layers read


def write_tiny_codec(path: Path, layout: Layout = "chandelier") -> None:
    """Writes its artefact. Weights are such that scales are of many sizes and many symbols escape their tables."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        elic = Elic(ElicConfig(N=4, M=16, groups=(2, 2, 4, 4, 4), layout=layout))
        bottleneck = EntropyBottleneck(elic.N)
        with torch.no_grad():
            elic.g_a[-2].weight.mul_(3)
            elic.h_a[-1].weight.mul_(5)
            for aggregation in elic.aggregation:
                aggregation[-1].weight.mul_(6)
            bottleneck.quantiles[:, 0, 1].normal_()
        qualities = {quality: (torch.rand(elic.M) * gain, torch.rand(elic.M) / gain) for quality, gain in GAINS.items()}
        write_artefact(path, elic, bottleneck.state_dict(), qualities)


def noise(height: int, width: int, seed: int = 0) -> Photo:
    """A picture of nothing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Photo(pixels, (width, height))
