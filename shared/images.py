"""Reading photographs and bringing them to the size that a codec expects: the border between files and pixels.

    file or bytes -> load_photo -> Photo (upright 8-bit RGB) -> prepare -> Photo (H x W of the profile)

Everything a camera or an editor may write is turned into upright 8-bit RGB here: EXIF orientation, palettes, alpha,
CMYK, 16 bits, animation. What cannot be used is refused with one line that says why.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from shared.errors import ComneckError, TooLarge, UnreadableImage
from shared.files import read_file

MAX_PIXELS = 100_000_000  # a larger picture is refused before it is decompressed
MAX_FILE_BYTES = 200_000_000
MIN_SIDE = 2  # a picture one pixel wide shows nothing
MAX_ASPECT = 50  # beyond this a centre crop shows next to nothing of the picture

Fit = Literal["crop", "pad", "squash"]


@dataclass(frozen=True)
class Photo:
    """An upright photograph.

    Attributes:
        pixels: (H, W, 3) 8-bit sRGB.
        original_size: (width, height) of the upright picture as it was read, before any preparation.
    """

    pixels: npt.NDArray[np.uint8]
    original_size: tuple[int, int]

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])


@dataclass(frozen=True)
class Preparation:
    """How a photo becomes the codec's input (as each system's authors do it).

    Attributes:
        height: rows of the codec's input.
        width: columns of it.
        fit: ``crop`` scales the shorter side and cuts the middle out (captioning, few-shot), ``pad`` fills the shorter
            side up with white and scales the whole (Shikra, whose boxes a crop would break), ``squash`` ignores the
            aspect (Honeybee).
        resample: bicubic for all but few-shot classification, which is bilinear.
    """

    height: int = 256
    width: int = 256
    fit: Fit = "crop"
    resample: Literal["bicubic", "bilinear"] = "bicubic"


def load_photo(source: Path | bytes) -> Photo:
    """Reads a picture from a file or from its bytes.

    Raises:
        BadInput: no such file, or a folder.
        UnreadableImage: no picture, a damaged one, or one of a shape that shows nothing.
        TooLarge: over MAX_FILE_BYTES or MAX_PIXELS.
    """
    name = "the image" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes):
        data = source
    else:
        data = read_file(source, MAX_FILE_BYTES, "one picture", "scale the picture down first")
    if not data:
        raise UnreadableImage(f"{name} is empty: 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bomb is judged by our own limit, below
        try:
            with Image.open(io.BytesIO(data)) as image:
                _check_size(name, image.size)
                image.seek(0)  # of an animation, the first picture
                return _upright_rgb(image)
        except UnidentifiedImageError as problem:
            raise UnreadableImage(f"{name} is no picture in a known format (JPEG, PNG, WebP, AVIF, ...)") from problem
        except Image.DecompressionBombError as problem:
            raise TooLarge(f"{name} has more pixels than the limit of {MAX_PIXELS:,}: scale it down first") from problem
        except ComneckError:
            raise
        except Exception as problem:  # on hostile bytes a decoder raises whatever comes to it, RuntimeError for one
            raise UnreadableImage(f"{name} is damaged or cut short: {problem}") from problem


def _check_size(name: str, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise TooLarge(f"{name} is {width}x{height} pixels; the limit is {MAX_PIXELS:,} in all: scale it down first")
    if min(size) < MIN_SIDE:
        raise UnreadableImage(f"{name} is {width}x{height} pixels: a side under {MIN_SIDE} shows nothing")
    if max(size) > MAX_ASPECT * min(size):
        raise UnreadableImage(
            f"{name} is {width}x{height} pixels: longer than {MAX_ASPECT} times its width; cut the part you mean"
        )


def _upright_rgb(image: Image.Image) -> Photo:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        upright = _eight_bit(upright)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    pixels = np.asarray(upright.convert("RGB"))
    return Photo(pixels, upright.size)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale to 8 bits: by the format's own range where it fits, else by the picture's."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage("a floating-point picture with values that are not finite")
    top = 65535.0 if image.mode.startswith("I") else 1.0
    low, high = (0.0, top) if values.min() >= 0 and values.max() <= top else (values.min(), values.max())
    return Image.fromarray(np.rint((values - low) * (255.0 / max(high - low, 1e-12))).astype(np.uint8))


@dataclass(frozen=True)
class Placement:
    """Where a photo lies in what is prepared of it: prepared x = photo's x * scale - offset, in pixels; y likewise.

    Attributes:
        scale, offset: (horizontal, vertical).
    """

    scale: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def of(cls, size: tuple[int, int], preparation: Preparation) -> Placement:
        """That of a photo of ``size`` (width, height)."""
        target = (preparation.width, preparation.height)
        if preparation.fit == "crop":
            scaled, corner = _crop(size, target)
            return cls((scaled[0] / size[0], scaled[1] / size[1]), corner)
        if preparation.fit == "pad":
            canvas, corner = _canvas(size, target)
            scale = (target[0] / canvas[0], target[1] / canvas[1])
            return cls(scale, (-corner[0] * scale[0], -corner[1] * scale[1]))
        return cls((target[0] / size[0], target[1] / size[1]), (0.0, 0.0))

    def to_photo(self, x: float, y: float) -> tuple[float, float]:
        """A point of the prepared picture in the photo."""
        return (x + self.offset[0]) / self.scale[0], (y + self.offset[1]) / self.scale[1]

    def to_prepared(self, x: float, y: float) -> tuple[float, float]:
        """A point of the photo in the prepared picture."""
        return x * self.scale[0] - self.offset[0], y * self.scale[1] - self.offset[1]


def prepare(photo: Photo, preparation: Preparation) -> Photo:
    """Scales a photo to the codec's input size, (preparation.height, preparation.width)."""
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[preparation.resample]
    image = Image.fromarray(photo.pixels)
    target = (preparation.width, preparation.height)
    if preparation.fit == "crop":
        scaled, (left, top) = _crop(image.size, target)
        image = image.resize(scaled, resample).crop((left, top, left + target[0], top + target[1]))
    else:
        if preparation.fit == "pad":
            size, corner = _canvas(image.size, target)
            canvas = Image.new("RGB", size, "white")
            canvas.paste(image, corner)
            image = canvas
        image = image.resize(target, resample)
    return Photo(np.array(image), photo.original_size)  # a copy: PyTorch wants arrays that it may write to


def _crop(size: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size that a picture is scaled to, and the corner (left, top) of what is cut out of it."""
    scale = max(target[0] / size[0], target[1] / size[1])
    scaled = (max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale)))
    return scaled, (round((scaled[0] - target[0]) / 2), round((scaled[1] - target[1]) / 2))


def _canvas(size: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of a canvas of the target's aspect that holds a picture, and the corner that it is laid at (Shikra)."""
    width = max(size[0], round(size[1] * target[0] / target[1]))
    height = max(size[1], round(size[0] * target[1] / target[0]))
    return (width, height), ((width - size[0]) // 2, (height - size[1]) // 2)
