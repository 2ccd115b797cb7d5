"""Every picture that a camera, an editor or an attacker may send."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from shared.errors import BadInput, ComneckError, TooLarge, UnreadableImage
from shared.images import Photo, Preparation, load_photo, prepare

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def quarters(width: int = 80, height: int = 40) -> Image.Image:
    """Red and green above blue and white: one glance tells how it lies."""
    image = Image.new("RGB", (width, height), WHITE)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def corners(photo: Photo) -> list[tuple[int, ...]]:
    """Colours at top left, top right, bottom left, bottom right; each channel rounded to 0, 128 or 255."""
    at = [photo.pixels[y, x] for y in (5, -6) for x in (5, -6)]
    return [tuple(min((0, 128, 255), key=lambda level: abs(int(v) - level)) for v in colour) for colour in at]


def png_of_size(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG that declares any size, whatever it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# What can be read


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_every_common_format_is_read(kind: str) -> None:
    photo = load_photo(encoded(quarters(), kind))
    assert (photo.width, photo.height, photo.original_size) == (80, 40, (80, 40))
    assert corners(photo) == [RED, GREEN, BLUE, WHITE]
    assert photo.pixels.dtype == np.uint8


def test_a_file_and_its_bytes_are_the_same_photo(tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    path.write_bytes(encoded(noise()))
    assert np.array_equal(load_photo(path).pixels, load_photo(path.read_bytes()).pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_that_the_camera_held_otherwise_is_turned_upright(orientation: int, kind: str) -> None:
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = quarters()
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = load_photo(encoded(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})))
    assert corners(photo) == [RED, GREEN, BLUE, WHITE]
    assert photo.original_size == (80, 40)


def test_nonsense_in_exif_is_no_reason_to_refuse() -> None:
    assert load_photo(encoded(noise(), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)).width == 64
    exif = Image.Exif()
    exif[0x0112] = 77
    assert load_photo(encoded(noise(), "JPEG", exif=exif)).width == 64


def test_a_palette_is_looked_up() -> None:
    assert corners(load_photo(encoded(quarters().quantize(8)))) == [RED, GREEN, BLUE, WHITE]


def test_cmyk_becomes_rgb() -> None:
    assert corners(load_photo(encoded(quarters().convert("CMYK"), "JPEG", quality=95))) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "YCbCr", "LAB", "HSV", "RGBX"])
def test_a_picture_in_any_mode_becomes_rgb(mode: str) -> None:
    kinds = {"YCbCr": "JPEG", "LAB": "TIFF", "PA": "TIFF", "RGBX": "TIFF"}
    source = quarters()
    if mode == "LAB":
        image = Image.new("LAB", (80, 40), (128, 128, 128))
    elif mode == "PA":
        image = source.convert("P").convert("PA")
    elif mode == "HSV":
        image, mode = source.convert("HSV").convert("RGB"), "RGB"
    else:
        image = source.convert(mode)
    photo = load_photo(encoded(image, kinds.get(mode, "PNG")))
    assert photo.pixels.shape == (40, 80, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (80, 40), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 40, 40))
    photo = load_photo(encoded(image.convert(mode)))
    assert corners(photo) == [(0, 0, 0), WHITE, (0, 0, 0), WHITE]


def test_half_transparent_is_half_white() -> None:
    photo = load_photo(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))))
    assert abs(int(photo.pixels[4, 4, 0]) - 127) <= 1


def test_the_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.new("P", (80, 40), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 0, 40, 40))
    for kind in ("PNG", "GIF"):
        assert corners(load_photo(encoded(image, kind, transparency=0))) == [RED, WHITE, RED, WHITE]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_brightness(kind: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    photo = load_photo(encoded(Image.fromarray(ramp), kind))
    assert photo.pixels[0, 0].tolist() == [0, 0, 0]
    assert photo.pixels[0, -1].tolist() == [255, 255, 255]
    assert abs(int(photo.pixels[0, 32, 0]) - 130) <= 1


def test_a_dark_sixteen_bit_picture_stays_dark() -> None:
    dark = np.full((48, 64), 6553, np.uint16)
    assert load_photo(encoded(Image.fromarray(dark))).pixels.max() in (25, 26)


def test_a_big_endian_sixteen_bit_file_is_read() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    photo = load_photo(encoded(Image.frombytes("I;16B", (64, 48), ramp.astype(">u2").tobytes()), "TIFF"))
    assert abs(int(photo.pixels[0, 32, 0]) - 130) <= 1


def test_floats_are_brought_to_eight_bits() -> None:
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (48, 1))
    assert abs(int(load_photo(encoded(Image.fromarray(ramp), "TIFF")).pixels[0, 32, 0]) - 130) <= 1
    assert np.ptp(load_photo(encoded(Image.fromarray(ramp * 9 - 3), "TIFF")).pixels) == 255


def test_floats_that_are_not_finite_are_refused() -> None:
    values: npt.NDArray[np.float32] = np.full((8, 8), np.nan, np.float32)
    with pytest.raises(UnreadableImage, match="not finite"):
        load_photo(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (64, 48), colour) for colour in (GREEN, RED, BLUE)]
    options = {"quality": 95} if kind in ("WEBP", "AVIF") else {}
    photo = load_photo(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert corners(photo) == [GREEN] * 4


def test_the_smallest_picture_that_shows_something_is_taken() -> None:
    assert load_photo(encoded(noise(2, 2))).width == 2


# What cannot


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"hello, this is text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"%PDF-1.7\n%\xe2"]
)
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        load_photo(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_a_file_cut_anywhere_is_refused_or_read_whole(kind: str) -> None:
    data = encoded(noise(), kind)
    whole = load_photo(data).pixels
    for end in sorted({1, 2, 9, 33, *range(0, len(data), max(1, len(data) // 40)), len(data) - 9}):
        try:
            cut = load_photo(data[:end]).pixels
        except UnreadableImage:
            continue
        assert np.array_equal(cut, whole), f"half a picture was taken for a whole one, cut at {end} of {len(data)}"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "JPEG2000"])
def test_a_damaged_file_is_read_or_refused_but_never_a_crash(kind: str) -> None:
    data = encoded(noise(), kind)
    source = np.random.default_rng(2)
    for _ in range(60):
        damaged = bytearray(data)
        for place in source.integers(0, len(data), 4):
            damaged[place] = source.integers(0, 256)
        with contextlib.suppress(UnreadableImage, TooLarge):
            load_photo(bytes(damaged))


@pytest.mark.parametrize(("width", "height"), [(0, 10), (10, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(width: int, height: int) -> None:
    with pytest.raises(UnreadableImage):
        load_photo(png_of_size(width, height))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000), (20_000, 1), (1, 300)])
def test_a_picture_one_pixel_wide_is_refused_with_its_size(width: int, height: int) -> None:
    with pytest.raises(UnreadableImage, match=f"{width}x{height} pixels"):
        load_photo(encoded(Image.new("RGB", (width, height))))


@pytest.mark.parametrize(("width", "height"), [(2, 20_000), (5100, 100)])
def test_a_strip_is_refused_with_its_size(width: int, height: int) -> None:
    with pytest.raises(UnreadableImage, match=f"{width}x{height} pixels: .* 50 times"):
        load_photo(encoded(Image.new("RGB", (width, height))))


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_001, 10_000)])
def test_a_decompression_bomb_is_refused_before_it_is_decompressed(width: int, height: int) -> None:
    bomb = png_of_size(width, height, rows=bytes(1_000_000))
    assert len(bomb) < 2000
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match=r"limit.* 100,000,000"):
            load_photo(bomb)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_bomb_among_the_metadata_is_refused() -> None:
    data = b"Comment\0\0" + zlib.compress(bytes(20_000_000))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    picture = encoded(noise())
    with pytest.raises(UnreadableImage):
        load_photo(picture[:33] + chunk + picture[33:])


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a folder"):
        load_photo(tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        load_photo(tmp_path / "nothing.png")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput):
        load_photo(tmp_path / name)


def test_a_file_without_end_is_refused_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.images.MAX_FILE_BYTES", 1000)
    with pytest.raises(TooLarge, match=r"larger than 1,000 bytes"):
        load_photo(Path("/dev/zero"))


def test_an_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(UnreadableImage, match=r"empty\.png is empty"):
        load_photo(path)


def test_every_refusal_is_one_line(tmp_path: Path) -> None:
    for source in (b"text", png_of_size(60_000, 60_000), png_of_size(0, 1), tmp_path, tmp_path / "nothing"):
        with pytest.raises(ComneckError) as caught:
            load_photo(source)
        assert "\n" not in str(caught.value)


# Preparation


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (333, 777), (256, 256), (2, 2), (3, 100), (5000, 101)])
def test_every_shape_comes_out_as_the_profile_wants(fit: Any, size: tuple[int, int]) -> None:
    photo = Photo(np.full((size[1], size[0], 3), 128, np.uint8), size)
    prepared = prepare(photo, Preparation(256, 320, fit))
    assert prepared.pixels.shape == (256, 320, 3)
    assert prepared.original_size == size
    assert prepared.pixels.flags.writeable  # or PyTorch warns
    if fit != "pad":
        assert (prepared.pixels == 128).all()


def test_crop_takes_the_middle() -> None:
    stripes = Image.new("RGB", (300, 100), RED)
    stripes.paste(GREEN, (100, 0, 200, 100))
    prepared = prepare(Photo(np.asarray(stripes), (300, 100)), Preparation(256, 256, "crop"))
    assert corners(prepared) == [GREEN] * 4


def test_pad_adds_white_and_keeps_all() -> None:
    prepared = prepare(Photo(np.asarray(Image.new("RGB", (300, 100), RED)), (300, 100)), Preparation(256, 256, "pad"))
    assert corners(prepared) == [WHITE] * 4
    assert tuple(prepared.pixels[128, 128]) == RED
    assert tuple(prepared.pixels[128, 5]) == RED


def test_preparing_twice_changes_nothing() -> None:
    once = prepare(load_photo(encoded(noise())), Preparation())
    assert np.array_equal(prepare(once, Preparation()).pixels, once.pixels)
