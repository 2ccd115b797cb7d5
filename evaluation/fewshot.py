"""How often a photo gets the right label from one example of each class: from pixels and through the bitstream.

An episode is drawn by a seed: classes of one source, a photo of each as its example, and another photo of one of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from cloud_server.backends import Backend, Question
from cloud_server.generation import whole
from cloud_server.pipeline import Pipeline
from evaluation.metrics import Scores, interval, kept_interval
from evaluation.ways import WAYS, look_both_ways
from shared.bitstream import Bitstream
from shared.conversation import Generation
from shared.errors import BadInput
from shared.options import option
from training.photos import Entry, read_photo_set

MAX_TOKENS = 16  # of a label that is written token by token, as published


@dataclass(frozen=True)
class FewshotEvaluation:
    """``comneck evaluate fewshot``: labels from one example a class."""

    photos: Path = option("folder of photos with labels in its index.jsonl")
    out: Path = option("file for the figures, JSON")
    backend: str = option("who gives labels", "v2l-tokenizer")
    profile: str = option("profile to measure", "small")
    sources: tuple[str, ...] = option("of the photos", ("nips17", "caltech101", "imagen"))
    split: str = option("of the photos", "test")
    episodes: int = option("how many photos are labelled", 300)
    classes: int = option("labels to choose from", 5)
    leaky: bool = option("the photo is among its own examples, as ComNeck's authors evaluated", False)
    seed: int = option("of the episodes", 0)


@dataclass(frozen=True)
class Episode:
    """A photo to be labelled, and an example of each class, its own among them."""

    examples: tuple[Entry, ...]
    query: Entry


def run(options: FewshotEvaluation) -> None:
    entries = [e for e in read_photo_set(options.photos) if e.split == options.split and e.source in options.sources]
    episodes = draw_episodes(entries, options.episodes, options.classes, options.seed)
    pipeline = Pipeline.load(options.profile)
    backend = pipeline.backend(options.backend)
    needed = list(dict.fromkeys(entry for episode in episodes for entry in (*episode.examples, episode.query)))
    photos: dict[str, dict[Path, Tensor]] = {way: {} for way in WAYS}
    bitstreams: list[Bitstream] = []
    for one in tqdm(look_both_ways(pipeline, backend, needed), "photos", len(needed), unit="photo"):
        bitstreams.append(one.bitstream)
        for way in WAYS:
            photos[way][one.entry.path] = one.photo[way][:1].clone()  # CLS: all that is read for a label
    right = {
        way: np.array(
            [is_right(backend, episode, photos[way], options.leaky) for episode in tqdm(episodes, way, unit="episode")]
        )
        for way in WAYS
    }
    figures = {
        "profile": options.profile,
        "quality": pipeline.profile.quality,
        "models": pipeline.digests(backend),
        "episodes": len(episodes),
        "photos": len(needed),
        "classes": options.classes,
        "sources": {name: sum(each.query.source == name for each in episodes) for name in options.sources},
        "leaky": options.leaky,
        "seed": options.seed,
        "bytes": float(np.mean([len(bitstream) for bitstream in bitstreams])),
        "bpp": float(np.mean([bitstream.bpp for bitstream in bitstreams])),
        **summarise(right["pixels"], right["bitstream"], options.classes),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def draw_episodes(entries: Sequence[Entry], count: int, classes: int, seed: int) -> list[Episode]:
    """Episodes, each of one source: what one source names in general another may name in detail.

    A class takes part that has two photos or more; a source is drawn as often as it has classes.

    Raises:
        BadInput: no source has enough of them.
    """
    sources: defaultdict[str, defaultdict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        if entry.label:
            sources[entry.source][entry.label].append(entry)
    pools = [[photos for photos in labels.values() if len(photos) > 1] for labels in sources.values()]
    pools = [pool for pool in pools if len(pool) >= classes]
    if not pools:
        raise BadInput(f"no source has {classes} classes of two photos or more: there is no episode to draw")
    random = np.random.default_rng(seed)
    share = np.array([len(pool) for pool in pools]) / sum(map(len, pools))
    episodes = []
    for _ in range(count):
        pool = pools[random.choice(len(pools), p=share)]
        drawn = [pool[place] for place in random.choice(len(pool), classes, replace=False)]
        asked = random.integers(classes)
        pairs = [[photos[place] for place in random.permutation(len(photos))[:2]] for photos in drawn]
        episodes.append(Episode(tuple(example for example, _ in pairs), pairs[asked][1]))
    return episodes


def is_right(backend: Backend, episode: Episode, photos: dict[Path, Tensor], leaky: bool = False) -> bool:
    """Whether the answer begins with the photo's label, which is the published metric."""
    shown = (*episode.examples, *([episode.query] if leaky else []))
    examples = [part for entry in shown for part in (photos[entry.path], entry.label or "")]
    question = Question((*examples, photos[episode.query.path]), "label")
    texts, _ = whole(backend.write([question], Generation(max_tokens=MAX_TOKENS)))
    return texts[0].startswith(episode.query.label or "")


def summarise(pixels: Scores, bitstream: Scores, classes: int) -> dict[str, Any]:
    """Accuracies in per cent with their bootstrap intervals, from what was right."""
    pixels, bitstream = 100.0 * pixels, 100.0 * bitstream
    return {
        "pixels": {"mean": float(pixels.mean()), "95%": interval(pixels)},
        "bitstream": {"mean": float(bitstream.mean()), "95%": interval(bitstream)},
        "kept": {"ratio": float(bitstream.mean() / max(pixels.mean(), 1e-9)), "95%": kept_interval(bitstream, pixels)},
        "baseline": {"what": "a random class", "mean": 100 / classes},
    }
