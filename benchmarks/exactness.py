"""One codec computed in every way that this machine offers: are all bytes, symbols and integers the same?

python -m benchmarks.exactness PHOTOS [--count 200] [--codec CODEC] [--out docs/results/exactness.json]

Photos are encoded once. Then, under every setting of {1 thread, all; oneDNN on, off; NCHW, channels-last; eager,
torch.compile; batch 1, 8}, with every kernel, and on a GPU with TF32 on and off where there is one, each stream is
decoded and the same latents are encoded again, and everything is compared with the first time.

Given a codec that can be trained on (codec.safetensors of a training run), the network in floating point walks the same
latents under the same settings, as any codec does that does not compute in integers: a photo whose tables differ in a
single place would have been decoded to noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared.bitstream import Bitstream
from shared.codecs.artefact import SCALES, read_artefact
from shared.codecs.codec import Analysis, Codec
from shared.codecs.exact import KERNELS, best_kernel, proves_itself
from shared.codecs.interface import Pass
from shared.errors import BadBitstream
from shared.images import Preparation, load_photo, prepare
from shared.weights.store import ensure
from training.photos import read_photo_set


@dataclass(frozen=True)
class Setting:
    """A way to compute."""

    threads: int
    onednn: bool
    channels_last: bool
    compiled: bool
    batch: int
    kernel: str = ""
    device: str = "cpu"
    tf32: bool = False

    def __str__(self) -> str:
        parts = [
            self.device + (" TF32" if self.tf32 else ""),
            f"{self.threads} thread{'s' if self.threads > 1 else ''}",
            f"oneDNN {'on' if self.onednn else 'off'}",
            "channels-last" if self.channels_last else "NCHW",
            "compiled" if self.compiled else "eager",
            f"batch {self.batch}",
        ]
        return ", ".join([*parts, f"kernel {self.kernel}"] if self.kernel else parts)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Sets PyTorch so, and back."""
        before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        best_kernel.cache_clear()
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
        try:
            with torch.backends.mkldnn.flags(enabled=self.onednn), torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before[0])
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]
            best_kernel.cache_clear()


def settings(threads: int) -> list[Setting]:
    """The first is the one that all are compared with."""
    ways = [Setting(*way) for way in product((threads, 1), (True, False), (True, False), (False, True), (1, 8))]
    ways += [
        Setting(threads, True, True, False, batch, kernel.name)
        for kernel in KERNELS
        if proves_itself(kernel, torch.device("cpu"))
        for batch in (1, 8)
    ]
    if torch.cuda.is_available():
        ways += [
            Setting(threads, True, True, compiled, batch, device="cuda", tf32=tf32)
            for compiled, batch, tf32 in product((False, True), (1, 8), (False, True))
        ]
    return ways


