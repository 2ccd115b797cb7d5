"""A box on a photo is seen, wherever it lies and however large the photo is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ImageColor

from edge_client.overlay import COLOUR, draw_box
from shared.conversation import Box
from shared.images import Photo

YELLOW = ImageColor.getrgb(COLOUR)


def plain(width: int, height: int, colour: tuple[int, int, int] = (90, 120, 150)) -> Photo:
    return Photo(np.full((height, width, 3), colour, np.uint8), (width, height))


def changed(before: Photo, after: Photo) -> tuple[int, int, int, int]:
    """The rectangle (left, top, right, bottom) of what is drawn, of which right and bottom are outside."""
    rows, columns = np.nonzero((before.pixels != after.pixels).any(2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def is_line(pixels: npt.NDArray[np.uint8]) -> bool:
    return bool((pixels == YELLOW).all())


def test_the_line_lies_within_the_box_and_what_is_in_it_stays() -> None:
    photo = plain(640, 480)
    drawn = draw_box(photo, Box(100, 200, 300, 400), "where is the dog?").pixels
    assert is_line(drawn[200:204, 100:300])
    assert is_line(drawn[396:400, 100:300])
    assert is_line(drawn[200:400, 100:104])
    assert is_line(drawn[200:400, 296:300])
    assert (drawn[206:394, 106:294] == photo.pixels[206:394, 106:294]).all()
    assert (photo.pixels == (90, 120, 150)).all()


@pytest.mark.parametrize(("width", "line"), [(100, 1), (640, 4), (4000, 25)])
def test_the_line_is_as_wide_as_the_photo_needs(width: int, line: int) -> None:
    drawn = draw_box(plain(width, width // 2), Box(0.2 * width, 0.2 * width, 0.8 * width, 0.4 * width), "it").pixels
    row = (drawn[3 * width // 10, : width // 2] == YELLOW).all(1)
    assert row.sum() == line


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), YELLOW])
def test_the_box_is_seen_on_any_ground(colour: tuple[int, int, int]) -> None:
    photo = plain(640, 480, colour)
    row = draw_box(photo, Box(100, 200, 300, 400), "it").pixels[300, :200].astype(int)
    assert np.abs(row - colour).sum(1).max() > 250


def test_the_words_stand_above_the_box() -> None:
    photo = plain(640, 480)
    with_words = draw_box(photo, Box(100, 200, 300, 400), "where is\n the dog?")
    one_line = draw_box(photo, Box(100, 200, 300, 400), "where is the dog?")
    assert (with_words.pixels == one_line.pixels).all()
    other = draw_box(photo, Box(100, 200, 300, 400), "where is the cat?")
    left, top, right, bottom = changed(with_words, other)
    assert 100 <= left < right <= 640
    assert 150 < top < bottom <= 200


def test_words_without_room_above_stand_inside() -> None:
    photo, box = plain(640, 480), Box(100, 3, 300, 400)
    _, top, _, bottom = changed(draw_box(photo, box, "a dog"), draw_box(photo, box, "a cat"))
    assert 3 <= top < bottom < 50


def test_words_that_are_too_long_are_cut_at_the_photos_edge() -> None:
    photo, box = plain(640, 480), Box(500, 200, 600, 400)
    long, longer = draw_box(photo, box, "dog " * 100), draw_box(photo, box, "dog " * 1000)
    assert (long.pixels == longer.pixels).all()
    left, _, right, _ = changed(photo, long)
    assert left < 40
    assert 600 < right <= 640


@pytest.mark.parametrize("size", [(640, 480), (50, 2500), (5, 3), (2, 2)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.5, 0.5, 0.5, 0.5), (1, 1, 1, 1), (0, 0, 0, 0), (0.3, 0, 0.31, 1)])
def test_any_box_on_any_photo_is_seen(size: tuple[int, int], box: tuple[float, float, float, float]) -> None:
    photo = plain(*size)
    width, height = size
    drawn = draw_box(photo, Box(box[0] * width, box[1] * height, box[2] * width, box[3] * height), "the dog")
    assert drawn.pixels.shape == photo.pixels.shape
    assert drawn.original_size == size
    assert (drawn.pixels == YELLOW).all(2).sum() >= min(8, width * height)
