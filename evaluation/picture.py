"""Photos, bytes and answers as one picture, drawn from the answers of ``comneck evaluate answers``."""

from __future__ import annotations

import random
import textwrap
from dataclasses import dataclass
from pathlib import Path

from evaluation.answers import read_rows
from shared.errors import BadInput
from shared.images import Preparation, load_photo, prepare
from shared.options import option
from training.photos import read_photo_set


@dataclass(frozen=True)
class PictureOptions:
    """``comneck evaluate picture``: photos chosen by seed, with their bytes and answers."""

    photos: Path = option("folder of photos that was measured")
    answers: Path = option("the .answers.jsonl file of `comneck evaluate answers`")
    out: Path = option("picture to write, PNG; the photos' authors go beside it")
    exam: str = option("whose answers", "captions")
    sources: tuple[str, ...] = option("only photos of these sources, whose licence lets you show them", ())
    count: int = option("how many photos", 10)
    columns: int = option("photos a row", 5)
    seed: int = option("which photos: drawn by this seed, not by hand", 0)


def run(options: PictureOptions) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = {entry.path.relative_to(options.photos).as_posix(): entry for entry in read_photo_set(options.photos)}
    rows = sorted(read_rows(options.answers).values(), key=lambda row: (row.file, row.number))
    rows = [row for row in rows if row.exam == options.exam]
    if options.sources:
        rows = [row for row in rows if entries[row.file].source in options.sources]
    if len(rows) < options.count:
        raise BadInput(f"{options.answers} has {len(rows)} such answers; {options.count} were asked for")
    chosen = random.Random(options.seed).sample(rows, options.count)
    lines = -(-options.count // options.columns)
    figure, axes = plt.subplots(lines, options.columns, figsize=(3.1 * options.columns, 4.5 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, chosen, strict=False):
        axis.imshow(prepare(load_photo(options.photos / row.file), Preparation()).pixels)
        axis.set_title(f"{row.bytes:,} bytes", fontsize=11, fontweight="bold")
        said = [("from the bitstream", row.bitstream), ("from pixels", row.pixels)]
        text = "\n\n".join(f"{way}:\n{textwrap.fill(answer, 34)}" for way, answer in said)
        axis.text(0, -0.04, text, transform=axis.transAxes, va="top", fontsize=9)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.96, bottom=0.16, hspace=0.62, wspace=0.06)
    figure.savefig(options.out, dpi=90)
    plt.close(figure)
    credits = [
        f"{number}. {row.file}: {entries[row.file].credit or 'author unknown'}" for number, row in enumerate(chosen, 1)
    ]
    heading = f"The photos of {options.out.name}, row by row:\n\n"
    options.out.with_suffix(".credits.md").write_text(heading + "\n".join(credits) + "\n", encoding="utf-8")
