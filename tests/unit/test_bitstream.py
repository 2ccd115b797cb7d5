"""The container's promises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.bitstream import Bitstream, Extension
from shared.errors import BadBitstream

STREAM = Bitstream(
    scenario="d1",
    quality=2,
    codec_digest=b"\x01\x02\x03\x04",
    height=256,
    width=512,
    original_size=(4032, 3024),
    check=0xDEADBEEF,
    payload=b"payload",
)


def test_every_field_survives_the_way_through_bytes() -> None:
    assert Bitstream.parse(bytes(STREAM)) == STREAM


def test_the_container_adds_sixteen_bytes() -> None:
    assert len(bytes(STREAM)) == len(STREAM) == len(STREAM.payload) + 16


def test_bits_per_pixel_count_the_whole_file() -> None:
    assert STREAM.bpp == 8 * 23 / (256 * 512)


def test_an_original_too_large_for_its_field_is_capped() -> None:
    assert Bitstream.parse(bytes(replace(STREAM, original_size=(70000, 10)))).original_size == (65535, 10)


def test_extensions_that_may_be_skipped_survive_too() -> None:
    extended = replace(STREAM, extensions=(Extension(1, b"map"), Extension(127, b"")))
    assert Bitstream.parse(bytes(extended)) == extended
    assert len(extended) == len(bytes(extended)) == len(STREAM) + 3 + 3 + 3 + 1


def test_an_extension_that_must_be_understood_is_refused() -> None:
    with pytest.raises(BadBitstream, match="extension 128 must be understood"):
        Bitstream.parse(bytes(replace(STREAM, extensions=(Extension(128, b"two photos"),))))


def test_the_check_value_covers_every_byte_but_itself() -> None:
    sealed = replace(STREAM, extensions=(Extension(1, b"map"),))
    data = bytes(sealed)
    for place in (*range(1, 12), *range(16, len(data))):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            parsed = Bitstream.parse(changed)
        except BadBitstream:
            continue
        assert parsed.seal(symbols=7) != sealed.seal(symbols=7)
    assert sealed.seal(symbols=7) != sealed.seal(symbols=8)


def with_bytes(at: int, new: bytes) -> bytes:
    data = bytes(STREAM)
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too few"),
        (bytes(STREAM)[:15], "too few"),
        (b"\xff\xd8" + bytes(STREAM), "not a comneck bitstream"),
        (with_bytes(0, b"\x20"), "later version than 1"),
        (with_bytes(0, b"\x12"), "later version than 1"),
        (with_bytes(1, b"\x02"), "scenario 0"),
        (with_bytes(1, b"\x42"), "scenario 4"),
        (with_bytes(1, b"\x10"), "quality 0"),
        (with_bytes(6, b"\x00"), "zero"),
        (with_bytes(8, b"\x00\x00"), "zero"),
        (with_bytes(0, b"\x11") + b"\x00", "ends within its extension"),
        (with_bytes(0, b"\x11")[:16], "ends within its extensions"),
        (with_bytes(0, b"\x11")[:16] + b"\x00", "announces extensions and has none"),
        (with_bytes(0, b"\x11")[:16] + b"\x01\x00\x05abc", "ends within its extension 1"),
    ],
)
def test_bytes_without_meaning_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadBitstream, match=reason):
        Bitstream.parse(data)
