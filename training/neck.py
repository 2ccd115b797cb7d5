"""Trains a transform-neck for d1: the codec frozen at human perception, no language model in sight.

    start      closed form: least squares from y_hat to CLIP's patch embeddings, the rest copied from CLIP
    warm-up    the tokens that enter block 2, against CLIP's own for the same photo: no gradient through CLIP
    distil     what backends read: all tokens of CLIP's last two blocks, and all of them projected

Errors are relative: squared distance to CLIP's own features over each channel's variance, so that 1 is as bad as the
mean and no channel counts for more than another. (Two thirds of the variance after ViT-B/16's last block is in one.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cloud_server.vision.clip import MEAN, STD, ClipTower
from cloud_server.vision.neck import TransformNeck
from shared.codecs.codec import Codec
from shared.options import option
from shared.profiles import get_profile
from shared.weights.digest import Storage, load_tensors, save_tensors
from shared.weights.store import ensure
from training.features import Half, Pixels, TeacherFeatures, latents, teacher_features
from training.loop import Losses, Schedule, generator, train
from training.photos import pixel_cache, read_photo_set


@dataclass(frozen=True)
class NeckTraining:
    """``comneck train neck``: a transform-neck for d1, resumable."""

    photos: Path = option("folder of photos; neither captions nor labels are used")
    out: Path = option("folder of the run: checkpoint, curve")
    cache: Path = option("folder for prepared photos and features, kept between runs")
    codec: Path = option("the codec's weights, from `comneck train codec`")
    profile: str = option("profile whose CLIP the neck enters", "small")
    start: Path | None = option("a neck to go on from, instead of the closed form", None)
    qualities: tuple[int, ...] = option("of the codec, taking turns over the photos; all that it has by default", ())
    warmup_steps: int = option("steps that regress the tokens entering CLIP", 800)
    distil_steps: int = option("steps that distil at CLIP's end", 700)
    batch: int = option("photos a step", 8)
    warmup_rate: float = option("peak learning rate of the warm-up", 3e-4)
    distil_rate: float = option("peak learning rate of the distillation; at three times this it stands still", 1e-4)
    seed: int = option("seed of the order of photos", 1)
    storage: Storage = option("of the trained weights: float16, int8 or float32", "int8")


@dataclass(frozen=True)
class Batch:
    """Latents (B, M, h, w) and CLIP's own tokens for the same photos, (B, 1 + patches, D) each."""

    y_hat: Tensor
    entry: Tensor
    penultimate: Tensor
    last: Tensor


