"""What exactness costs in bits, and what a file costs beyond them, at every quality.

python -m benchmarks.rate CODEC FOLDER [FOLDER ...] [--count 200] [--size 256 256] [--out docs/results/rate.json]

CODEC is one that can be trained on (codec.safetensors of a training run, or an imported one): its network in floating
point estimates bits from likelihoods, as papers do. Beside it: the bits under the means and scales that integers give,
and the bytes of real files. Photos are prepared to one size; ``--size 512 768`` suits Kodak's, the upright ones of
which are cut.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from torch import Tensor
from tqdm import tqdm

from benchmarks.exactness import pictures
from shared.codecs.artefact import read_artefact
from shared.codecs.codec import Analysis, Codec
from shared.codecs.exact import ONE
from shared.codecs.interface import SCALE_UNIT, ExactPass, Pass
from shared.images import Photo, Preparation, load_photo, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path, help="a codec artefact that can be trained on")
    parser.add_argument("folders", type=Path, nargs="+", help="folders of pictures, with an index.jsonl or without")
    parser.add_argument("--count", type=int, default=200, help="photos of each folder (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="(default: 256 256)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    artefact = read_artefact(options.codec)
    if not artefact.bottleneck:
        raise SystemExit(f"{options.codec} has no entropy path in floating point to compare with")
    codec = Codec(artefact)
    estimate = Estimate(codec, artefact.bottleneck)
    figures: list[dict[str, Any]] = []
    for folder in options.folders:
        photos = [prepare(load_photo(path), Preparation(*options.size)) for path in pictures(folder, options.count)]
        print(f"{folder.name}: {len(photos)} photos, {options.size[1]}x{options.size[0]}")
        print("quality   bpp   PSNR   file bytes   of estimated bits / 8 + 16   bits, integers / floats")
        for quality in codec.qualities:
            rows = [estimate.row(photo, quality) for photo in tqdm(photos, desc=f"quality {quality}", leave=False)]
            files, floats, integers, psnr = np.array(rows).mean(0)
            figures.append(
                {
                    "photos": f"{folder.name}, {len(photos)}",
                    "quality": quality,
                    "bpp": 8 * files / photos[0].height / photos[0].width,
                    "psnr": psnr,
                    "file bytes": files,
                    "estimated bytes": floats / 8,
                    "file over estimate + 16": files / (floats / 8 + 16),
                    "integers over floats": integers / floats,
                }
            )
            last = figures[-1]
            print(
                f"{quality:>7}{last['bpp']:>6.3f}{psnr:>7.2f}{files:>13,.0f}{last['file over estimate + 16']:>30.4f}"
                f"{last['integers over floats']:>26.4f}"
            )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


class Estimate:
    """Bits by likelihood, of the network in floating point and of the integers."""

    def __init__(self, codec: Codec, bottleneck: dict[str, Tensor]) -> None:
        self.codec = codec
        self.network: Any = codec.network
        self.bottleneck = EntropyBottleneck(codec.N).eval()
        self.bottleneck.load_state_dict(bottleneck, strict=False)
        self.gaussian = GaussianConditional(None).eval()

    @torch.inference_mode()
    def row(self, photo: Photo, quality: int) -> tuple[float, float, float, float]:
        """Bytes of the file, bits by floats, bits by integers, PSNR in dB."""
        y = self.codec.analyse(photo)
        stream = self.codec.encode(photo, "d1", quality, y)
        seen = self.codec.reconstruct(self.codec.decode(stream)).pixels.astype(np.float64)
        psnr = 10 * np.log10(255**2 / np.square(seen - photo.pixels).mean())
        analysis = self.codec.hyper(y, quality)
        z_hat, likelihood = self.bottleneck(analysis.z.contiguous(), training=False)
        z_bits = bits(likelihood)
        return len(stream), z_bits + self.floats(analysis, z_hat), z_bits + self.integers(analysis), psnr

    def floats(self, analysis: Analysis, z_hat: Tensor) -> float:
        total = 0.0

        def code(step: Pass) -> Tensor:
            nonlocal total
            y = analysis.y[:, step.channels]
            _, likelihood = self.gaussian(y, step.scale, means=step.mean, training=False)
            total += bits(likelihood[..., step.mask])
            return (y - step.mean).round() + step.mean

        self.network.walk(z_hat, code)
        return total

    def integers(self, analysis: Analysis) -> float:
        total = 0.0
        y = analysis.y.permute(0, 2, 3, 1).flatten(1, 2)
        z = (analysis.z.permute(0, 2, 3, 1) - self.codec.path.medians / ONE).round().int()

        def code(step: ExactPass) -> Tensor:
            nonlocal total
            target, mean = y[..., step.channels].index_select(1, step.at), step.mean / ONE
            _, likelihood = self.gaussian(target, step.scale * SCALE_UNIT, means=mean, training=False)
            total += bits(likelihood)
            return (target - mean).round().int()

        self.codec.path.walk(z, code)
        return total


def bits(likelihood: Tensor) -> float:
    return float(-likelihood.double().log2().sum())


if __name__ == "__main__":
    main()
