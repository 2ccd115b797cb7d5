"""Features computed once and kept on disk: what CLIP sees in each photo, and what the codec sends of it.

Both are the slow part of training on a small machine, and neither changes while a neck or a connector is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from cloud_server.vision.clip import ClipTower
from shared.codecs.codec import LATENT_STRIDE, Codec

Half = npt.NDArray[np.float16]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TeacherFeatures:
    """CLIP's tokens for every photo, (photos, 1 + patches, D) half precision, memory-mapped.

    Attributes:
        entry: what enters the block that the neck feeds.
        penultimate, last: what the last two blocks give.
    """

    entry: Half
    penultimate: Half
    last: Half


def teacher_features(tower: ClipTower, pixels: Pixels, key: str, cache: Path, batch: int = 16) -> TeacherFeatures:
    """CLIP's features of ``pixels`` (photos, H, W, 3), computed or read; an interrupted run continues.

    ``key`` names the weights: features of other weights or photos are never read.
    """
    spec = tower.spec
    shape = (1 + spec.grid**2, spec.width)

    def compute(chunk: Tensor, first: int) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            entry = tower.blocks(tower.embed(chunk), 0, spec.entry_block - 1)
            penultimate = tower.blocks(entry, spec.entry_block, spec.layers - 2)
            return [entry, penultimate, tower.blocks(penultimate, spec.layers - 1, spec.layers - 1)]

    names = ["entry", "penultimate", "last"]
    return TeacherFeatures(*_cached("clip", names, [shape] * 3, compute, pixels, key, cache, batch))


def latents(codec: Codec, pixels: Pixels, qualities: Sequence[int], cache: Path, batch: int = 16) -> Half:
    """y_hat (photos, M, H/16, W/16) of ``pixels`` as a decoder gets it, computed or read.

    Qualities take turns: photo i is coded at ``qualities[i % len(qualities)]``.
    """
    shape = (codec.M, *(length // LATENT_STRIDE for length in pixels.shape[1:3]))

    def compute(chunk: Tensor, first: int) -> list[Tensor]:
        y = codec.network.g_a(chunk.contiguous(memory_format=torch.channels_last))
        y_hat = torch.empty_like(y)
        turns = torch.arange(first, first + len(y)) % len(qualities)
        for turn in turns.unique().tolist():
            y_hat[turns == turn] = codec.quantise(y[turns == turn], qualities[turn])
        return [y_hat]

    key = f"{codec.digest} {qualities}"
    return _cached("y_hat", ["y_hat"], [shape], compute, pixels, key, cache, batch)[0]


def _cached(
    kind: str,
    names: list[str],
    shapes: list[tuple[int, ...]],
    compute: Callable[[Tensor, int], list[Tensor]],
    pixels: Pixels,
    key: str,
    cache: Path,
    batch: int,
) -> list[Half]:
    fingerprint = hashlib.sha256(key.encode() + np.ascontiguousarray(pixels[:, ::37, ::41]).tobytes()).hexdigest()[:16]
    folder = cache / f"{kind}-{fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / "done.json"
    done = json.loads(progress.read_text())["photos"] if progress.exists() else 0
    arrays: list[Half] = []
    for name, shape in zip(names, shapes, strict=True):
        path = folder / f"{name}.npy"
        mode = "r+" if path.exists() else "w+"
        arrays.append(
            np.lib.format.open_memmap(path, mode, np.float16, (len(pixels), *shape) if mode == "w+" else None)
        )
    bar = tqdm(total=len(pixels), initial=done, desc=kind, unit="photo", mininterval=5.0, dynamic_ncols=True)
    while done < len(pixels):
        chunk = torch.from_numpy(np.ascontiguousarray(pixels[done : done + batch])).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            results = compute(chunk, done)
        for array, result in zip(arrays, results, strict=True):
            array[done : done + len(chunk)] = result.float().numpy()
        done += len(chunk)
        bar.update(len(chunk))
        progress.write_text(json.dumps({"photos": done}))
    bar.close()
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