def run(options: NeckTraining) -> None:
    profile = get_profile(options.profile)
    tower = ClipTower.load(profile.clip, ensure(profile.clip.weights))
    entries = [entry for entry in read_photo_set(options.photos) if entry.split == "train"]
    pixels = pixel_cache(entries, profile.preparation, options.cache)
    teacher = teacher_features(tower, pixels, profile.clip.weights, options.cache)
    codec = Codec.load(options.codec)
    y_hat = latents(codec, pixels, options.qualities or codec.qualities, options.cache)
    torch.manual_seed(options.seed)
    neck = TransformNeck(y_hat.shape[1], profile.clip.grid, profile.clip.width, profile.clip.heads)
    if options.start:
        neck.load_state_dict({name: value.float() for name, value in load_tensors(options.start).items()})
    else:
        start_from_clip(neck, tower, y_hat, pixels, teacher.entry)

    def batches(step: int) -> Iterator[Batch]:
        a_round = -(-len(y_hat) // options.batch)  # steps in which every photo comes once
        while True:
            order = torch.randperm(len(y_hat), generator=generator(options.seed, step // a_round))
            first = step % a_round * options.batch
            yield load_batch(y_hat, teacher, order[first : first + options.batch])
            step += 1

    sample = load_batch(y_hat, teacher, torch.linspace(0, len(y_hat) - 1, min(96, len(y_hat))).long())
    with torch.inference_mode():
        projected = tower.project(sample.last)
    scales = {
        name: channel_variance(values)
        for name, values in (
            ("entry", sample.entry),
            ("penultimate", sample.penultimate),
            ("last", sample.last),
            ("projected", projected),
            ("cls", projected[:, :1]),
        )
    }

    def warm_up(batch: Batch, step: int) -> Losses:
        return {"loss": relative_error(neck(batch.y_hat), batch.entry, scales["entry"])}

    def distil(batch: Batch, step: int) -> Losses:
        spec = tower.spec
        penultimate = tower.blocks(neck(batch.y_hat), spec.entry_block, spec.layers - 2)
        last = tower.blocks(penultimate, spec.layers - 1, spec.layers - 1)
        projected, wanted = tower.project(last), tower.project(batch.last)
        terms = {
            "penultimate": relative_error(penultimate, batch.penultimate, scales["penultimate"]),
            "last": relative_error(last, batch.last, scales["last"]),
            "projected": relative_error(projected, wanted, scales["projected"]),
            "cls": relative_error(projected[:, :1], wanted[:, :1], scales["cls"]),
        }
        cosine = torch.cosine_similarity(projected[:, 0].float(), wanted[:, 0].float(), -1).mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms, "cosine": cosine}

    for name, steps, rate, losses in (
        ("warmup", options.warmup_steps, options.warmup_rate, warm_up),
        ("distil", options.distil_steps, options.distil_rate, distil),
    ):
        if not steps:
            continue
        optimizer = torch.optim.AdamW(neck.parameters(), lr=rate, weight_decay=0.01)
        schedule = Schedule(steps, warmup=min(50, steps // 10))
        train(neck, optimizer, schedule, batches, losses, options.out / name, log_every=20, save_every=100)
    save_tensors(options.out / "neck.safetensors", neck.state_dict(), options.storage, {"profile": profile.name})


def channel_variance(features: Tensor) -> Tensor:
    """Variance of each channel over photos and tokens, (B, T, D) -> (D,)."""
    return features.float().flatten(0, 1).var(0, correction=0).clamp(min=1e-8).clone()


def relative_error(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Mean over channels of squared error over variance (D,), both (B, T, D): 0 is equal, 1 as bad as the mean."""
    return ((student.float() - teacher.float()).square() / variance).mean()


def load_batch(y_hat: Half, teacher: TeacherFeatures, which: Tensor) -> Batch:
    def pick(array: Half) -> Tensor:
        return torch.from_numpy(np.stack([array[i] for i in which.tolist()])).float()

    return Batch(pick(y_hat), pick(teacher.entry), pick(teacher.penultimate), pick(teacher.last))


@torch.inference_mode()
def start_from_clip(neck: TransformNeck, tower: ClipTower, y_hat: Half, pixels: Pixels, entry: Half) -> None:
    """Sets a neck to the best that is known without training.

    The linear layer is the ridge regression from y_hat to CLIP's patch embeddings over up to 2,000 photos; class and
    position embedding and ln_pre are CLIP's; the block is that one of CLIP's first blocks, all of which the neck
    replaces, that comes nearest to the tokens that enter the next.
    """
    visual = tower.visual
    count = min(2000, len(y_hat))
    channels = y_hat.shape[1]
    gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
    cross = torch.zeros(channels + 1, tower.spec.width, dtype=torch.float64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for first in tqdm(range(0, count, 50), desc="least squares", unit="batch"):
        chunk = torch.from_numpy(np.ascontiguousarray(pixels[first : first + 50])).permute(0, 3, 1, 2).float() / 255
        wanted = visual.conv1((chunk - mean) / std).flatten(2).transpose(1, 2).flatten(0, 1).double()
        given = torch.from_numpy(y_hat[first : first + 50]).double().flatten(2).transpose(1, 2).flatten(0, 1)
        given = torch.cat([given, torch.ones(len(given), 1, dtype=torch.float64)], 1)
        gram += given.T @ given
        cross += given.T @ wanted
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(channels + 1, dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, cross).float()  # (M + 1, D)
    neck.trans_latent_dim.weight.copy_(solution[:-1].T)
    neck.trans_latent_dim.bias.copy_(solution[-1])
    neck.class_embedding.copy_(visual.class_embedding)
    neck.positional_embedding.copy_(visual.positional_embedding)
    neck.ln_pre.load_state_dict(visual.ln_pre.state_dict())
    sample = torch.from_numpy(y_hat[:32]).float()
    wanted = torch.from_numpy(entry[:32]).float()
    candidates: list[tuple[float, nn.Module]] = []
    for block in visual.transformer.resblocks[: tower.spec.entry_block]:
        neck.transformer.resblocks[0].load_state_dict(block.state_dict())
        candidates.append((float(relative_error(neck(sample), wanted, channel_variance(wanted))), block))
    error, best = min(candidates, key=lambda candidate: candidate[0])
    neck.transformer.resblocks[0].load_state_dict(best.state_dict())
    tqdm.write(f"closed-form start: relative error {error:.3f} at the tokens that enter CLIP")
