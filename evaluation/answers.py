"""What a backend says about photos from uncompressed pixels, and what it says through the bitstream.

Every photo takes both ways: pixels through the whole of CLIP, and a real bitstream, entropy-decoded, through the neck.
Captioned photos are scored by CIDEr, labelled ones by whether the answer names the label.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from cloud_server.backends import Backend, Question
from cloud_server.generation import whole
from cloud_server.pipeline import Pipeline
from evaluation.metrics import cider, interval, kept_interval, names
from shared.conversation import Generation
from shared.errors import BadInput
from shared.images import load_photo, prepare
from shared.options import option
from training.photos import Entry, read_photo_set

WAYS = ("pixels", "bitstream")


@dataclass(frozen=True)
class AnswerEvaluation:
    """``comneck evaluate answers``: pixels against bitstream on a folder of photos."""

    photos: Path = option("folder of photos with captions or labels in its index.jsonl")
    out: Path = option("file for the figures, JSON; answers go beside it as JSON lines, from which a run resumes")
    profile: str = option("profile to measure", "small")
    sources: tuple[str, ...] = option("only photos of these sources; all by default", ())
    split: str = option("only photos of this split", "test")
    limit: int = option("at most so many photos; 0 for all", 0)
    caption_prompt: str = option("what is asked about captioned photos", "describe this")
    label_prompt: str = option("what is asked about labelled photos", "what is this?")
    batch: int = option("photos a batch", 16)
    max_tokens: int = option("length of an answer, in tokens", 32)


@dataclass(frozen=True)
class Row:
    """One photo, both ways: what was said, and the bytes of the bitstream.

    ``run`` names models and prompts: answers of others are never taken for a run's own.
    """

    run: str
    file: str
    pixels: str
    bitstream: str
    bytes: int
    bpp: float


def run(options: AnswerEvaluation) -> None:
    entries = select(options)
    pipeline = Pipeline.load(options.profile)
    answers = options.out.with_suffix(".answers.jsonl")
    answers.parent.mkdir(parents=True, exist_ok=True)
    key = fingerprint(options, pipeline)
    done = read_rows(answers, key)
    missing = [entry for entry in entries if _key(options, entry) not in done]
    bar = tqdm(total=len(entries), initial=len(entries) - len(missing), desc="photos", unit="photo")
    with answers.open("a", encoding="utf-8") as lines:
        if lines.tell() and not answers.read_bytes().endswith(b"\n"):
            lines.write("\n")  # a kill cut the last line short; the next must not continue it
        for prompt in dict.fromkeys((options.caption_prompt, options.label_prompt)):
            group = [entry for entry in missing if _prompt(options, entry) == prompt]
            for first in range(0, len(group), options.batch):
                chunk = group[first : first + options.batch]
                for row in measure(pipeline, options, chunk, prompt, key):
                    lines.write(json.dumps(asdict(row)) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
                bar.update(len(chunk))
    bar.close()
    figures = summarise(options, entries, read_rows(answers, key), pipeline)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def select(options: AnswerEvaluation) -> list[Entry]:
    """The photos that can be judged: captioned or labelled ones of the split and sources asked for."""
    entries = [
        entry
        for entry in read_photo_set(options.photos)
        if entry.split == options.split
        and (entry.captions or entry.label)
        and (not options.sources or entry.source in options.sources)
    ]
    if not entries:
        raise BadInput(
            f"{options.photos} has no captioned or labelled photo of split {options.split!r} and these sources"
        )
    return entries[: options.limit] if options.limit else entries


def fingerprint(options: AnswerEvaluation, pipeline: Pipeline) -> str:
    """Names what the answers depend on: models, quality, prompts, length."""
    models = pipeline.digests(pipeline.backend(""))
    settings = (
        sorted(models.items()),
        pipeline.profile.quality,
        options.caption_prompt,
        options.label_prompt,
        options.max_tokens,
    )
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def measure(pipeline: Pipeline, options: AnswerEvaluation, chunk: list[Entry], prompt: str, key: str) -> list[Row]:
    """Both ways for a batch of photos."""
    profile, backend = pipeline.profile, pipeline.backend("")
    photos = [prepare(load_photo(entry.path), profile.preparation) for entry in chunk]
    codec, quality = pipeline.codec(profile.quality), profile.quality
    bitstreams = [codec.encode(photo, profile.scenario, quality) for photo in photos]
    seen = pipeline.look_at_pixels(photos, backend.needs)
    received = pipeline.look(pipeline.sights(bitstreams), backend.needs)
    said = [_answers(backend, photos, prompt, options.max_tokens) for photos in (seen, received)]
    return [
        Row(key, _key(options, entry), plain, coded, len(bitstream), bitstream.bpp)
        for entry, plain, coded, bitstream in zip(chunk, *said, bitstreams, strict=True)
    ]


def _answers(backend: Backend, photos: list[Tensor], prompt: str, max_tokens: int) -> list[str]:
    questions = [Question((photo, prompt)) for photo in photos]
    texts, _ = whole(backend.write(questions, Generation(max_tokens=max_tokens)))
    return [text.strip() for text in texts]


def summarise(
    options: AnswerEvaluation, entries: list[Entry], rows: dict[str, Row], pipeline: Pipeline
) -> dict[str, Any]:
    """The figures of a run, from its answers."""
    judged = [rows[_key(options, entry)] for entry in entries]
    sizes = np.array([row.bytes for row in judged])
    figures: dict[str, Any] = {
        "profile": options.profile,
        "models": pipeline.digests(pipeline.backend("")),
        "photos": len(entries),
        "bytes": {"mean": float(sizes.mean()), "median": float(np.median(sizes)), "largest": int(sizes.max())},
        "bpp": float(np.mean([row.bpp for row in judged])),
        "captions": {},
        "labels": {},
    }
    for source in dict.fromkeys(entry.source for entry in entries):
        group = [(entry, row) for entry, row in zip(entries, judged, strict=True) if entry.source == source]
        captioned = [(entry, row) for entry, row in group if entry.captions]
        if captioned:
            references = [entry.captions for entry, _ in captioned]
            scores = {way: cider([getattr(row, way) for _, row in captioned], references) for way in WAYS}
            figures["captions"][source] = _compare("CIDEr", scores, [row for _, row in captioned])
        labelled = [(entry, row) for entry, row in group if entry.label and not entry.captions]
        if labelled:
            scores = {
                way: np.array([100.0 * names(getattr(row, way), entry.label or "") for entry, row in labelled])
                for way in WAYS
            }
            figures["labels"][source] = _compare("named %", scores, [row for _, row in labelled])
    return figures


def _compare(metric: str, scores: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    pixels, bitstream = scores["pixels"], scores["bitstream"]
    return {
        "metric": metric,
        "photos": len(rows),
        "bpp": float(np.mean([row.bpp for row in rows])),
        "bytes": float(np.mean([row.bytes for row in rows])),
        "pixels": {"mean": float(pixels.mean()), "95%": interval(pixels)},
        "bitstream": {"mean": float(bitstream.mean()), "95%": interval(bitstream)},
        "kept": {"ratio": float(bitstream.mean() / max(pixels.mean(), 1e-9)), "95%": kept_interval(bitstream, pixels)},
    }


def read_rows(path: Path, run: str | None = None) -> dict[str, Row]:
    """The answers so far by photo, of one run or of all. A last line that a kill cut short is dropped."""
    rows: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = Row(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if run is None or row.run == run:
                rows[row.file] = row
    return rows


def _key(options: AnswerEvaluation, entry: Entry) -> str:
    return entry.path.relative_to(options.photos).as_posix()


def _prompt(options: AnswerEvaluation, entry: Entry) -> str:
    return options.caption_prompt if entry.captions else options.label_prompt
