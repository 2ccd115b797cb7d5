"""What backends say about photos from uncompressed pixels, and what they say through the bitstream, in exams.

Every photo takes both ways (evaluation/ways.py); what is asked and how it is scored are exams (evaluation/exams.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cloud_server.backends import Backend, Question
from cloud_server.generation import whole
from cloud_server.pipeline import Pipeline, in_photo
from evaluation.exams import EXAMS, Exam, Item, Said
from evaluation.metrics import interval, kept_interval
from evaluation.ways import WAYS, Seen, Way, look_both_ways
from shared.conversation import Generation
from shared.errors import BadInput, UnknownName
from shared.images import load_photo
from shared.options import option
from training.photos import Entry, read_photo_set


@dataclass(frozen=True)
class AnswerEvaluation:
    """``comneck evaluate answers``: pixels against bitstream on a folder of photos."""

    photos: Path = option("folder of photos with captions, labels, questions or boxes in its index.jsonl")
    out: Path = option("file for the figures, JSON; answers go beside it as JSON lines, from which a run resumes")
    exams: tuple[str, ...] = option(f"what is asked: {', '.join(EXAMS)}", ("captions", "labels"))
    backend: str = option("who is examined; by default whom the exam is for", "")
    profile: str = option("profile to measure", "small")
    sources: tuple[str, ...] = option("only photos of these sources; all by default", ())
    split: str = option("only photos of this split", "test")
    limit: int = option("at most so many photos in an exam, drawn by the seed; 0 for all", 0)
    batch: int = option("photos a batch", 16)
    seed: int = option("of the questions that are drawn", 0)


@dataclass(frozen=True)
class Row:
    """One answer, both ways, and the bytes of the photo's bitstream.

    ``run`` names what the answers depend on: those of another run are never taken for a run's own.
    """

    run: str
    exam: str
    file: str
    number: int
    prompt: str
    pixels: str
    bitstream: str
    bytes: int
    bpp: float


Rows = dict[tuple[str, int], Row]


def run(options: AnswerEvaluation) -> None:
    for name in options.exams:
        if name not in EXAMS:
            raise UnknownName(f"no exam named {name!r}; there are: {', '.join(EXAMS)}")
    everything = read_photo_set(options.photos)
    entries = [
        entry
        for entry in everything
        if entry.split == options.split and (not options.sources or entry.source in options.sources)
    ]
    if not entries:
        raise BadInput(f"{options.photos} has no photo of split {options.split!r} and these sources")
    taught = [entry for entry in everything if entry.split == "train"]
    pipeline = Pipeline.load(options.profile)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"profile": options.profile, "quality": pipeline.profile.quality, "exams": {}}
    for name in options.exams:
        exam = EXAMS[name]()
        backend = pipeline.backend(options.backend or exam.backend)
        items = _some(exam.draw(entries, options.seed), options.limit, options.seed)
        rows = _answered(pipeline, backend, exam, items, options)
        figures["exams"][name] = {
            "backend": options.backend or exam.backend,
            "models": pipeline.digests(backend),
            **summarise(pipeline, exam, backend, items, rows, taught),
        }
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def _some(items: list[Item], photos: int, seed: int) -> list[Item]:
    """The items of so many photos, or of all."""
    paths = list(dict.fromkeys(item.entry.path for item in items))
    kept = set(random.Random(seed).sample(paths, photos) if 0 < photos < len(paths) else paths)
    return [item for item in items if item.entry.path in kept]


def _answered(
    pipeline: Pipeline, backend: Backend, exam: Exam, items: Sequence[Item], options: AnswerEvaluation
) -> list[Row]:
    """The answers of every item, those of an earlier run included."""
    path, name = options.out.with_suffix(".answers.jsonl"), type(exam).__name__.lower()
    key = _fingerprint(pipeline, backend, exam)
    asked: dict[Path, list[Item]] = {}
    for item in items:
        asked.setdefault(item.entry.path, []).append(item)
    done = read_rows(path, key)
    places = {
        id(item): (path.relative_to(options.photos).as_posix(), number)
        for path, group in asked.items()
        for number, item in enumerate(group)
    }
    missing = [
        group[0].entry
        for group in asked.values()
        if any(places[id(item)] not in done or done[places[id(item)]].prompt != item.prompt for item in group)
    ]
    bar = tqdm(total=len(asked), initial=len(asked) - len(missing), desc=name, unit="photo")
    with path.open("a", encoding="utf-8") as lines:
        if lines.tell() and not path.read_bytes().endswith(b"\n"):
            lines.write("\n")  # a kill cut the last line short; the next must not continue it
        for first in range(0, len(missing), options.batch):
            chunk = missing[first : first + options.batch]
            seen = list(look_both_ways(pipeline, backend, chunk, options.batch))
            said = {way: _say(backend, exam, seen, asked, way) for way in WAYS}
            for one, *texts in zip(seen, *said.values(), strict=True):
                for item, pixels, bitstream in zip(asked[one.entry.path], *texts, strict=True):
                    file, number = places[id(item)]
                    size, bpp = len(one.bitstream), one.bitstream.bpp
                    row = done[file, number] = Row(key, name, file, number, item.prompt, pixels, bitstream, size, bpp)
                    lines.write(json.dumps(asdict(row)) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            bar.update(len(chunk))
    bar.close()
    return [done[places[id(item)]] for item in items]


def _say(
    backend: Backend, exam: Exam, seen: Sequence[Seen], asked: dict[Path, list[Item]], way: Way
) -> list[list[str]]:
    """The texts of each photo's answers."""
    groups = [asked[one.entry.path] for one in seen]
    questions = [
        Question((one.photo[way], item.prompt), exam.task, item.choices)
        for one, group in zip(seen, groups, strict=True)
        for item in group
    ]
    texts = iter(whole(backend.write(questions, Generation(max_tokens=exam.max_tokens)))[0])
    return [[next(texts).strip() for _ in group] for group in groups]


