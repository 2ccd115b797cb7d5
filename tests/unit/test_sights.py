"""What CLIP has seen of a photo is kept and never computed twice; boxes find their way into the user's photo."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from cloud_server.pipeline import SightCache, in_photo
from cloud_server.vision.clip import ClipTower, VisionNeeds
from shared.conversation import Box
from shared.images import Fit, Photo, Placement, Preparation, prepare
from shared.profiles import ClipSpec

SPEC = ClipSpec(weights="none", patch=16, width=32, layers=5, heads=2, projection=8, image=64)


class CountingTower(ClipTower):
    """Remembers which blocks it ran, and over how many photos."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(SPEC)
        self.ran: list[tuple[int, int, int]] = []

    def blocks(self, tokens: Tensor, first: int, last: int) -> Tensor:
        self.ran.append((first, last, len(tokens)))
        return super().blocks(tokens, first, last)


@pytest.fixture
def tower() -> CountingTower:
    return CountingTower().eval()


def photos(count: int) -> list[dict[int, Tensor]]:
    """As the neck gives them, at block 2."""
    source = torch.Generator().manual_seed(1)
    return [{1: torch.randn(17, 32, generator=source)} for _ in range(count)]


@torch.inference_mode()
def test_a_second_look_continues_where_the_first_ended(tower: CountingTower) -> None:
    (sight,) = photos(1)
    tower.see([sight], -2)
    tower.see([sight], -1)
    tower.see([sight], -2)
    assert tower.ran == [(2, 3, 1), (4, 4, 1)]
    (whole,) = photos(1)
    tower.see([whole], -1)
    assert torch.equal(sight[4], whole[4])


@torch.inference_mode()
def test_what_another_backend_will_read_is_kept_on_the_way(tower: CountingTower) -> None:
    (sight,) = photos(1)
    tower.see([sight], -1, stops=[-1, -2])
    assert set(sight) == {1, 3, 4}
    assert tower.ran == [(2, 3, 1), (4, 4, 1)]


@torch.inference_mode()
def test_photos_that_have_come_as_far_go_on_together(tower: CountingTower) -> None:
    sights = photos(3)
    tower.see(sights[:1], -2)
    tower.ran.clear()
    tower.see(sights, -1)
    assert sorted(tower.ran) == [(2, 4, 2), (4, 4, 1)]
    alone = photos(3)
    for one, other in zip(sights, alone, strict=True):
        tower.see([other], -1)
        torch.testing.assert_close(tower.read(one, VisionNeeds()), tower.read(other, VisionNeeds()))
        projected = tower.read(one, VisionNeeds(project=True))
        torch.testing.assert_close(projected, tower.project(other[4]))


def test_the_photo_asked_about_longest_ago_is_forgotten_first() -> None:
    cache = SightCache(2)
    first, second, third = photos(3)
    cache.put(b"first", first)
    cache.put(b"second", second)
    cache.put(b"first", first)
    cache.put(b"third", third)
    assert cache.get(b"first") is first
    assert cache.get(b"second") is None
    nothing = SightCache(0)
    nothing.put(b"first", first)
    assert nothing.get(b"first") is None


FITS: tuple[Fit, ...] = ("crop", "pad", "squash")


@pytest.mark.parametrize(("fit", "size"), [*product(FITS, [(300, 200), (200, 301), (64, 64), (641, 480)])])
def test_a_bright_spot_is_found_again_where_it_was(fit: Fit, size: tuple[int, int]) -> None:
    width, height = size
    truth = Box(0.45 * width, 0.4 * height, 0.6 * width, 0.65 * height)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[round(truth.top) : round(truth.bottom), round(truth.left) : round(truth.right)] = (255, 0, 0)
    preparation = Preparation(96, 128, fit)
    seen = prepare(Photo(pixels, size), preparation).pixels
    rows, columns = np.nonzero((seen[..., 0] > 127) & (seen[..., 1] < 127))
    fractions = (columns.min() / 128, rows.min() / 96, (columns.max() + 1) / 128, (rows.max() + 1) / 96)
    found = in_photo(fractions, size, preparation)
    unit = max(width / 128, height / 96) * 1.5
    for ours, true in zip(vars(found).values(), vars(truth).values(), strict=True):
        assert ours == pytest.approx(true, abs=unit)


@pytest.mark.parametrize("fit", FITS)
def test_a_point_there_and_back_is_the_same_point(fit: Fit) -> None:
    placement = Placement.of((641, 480), Preparation(256, 256, fit))
    assert placement.to_photo(*placement.to_prepared(123.0, 45.0)) == pytest.approx((123, 45))


def test_a_box_outside_the_photo_is_cut_off_and_its_corners_are_sorted() -> None:
    assert in_photo((0.9, 0.8, -3, 9.99), (200, 100), Preparation(64, 64, "squash")) == Box(0, 80, 180, 100)
    in_the_border = in_photo((0, 0, 1, 0.1), (200, 100), Preparation(64, 64, "pad"))
    assert in_the_border == Box(0, 0, 200, 0)