@dataclass(frozen=True)
class Case:
    """One photo: its latents as the first machine had them, and the stream made of them."""

    analysis: Analysis
    stream: Bitstream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of pictures, with an index.jsonl or without")
    parser.add_argument("--count", type=int, default=200, help="photos (default: %(default)s)")
    parser.add_argument("--codec", type=Path, help="a codec artefact (default: the shipped one)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    path = options.codec or ensure("small-codec")
    codec = Codec.load(path)
    cases = list(encode(codec, options.photos, options.count))
    ways = settings(os.cpu_count() or 1)
    figures: dict[str, Any] = {"photos": len(cases), "codec": codec.digest[:8], "exact": [], "floating point": []}
    print(f"{len(cases)} photos, codec {codec.digest[:8]}; photos that differ from the first setting\n")
    first: list[str] | None = None
    for way in ways:
        seen = exact(path, way, cases)
        first = first or seen
        differ = sum(one != other for one, other in zip(seen, first, strict=True))
        figures["exact"].append({**asdict(way), "differ": differ})
        print(f"{differ:>5}  integers        {way}", flush=True)
    if not read_artefact(path).bottleneck:
        print("\nno comparison with floating point: this codec has no trained entropy path; give --codec")
    else:
        tables: list[list[str]] = []
        for way in (way for way in ways if not way.kernel and not way.compiled):
            tables.append(floating(path, way, cases))
            differ = sum(one != other for one, other in zip(tables[-1], tables[0], strict=True))
            figures["floating point"].append({**asdict(way), "differ": differ})
            print(f"{differ:>5}  floating point  {way}", flush=True)
        ever = sum(len(set(photo)) > 1 for photo in zip(*tables, strict=True))
        figures["floating point: photos that any setting would have broken"] = ever
        print(f"\n{ever} of {len(cases)} photos would have been decoded to noise by some other setting")
    total = sum(row["differ"] for row in figures["exact"])
    print(f"\n{total} mismatches of integers in {len(cases)} photos x {len(ways)} settings, decoded and encoded")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    raise SystemExit(total > 0)


def encode(codec: Codec, folder: Path, count: int) -> Iterator[Case]:
    """Photos at the codec's qualities in turn."""
    for i, path in enumerate(tqdm(pictures(folder, count), desc="encode", unit="photo")):
        photo = prepare(load_photo(path), Preparation())
        quality = codec.qualities[i % len(codec.qualities)]
        y = codec.analyse(photo)
        yield Case(codec.hyper(y, quality), codec.encode(photo, "d1", quality, y))


def pictures(folder: Path, count: int) -> list[Path]:
    """So many pictures, or all where there are fewer, spread over a photo set: of its test split where it has one."""
    entries = read_photo_set(folder)
    chosen = [entry for entry in entries if entry.split == "test"] or entries
    return [entry.path for entry in chosen[:: max(1, len(chosen) // count)][:count]]


def exact(path: Path, way: Setting, cases: list[Case]) -> list[str]:
    """A hash for each photo, over bytes written, y_hat, and every mean and scale of both ways."""
    with way.on():
        named = {kernel.name: kernel for kernel in KERNELS}
        codec = Codec(read_artefact(path), way.device, named.get(way.kernel))
        hashes = Hashes()
        codec.path.walk = hashes.watch(torch.compile(codec.path.walk) if way.compiled else codec.path.walk)
        for some in progress(way, cases):
            hashes.begin(len(some))
            for i, coded in enumerate(codec.write(latents(way, some))):
                hashes.add(i, coded.payload)
            try:
                for i, latent in enumerate(codec.decode_all([case.stream for case in some])):
                    hashes.add(i, latent.y_hat)
            except BadBitstream:  # noise, noticed
                for i in range(len(some)):
                    hashes.add(i, b"refused")
            hashes.end()
    return hashes.done


@torch.no_grad()
def floating(path: Path, way: Setting, cases: list[Case]) -> list[str]:
    """A hash for each photo, over the table of every symbol, as the trained network computes them."""
    with way.on():
        artefact = read_artefact(path)
        network: Any = artefact.network
        network.to(way.device, memory_format=torch.channels_last if way.channels_last else torch.contiguous_format)
        walk = torch.compile(network.walk) if way.compiled else network.walk
        medians = artefact.bottleneck["quantiles"][:, 0, 1, None, None].to(way.device)
        edges = torch.from_numpy(np.sqrt(SCALES[:-1] * SCALES[1:])).float().to(way.device)
        hashes = Hashes()
        for some in progress(way, cases):
            hashes.begin(len(some))
            analysis = latents(way, some)

            @torch.compiler.disable
            def code(step: Pass, y: Tensor = analysis.y) -> Tensor:
                symbols = (y[:, step.channels] - step.mean).round()
                tables = torch.bucketize(step.scale.contiguous(), edges)
                for i in range(len(tables)):
                    hashes.add(i, tables[i][:, step.mask], symbols[i][:, step.mask])
                return symbols + step.mean

            walk((analysis.z - medians).round() + medians, code)
            hashes.end()
    return hashes.done


class Hashes:
    """A hash for each photo, batch after batch."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._open: list[Any] = []

    def begin(self, count: int) -> None:
        self._open = [hashlib.sha256() for _ in range(count)]

    def add(self, photo: int, *values: Tensor | bytes) -> None:
        for value in values:
            data = value if isinstance(value, bytes) else value.cpu().contiguous().numpy().tobytes()
            self._open[photo].update(data)

    def end(self) -> None:
        self.done += [each.hexdigest() for each in self._open]

    def watch(self, walk: Any) -> Any:
        """The walk, whose means and scales are added to the hashes."""

        def watched(z: Tensor, code: Any) -> Tensor:
            @torch.compiler.disable  # the entropy coder is no tensor program
            def and_code(step: Any) -> Tensor:
                for i in range(len(z)):
                    self.add(i, step.mean[i], step.scale[i])
                return code(step)

            return walk(z, and_code)

        return watched


def latents(way: Setting, cases: list[Case]) -> Analysis:
    """One batch of what was encoded, in the setting's layout."""
    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    y, z = (torch.cat([getattr(case.analysis, name) for case in cases]).to(way.device) for name in ("y", "z"))
    return Analysis(y.contiguous(memory_format=layout), z.contiguous(memory_format=layout))


def progress(way: Setting, cases: list[Case]) -> Iterator[list[Case]]:
    bar = tqdm(total=len(cases), desc=str(way), unit="photo", leave=False)
    for start in range(0, len(cases), way.batch):
        yield cases[start : start + way.batch]
        bar.update(way.batch)
    bar.close()


if __name__ == "__main__":
    main()