def _fingerprint(pipeline: Pipeline, backend: Backend, exam: Exam) -> str:
    settings = sorted(pipeline.digests(backend).items()), pipeline.profile.quality, type(exam).__name__, exam.max_tokens
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def summarise(
    pipeline: Pipeline,
    exam: Exam,
    backend: Backend,
    items: Sequence[Item],
    rows: Sequence[Row],
    taught: Sequence[Entry],
) -> dict[str, Any]:
    """An exam's figures by group of items, from its answers."""
    scores = {
        way: exam.scores(items, [_read(pipeline, backend, exam, *each, way) for each in zip(items, rows, strict=True)])
        for way in WAYS
    }
    guessed = exam.baseline(items, taught)
    groups: dict[str, Any] = {}
    for name in ("all", *dict.fromkeys(item.group for item in items)):
        own = np.array([name in ("all", item.group) for item in items])
        pixels, bitstream = (scores[way][own] for way in WAYS)
        sizes = {row.file: (row.bytes, row.bpp) for row, kept in zip(rows, own, strict=True) if kept}
        groups[name] = {
            "answers": int(own.sum()),
            "photos": len(sizes),
            "bytes": float(np.mean([size for size, _ in sizes.values()])),
            "bpp": float(np.mean([bpp for _, bpp in sizes.values()])),
            "pixels": {"mean": float(pixels.mean()), "95%": interval(pixels)},
            "bitstream": {"mean": float(bitstream.mean()), "95%": interval(bitstream)},
            "kept": {
                "ratio": float(bitstream.mean() / max(pixels.mean(), 1e-9)),
                "95%": kept_interval(bitstream, pixels),
            },
            "baseline": {"what": exam.guess, "mean": float(guessed[own].mean()), "95%": interval(guessed[own])},
        }
    return {"metric": exam.metric, "groups": groups}


def _read(pipeline: Pipeline, backend: Backend, exam: Exam, item: Item, row: Row, way: Way) -> Said:
    """What an answer's text says, as the pipeline would tell it."""
    text = getattr(row, way)
    found = backend.find(text, Question((item.prompt,), exam.task, item.choices))
    box = None
    if found.box:
        name = next(name for name, each in pipeline.backends.items() if each is backend)
        size = item.entry.size if all(item.entry.size) else load_photo(item.entry.path).original_size
        box = in_photo(found.box, size, pipeline.profile.preparation_for(name))
    return text, found.choice, box


def read_rows(path: Path, run: str | None = None) -> Rows:
    """The answers so far by photo and number, of one run or of all. A last line that a kill cut short is dropped."""
    rows: Rows = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = Row(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if run is None or row.run == run:
                rows[row.file, row.number] = row
    return rows
