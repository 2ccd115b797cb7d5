"""The container's promises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.bitstream import Bitstream
from shared.errors import BadBitstream

STREAM = Bitstream(
    scenario="d1",
    rate=2,
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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "too few"),
        (bytes(STREAM)[:16], "too few"),
        (b"\xff\xd8" + bytes(STREAM), "not a comneck bitstream"),
        (b"\x02" + bytes(STREAM)[1:], "version"),
        (b"\x01\x02" + bytes(STREAM)[2:], "scenario 0"),
        (b"\x01\x42" + bytes(STREAM)[2:], "scenario 4"),
        (bytes(STREAM)[:6] + b"\x00" + bytes(STREAM)[7:], "zero"),
        (bytes(STREAM)[:8] + b"\x00\x00" + bytes(STREAM)[10:], "zero"),
    ],
)
def test_bytes_without_meaning_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadBitstream, match=reason):
        Bitstream.parse(data)
