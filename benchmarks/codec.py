"""Our encode and decode beside CompressAI's compress and decompress: the paper's ELIC, the same weights and photos.

python -m benchmarks.codec [--count 15] [--threads N] [--out docs/results/codec_speed.json]

    encode   pixels to the bytes of a file; CompressAI: compress
    decode   bytes to y_hat; CompressAI: decompress without g_s

Weights are random, since nobody's may be shipped, and set so that latents spread as a trained codec's do. Each photo
goes through all in turn, so that a slow moment of the machine is everyone's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from compressai.models import Elic2022Chandelier
from torch import Tensor

from benchmarks.server import sample_photo
from shared.codecs.artefact import read_artefact, write_artefact
from shared.codecs.codec import Codec
from shared.codecs.elic import Elic, ElicConfig, from_published
from shared.codecs.exact import KERNELS, proves_itself
from shared.images import Photo, Preparation, load_photo, prepare

SIZES = ((256, 256), (512, 768))  # height, width
PHOTOS = ("rocket.jpg", "chelsea.png", "coffee.png")  # what scikit-image's package carries
TARGETS = {"encode": 0.9, "decode": 0.67}
Task = Callable[[Photo], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photos = [load_photo(path) for path in map(sample_photo, PHOTOS)]
    theirs = spread(Elic2022Chandelier().eval(), prepare(photos[0], Preparation(*SIZES[0])))
    ours = as_ours(theirs)
    print(f"ELIC N=192 M=320, {options.threads} threads, kernel {ours[0].kernel.name}, {options.count} rounds each\n")
    print(f"{'':<34}{'median':>9}{'quartiles':>18}   ms {'of CompressAI':>18}{'target':>8}")
    figures: list[dict[str, Any]] = []
    for height, width in SIZES:
        prepared = [prepare(photo, Preparation(height, width)) for photo in photos]
        for action, tasks in (("encode", encoders(ours, theirs)), ("decode", decoders(ours, theirs, prepared))):
            times = measure(tasks, prepared, options.count)
            base = statistics.median(times["CompressAI"])
            for who, values in times.items():
                low, median, high = statistics.quantiles(values, n=4)
                target = f"{TARGETS[action]:.2f}" if who == f"comneck, {ours[0].kernel.name}" else ""
                print(
                    f"{width}x{height} {action:<8}{who:<18}{median:>9.1f}{low:>9.1f} to{high:>6.1f}"
                    f"{median / base:>20.2f}{target:>8}"
                )
                figures.append(
                    {"width": width, "height": height, "action": action, "who": who, "ms": median, "of": median / base}
                )
        size = statistics.mean(len(ours[0].encode(photo, "d1", 1)) for photo in prepared)
        print(f"{'':<8}{size:,.0f} B a photo, {8 * size / height / width:.2f} bpp\n")
    if options.out:
        options.out.write_text(json.dumps({"threads": options.threads, "figures": figures}, indent=2) + "\n")


def measure(tasks: dict[str, Task], photos: list[Photo], count: int) -> dict[str, list[float]]:
    """Milliseconds, a list for each task; tasks take turns."""
    times: dict[str, list[float]] = {who: [] for who in tasks}
    for turn in range(-2, count):
        photo = photos[turn % len(photos)]
        for who, task in tasks.items():
            start = perf_counter()
            task(photo)
            if turn >= 0:
                times[who].append(1000 * (perf_counter() - start))
    return times


def encoders(ours: list[Codec], theirs: Any) -> dict[str, Task]:
    def compress(photo: Photo) -> object:
        with torch.inference_mode():
            return theirs.compress(as_tensor(photo))

    tasks: dict[str, Task] = {"CompressAI": compress}
    for codec in ours:
        tasks[f"comneck, {codec.kernel.name}"] = lambda photo, codec=codec: bytes(codec.encode(photo, "d1", 1))
    return tasks


def decoders(ours: list[Codec], theirs: Any, photos: list[Photo]) -> dict[str, Task]:
    with torch.inference_mode():
        compressed = {id(photo): theirs.compress(as_tensor(photo)) for photo in photos}
    streams = {id(photo): ours[0].encode(photo, "d1", 1) for photo in photos}

    def decompress(photo: Photo) -> object:
        with torch.inference_mode():
            return theirs.latent_codec.decompress(**compressed[id(photo)])

    tasks: dict[str, Task] = {"CompressAI": decompress}
    for codec in ours:
        tasks[f"comneck, {codec.kernel.name}"] = lambda photo, codec=codec: codec.decode(streams[id(photo)])
    return tasks


@torch.no_grad()
def spread(model: Any, photo: Photo) -> Any:
    """Random weights under which each channel of y has a spread of its own, 0.006 to 0.6, that the model knows of."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(module.weight, a=1)
    wanted = torch.logspace(-2.2, -0.2, 320)[torch.randperm(320)]
    last = model.g_a[-2]
    for _ in range(5):  # the attention block after it mixes channels
        found = model.g_a(as_tensor(photo)).std((0, 2, 3))
        last.weight.mul_((wanted / found)[:, None, None, None])
        last.bias.mul_(wanted / found)
    start = 0
    y = model.g_a(as_tensor(photo))
    for group in model.latent_codec["y"].latent_codec.values():
        final = group.entropy_parameters[-1]
        size = len(final.bias) // 2
        final.weight.mul_(1e-3)
        final.bias[:size] = y[0, start : start + size].mean((1, 2))
        final.bias[size:] = y[0, start : start + size].std((1, 2))
        start += size
    model(as_tensor(photo))  # CompressAI's masked layers zero their weights in forward
    model.update(force=True)
    return model


def as_ours(theirs: Any) -> list[Codec]:
    """The same weights as our codec, once for each kernel that this machine has, the fastest first."""
    weights = from_published(theirs.state_dict())
    bottleneck = {
        name.removeprefix("bottleneck."): weights.pop(name) for name in list(weights) if name.startswith("bottleneck.")
    }
    network = Elic(ElicConfig())
    network.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codec.safetensors"
        write_artefact(path, network, bottleneck, {1: (torch.ones(320), torch.ones(320))}, storage="float32")
        best = Codec(read_artefact(path))
        kernels = [kernel for kernel in KERNELS if proves_itself(kernel, best.device) and kernel is not best.kernel]
        return [best, *(Codec(read_artefact(path), kernel=kernel) for kernel in kernels)]


def as_tensor(photo: Photo) -> Tensor:
    return torch.from_numpy(photo.pixels).permute(2, 0, 1)[None].float().contiguous() / 255


if __name__ == "__main__":
    main()
