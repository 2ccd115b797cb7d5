"""Photos both ways: pixels through the whole of CLIP, and a real bitstream, entropy-decoded, through the neck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from cloud_server.backends import Backend
from cloud_server.pipeline import Pipeline
from shared.bitstream import Bitstream
from shared.images import load_photo, prepare
from training.photos import Entry

Way = Literal["pixels", "bitstream"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Seen:
    """One photo as a backend gets it, either way."""

    entry: Entry
    bitstream: Bitstream
    photo: dict[Way, Tensor]


def look_both_ways(pipeline: Pipeline, backend: Backend, entries: Sequence[Entry], batch: int = 16) -> Iterator[Seen]:
    """Every photo, at the profile's quality and prepared for the backend, in order."""
    profile = pipeline.profile
    name = next(name for name, each in pipeline.backends.items() if each is backend)
    codec, quality = pipeline.codec(profile.quality), profile.quality
    for first in range(0, len(entries), batch):
        chunk = entries[first : first + batch]
        photos = [prepare(load_photo(entry.path), profile.preparation_for(name)) for entry in chunk]
        bitstreams = [codec.encode(photo, profile.scenario, quality) for photo in photos]
        from_pixels = pipeline.look_at_pixels(photos, backend.needs)
        received = pipeline.look(pipeline.sights(bitstreams), backend.needs)
        for entry, bitstream, *seen in zip(chunk, bitstreams, from_pixels, received, strict=True):
            yield Seen(entry, bitstream, dict(zip(WAYS, seen, strict=True)))
