"""Photographs to train and measure on: a folder with an ``index.jsonl``, or any folder of pictures.

folder -> PhotoSet (what is there) -> pixel_cache (prepared once, 8-bit, memory-mapped)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from shared.conversation import Box
from shared.errors import BadInput, UnreadableImage
from shared.images import Preparation, load_photo, prepare

SUFFIXES = {".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Question:
    """A question about one photo, the answers its annotators gave, and the options where it has some."""

    text: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Thing:
    """What a box of a photo shows.

    Attributes:
        names: all wordings of it, "a man" or "dog".
        box: (left, top, right, bottom) as fractions of the photo.
        alone: whether the photo's annotators drew no other box for the same words.
    """

    names: tuple[str, ...]
    box: tuple[float, float, float, float]
    alone: bool


@dataclass(frozen=True)
class Entry:
    """One photo of a set with whatever is known of it; ``size`` is (width, height) of the file."""

    path: Path
    source: str = ""
    split: str = "train"
    captions: tuple[str, ...] = ()
    label: str | None = None
    credit: str = ""
    wnid: str | None = None
    questions: tuple[Question, ...] = field(default=())
    things: tuple[Thing, ...] = field(default=())
    size: tuple[int, int] = (0, 0)


def read_photo_set(folder: Path) -> list[Entry]:
    """Reads ``folder/index.jsonl``, one object a line, or, where there is none, every picture below ``folder``.

    A line has ``file`` (relative to the folder) and, as far as known, ``source``, ``split`` (train or test),
    ``captions`` (a list), ``label``, ``qa`` (a list of ``{q, a, choices}``), ``w`` and ``h`` of the file and ``boxes``
    (a list of ``{name, phrases, chain, x0, y0, x1, y1}`` in fractions; boxes of one chain are of one plural thing).

    Raises:
        BadInput: no such folder, no picture in it, or a line that cannot be read (named by its number).
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder of photos")
    index = folder / "index.jsonl"
    if not index.exists():
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise BadInput(f"{folder} holds neither an index.jsonl nor any picture")
        return [Entry(path, source=folder.name) for path in paths]
    entries = []
    with index.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                entries.append(_entry(folder, json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                raise BadInput(f"{index}, line {number}: {problem!r}") from problem
    return entries


def _entry(folder: Path, row: dict) -> Entry:
    return Entry(
        path=folder / row["file"],
        source=row.get("source", ""),
        split=row.get("split", "train"),
        captions=tuple(row.get("captions", ())),
        label=row.get("label"),
        credit=" ".join(row[key] for key in ("author", "url", "licence") if key in row),
        wnid=row.get("wnid"),
        questions=tuple(
            Question(item["q"], tuple(item["a"]), tuple(item.get("choices", ()))) for item in row.get("qa", ())
        ),
        things=_things(row.get("boxes", ())),
        size=(row.get("w", 0), row.get("h", 0)),
    )


def _things(boxes: Sequence[dict]) -> tuple[Thing, ...]:
    kinds = Counter(box.get("chain", box["name"]) for box in boxes)
    return tuple(
        Thing(
            names=tuple(box.get("phrases", [box["name"]])),
            box=(box["x0"], box["y0"], box["x1"], box["y1"]),
            alone=kinds[box.get("chain", box["name"])] == 1,
        )
        for box in boxes
    )


def in_pixels(box: Sequence[float], size: tuple[int, int]) -> Box:
    """A box in fractions of a photo of ``size`` (width, height)."""
    left, top, right, bottom = box
    return Box(left * size[0], top * size[1], right * size[0], bottom * size[1])


def pixel_cache(entries: Sequence[Entry], preparation: Preparation, cache: Path) -> npt.NDArray[np.uint8]:
    """Prepares every photo once and returns them memory-mapped, (len(entries), H, W, 3) 8-bit RGB.

    The file's name carries a digest of the list and of the preparation, so another list never reads it.

    Raises:
        BadInput: a photo of the list cannot be read.
    """
    key = hashlib.sha256(repr((preparation, [str(entry.path) for entry in entries])).encode()).hexdigest()[:16]
    path = cache / f"pixels-{key}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp.npy")
        shape = (len(entries), preparation.height, preparation.width, 3)
        pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)

        def fill(i: int) -> None:
            try:
                pixels[i] = prepare(load_photo(entries[i].path), preparation).pixels
            except UnreadableImage as problem:
                raise BadInput(str(problem)) from problem

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in tqdm(pool.map(fill, range(len(entries))), total=len(entries), desc="photos", unit="photo"):
                pass
        pixels.flush()
        os.replace(partial, path)
    mapped: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    return mapped
