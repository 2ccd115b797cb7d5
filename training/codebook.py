"""Makes V2L-Tokenizer's codebook for a CLIP without a text tower: a word lies where the photos lie that it is said of.

    photos -> CLS, projected, of length 1, less what all have in common, of length 1 -> mean over a word's photos

The published codebook holds CLIP's own embeddings of words. These places are measured the way they are looked up, so
that a word is near a photo that is like its photos. The mean of many photos lies near the centre, far from every one:
words that say nothing ("a", "with") are never taken, and no list of them is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cloud_server.vision.clip import ClipTower
from evaluation.metrics import words
from shared.errors import BadInput
from shared.options import option
from shared.profiles import get_profile
from shared.weights.codebook import PUBLISHED_COUNT, Codebook
from shared.weights.digest import Storage
from shared.weights.store import ensure
from training.features import teacher_features
from training.photos import Entry, pixel_cache, read_photo_set


@dataclass(frozen=True)
class CodebookTraining:
    """``comneck train codebook``: a codebook from captions and labels."""

    photos: Path = option("folder of photos with captions or labels in its index.jsonl")
    out: Path = option("folder for the codebook")
    cache: Path = option("folder for prepared photos and features, kept between runs")
    profile: str = option("profile whose CLIP it is for", "small")
    least: int = option("photos that a word is said of, at least", 2)
    count: int = option("words that describe a photo", PUBLISHED_COUNT)
    storage: Storage = option("of the places: float16, int8 or float32", "int8")


def run(options: CodebookTraining) -> None:
    profile = get_profile(options.profile)
    tower = ClipTower.load(profile.clip, ensure(profile.clip.weights))
    entries = read_photo_set(options.photos)
    train = [entry for entry in entries if entry.split == "train"]
    pixels = pixel_cache(train, profile.preparation, options.cache)
    last = teacher_features(tower, pixels, profile.clip.weights, options.cache).last
    kept = of_other_classes(train, [entry for entry in entries if entry.split == "test"])
    with torch.inference_mode():
        features = tower.project(torch.from_numpy(last[kept, 0]).float())
    codebook = make_codebook([train[place] for place in kept], features, options.least, options.count)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "codebook.safetensors"
    codebook.save(path, options.storage, clip=profile.clip.weights)
    print(f"{len(codebook.words):,} words from {len(kept):,} photos in {path}, {path.stat().st_size:,} bytes")


def make_codebook(entries: Sequence[Entry], features: Tensor, least: int = 2, count: int = PUBLISHED_COUNT) -> Codebook:
    """The codebook of all words that are said of ``least`` photos or more, in captions or labels.

    Args:
        features: projected CLS of each photo, (photos, D).
        count: words that describe a photo.

    Raises:
        BadInput: there are no such words, or fewer than ``count``.
    """
    features = F.normalize(features, dim=-1)
    centre = features.mean(0)
    places = F.normalize(features - centre, dim=-1)
    photos: defaultdict[str, set[int]] = defaultdict(set)
    for photo, entry in enumerate(entries):
        for text in (*entry.captions, (entry.label or "").replace("_", " ")):
            for word in words(text):
                photos[word].add(photo)
    said = {word: sorted(shown) for word, shown in sorted(photos.items()) if len(shown) >= least}
    if not said:
        raise BadInput(f"no word is said of {least} photos or more: there are too few captions and labels")
    return Codebook(tuple(said), torch.stack([places[shown].mean(0) for shown in said.values()]), count, centre)


def of_other_classes(train: Sequence[Entry], test: Sequence[Entry]) -> list[int]:
    """Places of the training photos that show no class of the test photos: those are to be new in every way.

    Classes are equal that share a label or a WordNet id. Words of captions are nobody's class.
    """

    def names(entry: Entry) -> set[str]:
        return {name.lower().replace("_", " ") for name in (entry.label, entry.wnid) if name}

    tested = {name for entry in test for name in names(entry)}
    return [place for place, entry in enumerate(train) if not tested & names(entry)]
