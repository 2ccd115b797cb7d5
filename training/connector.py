"""Trains a backend's connector on clean CLIP features: it never sees the codec or the neck, which is the claim.

loss = cross-entropy of the answers' tokens, the language model frozen but for low-rank changes

What is particular to a backend is its lesson (training/lessons.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cloud_server.backends import gated_attention
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.tokenizer import load_tokenizer
from cloud_server.vision.clip import ClipTower
from shared.errors import BadInput, UnknownName
from shared.options import option
from shared.profiles import get_profile
from shared.weights.digest import Storage, save_tensors
from shared.weights.store import ensure
from training.features import teacher_features
from training.lessons import LESSONS, Setting
from training.loop import Losses, Schedule, generator, train
from training.photos import pixel_cache, read_photo_set
from training.samples import Sample, SampleSource


@dataclass(frozen=True)
class ConnectorTraining:
    """``comneck train connector``: a backend's connector on clean features, resumable."""

    photos: Path = option("folder of photos with captions, labels, questions or boxes in its index.jsonl")
    out: Path = option("folder of the run: checkpoint, curve")
    cache: Path = option("folder for prepared photos and features, kept between runs")
    backend: str = option(f"whose connector: {', '.join(LESSONS)}", next(iter(LESSONS)))
    profile: str = option("profile whose CLIP and language model are connected", "small")
    sizes: tuple[str, ...] = option("sizes of the connector that are not the lesson's own, each NAME=NUMBER", ())
    steps: int = option("optimiser steps", 1000)
    batch: int = option("photos a step", 16)
    per_photo: int = option("exchanges a photo", 2)
    answer_tokens: int = option("longer answers are cut: a few long ones would make every batch slow", 20)
    rate: float = option("peak learning rate of the connector", 1e-3)
    seed: int = option("seed of weights and samples", 1)
    storage: Storage = option("of the trained weights: float16, int8 or float32", "int8")


@dataclass(frozen=True)
class Exchanges:
    """A batch: what the backend reads of each photo (B, 1 + patches, D), and its exchanges, photo by photo."""

    features: Tensor
    samples: list[list[Sample]]


def run(options: ConnectorTraining) -> None:
    profile = get_profile(options.profile)
    spec = next((each for each in profile.backends if each.name == options.backend), None)
    if spec is None or options.backend not in LESSONS:
        raise UnknownName(f"profile {profile.name!r} has no backend {options.backend!r} that a lesson teaches")
    entries = [entry for entry in read_photo_set(options.photos) if entry.split == "train"]
    preparation = profile.preparation_for(spec.name)
    pixels = pixel_cache(entries, preparation, options.cache)
    tower = ClipTower.load(profile.clip, ensure(profile.clip.weights))
    features = teacher_features(tower, pixels, profile.clip.weights, options.cache)
    folder = ensure(spec.llm)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=gated_attention.NAME)
    torch.manual_seed(options.seed)
    setting = Setting(
        tower=tower,
        features=features,
        llm=LanguageModel(model, load_tokenizer(folder)),
        entries=entries,
        preparation=preparation,
        prompt=spec.prompt,
        answer_tokens=options.answer_tokens,
    )
    lesson = LESSONS[options.backend](setting, _sizes(options.sizes))
    groups = lesson.parameter_groups(options.rate)
    source = SampleSource(lesson.entries(), lesson.shares)

    def batches(step: int) -> Iterator[Exchanges]:
        while True:
            drawn = source.draw(options.batch, options.per_photo, generator(options.seed, step))
            samples = [drawn[first : first + options.per_photo] for first in range(0, len(drawn), options.per_photo)]
            yield Exchanges(lesson.read([each[0].photo for each in samples]), samples)
            step += 1

    def losses(batch: Exchanges, step: int) -> Losses:
        return lesson.losses(batch.features, batch.samples)

    optimizer = torch.optim.AdamW(groups, weight_decay=0.02)
    train(lesson.connector, optimizer, Schedule(options.steps, warmup=100), batches, losses, options.out)
    metadata = {"config": json.dumps(lesson.connector.config), "llm": spec.llm, "clip": profile.clip.weights}
    save_tensors(options.out / "connector.safetensors", lesson.connector.state_dict(), options.storage, metadata)


def _sizes(given: tuple[str, ...]) -> dict[str, int]:
    try:
        return {name: int(number) for name, number in (each.split("=") for each in given)}
    except ValueError as problem:
        raise BadInput(f"sizes {' '.join(given)}: each is NAME=NUMBER, such as rank=16") from problem
