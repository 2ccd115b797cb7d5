"""Showing an answer's box on the user's own photo."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edge_client.stored import picture_bytes, picture_format
from shared.bitstream import Bitstream
from shared.conversation import Box
from shared.errors import BadInput, NothingFound
from shared.files import check_writable, write_file
from shared.images import Photo

COLOUR, EDGE = "#ffd400", "black"  # one of them stands out from whatever is behind


@dataclass(frozen=True)
class Overlay:
    """A picture file to come: a photo with a box drawn into it.

    Attributes:
        path: of the picture.
        photo: upright, as it was read.
        source: its file.
        format: Pillow's name of the picture's.
    """

    path: Path
    photo: Photo
    source: Path
    format: str

    @classmethod
    def plan(cls, path: Path, image: Photo | Bitstream, source: Path) -> Overlay:
        """Raises BadInput for all that can be known to be wrong before there is a box."""
        if isinstance(image, Bitstream):
            raise BadInput(f"{source} is a bitstream, which no box can be drawn on: give the photo itself")
        format = picture_format(path)
        check_writable(path, source)
        return cls(path, image, source, format)

    def write(self, box: Box | None, words: str) -> None:
        """
        Args:
            words: that were asked; they stand above the box.

        Raises:
            NothingFound: there is no box.
            BadInput: the file cannot be written after all.
        """
        if box is None:
            raise NothingFound(f"the answer holds no box, so {self.path} is not written: ask in other words")
        write_file(self.path, picture_bytes(draw_box(self.photo, box, words), self.format), self.source)


def draw_box(photo: Photo, box: Box, words: str) -> Photo:
    """A photo with a box around something and words above it, in sizes that follow the photo's.

    The line lies within the box, and a box smaller than three lines is drawn as large as that. Words that are too long
    for the photo are cut; where there is no room above the box they stand inside, at its top.
    """
    image = Image.fromarray(photo.pixels)
    draw = ImageDraw.Draw(image)
    line = max(1, round(max(image.size) / 160))
    left, right = _stretch(box.left, box.right, 3 * line, photo.width)
    top, bottom = _stretch(box.top, box.bottom, 3 * line, photo.height)
    edge = max(1, line // 3)
    draw.rectangle((left - edge, top - edge, right + edge, bottom + edge), outline=EDGE, width=line + 2 * edge)
    draw.rectangle((left, top, right, bottom), outline=COLOUR, width=line)

    font = ImageFont.load_default(max(10, 5 * line))
    margin = line + edge
    text = _cut(" ".join(words.split()), font, photo.width - 2 * margin)
    _, first, length, last = font.getbbox(text)
    width, height = round(length) + 2 * margin, round(last - first) + 2 * margin
    x, y = max(0, min(left, photo.width - width)), top - height if top >= height else top
    if text:
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=COLOUR, outline=EDGE, width=edge)
        draw.text((x + margin, y + margin - first), text, fill=EDGE, font=font)
    return Photo(np.asarray(image), photo.original_size)


def _stretch(first: float, last: float, least: int, limit: int) -> tuple[int, int]:
    """First and last pixel of a side of at least so many, within a photo of ``limit``."""
    length = min(limit, max(least, round(last) - round(first)))
    start = max(0, min(round((first + last - length) / 2), limit - length))
    return start, start + length - 1


def _cut(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float) -> str:
    """As much of the words as there is room for, in pixels."""
    if font.getlength(words) <= room:
        return words
    fitting = bisect(range(1, len(words)), room, key=lambda count: font.getlength(words[:count].rstrip() + "..."))
    return words[:fitting].rstrip() + "..." if fitting else ""
