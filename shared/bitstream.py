"""The container: 16 bytes that say what a payload is, and the payload (docs/bitstream.md).

offset  bytes
0       1      format version (high 4 bits: 1) and flags (low 4 bits: 1 extensions follow the header, others 0)
1       1      scenario (high 4 bits: d1, d2, d3 as 1, 2, 3) and quality (low 4 bits: 1 to 15)
2       4      codec digest: what the codec decodes with, first 4 bytes
6       1+1    codec input height and width, in units of 64 pixels
8       2+2    width and height of the original photo, upright
12      4      CRC-32 of the decoded symbols, then of everything else in this stream
16      ...    extensions, if any; entropy-coded payload, to the end
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

from shared.errors import BadBitstream

MEDIA_TYPE = "application/vnd.comneck"
SUFFIX = ".cnk"
VERSION = 1
UNIT = 64
MAX_SIDE = 255 * UNIT
MAX_PIXELS = 2**21  # of input that a decoder agrees to, unless told otherwise: full HD fits
QUALITIES = range(1, 16)

Scenario = Literal["d1", "d2", "d3"]
_SCENARIOS: tuple[Scenario, ...] = ("d1", "d2", "d3")
_HEADER = struct.Struct(">BB4sBBHHI")
_CHECKED = _HEADER.size - 4  # the bytes before the check value
_EXTENSION = struct.Struct(">BH")  # type and length
_EXTENDED = 1  # the flag
_CRITICAL = 128  # the bit of a type that says: not to be skipped


@dataclass(frozen=True)
class Extension:
    """A field that version 1 did not have. Types from 128 must be understood, others may be skipped."""

    type: int
    data: bytes


@dataclass(frozen=True)
class Bitstream:
    """One encoded photo.

    Attributes:
        scenario: how the codec was trained (ComNeck, Table 1).
        quality: the rate point, 1 to 15; more is larger and better.
        codec_digest: 4 bytes that name what the codec decodes with.
        height, width: of the codec's input in pixels, multiples of 64.
        original_size: (width, height) of the upright photo before preparation; at most 65,535, larger ones are capped.
        check: CRC-32 as ``seal`` computes it.
        payload: what the entropy coder wrote.
        extensions: none in version 1; those of later versions that may be skipped are kept.
    """

    scenario: Scenario
    quality: int
    codec_digest: bytes
    height: int
    width: int
    original_size: tuple[int, int]
    check: int
    payload: bytes
    extensions: tuple[Extension, ...] = ()

    def __bytes__(self) -> bytes:
        return self._header() + self.check.to_bytes(4, "big") + self._body()

    def __len__(self) -> int:
        """Bytes of the whole bitstream."""
        return _HEADER.size + len(self._body())

    @property
    def pixels(self) -> int:
        """Of the codec's input."""
        return self.height * self.width

    @property
    def bpp(self) -> float:
        """Bits per pixel of the codec's input: the figure that the paper reports."""
        return 8 * len(self) / self.pixels

    def seal(self, symbols: int) -> int:
        """The check value, given the CRC-32 of the symbols: it covers them and every other byte of the stream."""
        return zlib.crc32(self._body(), zlib.crc32(self._header(), symbols))

    def _header(self) -> bytes:
        """The header without its check value."""
        width, height = (min(side, 65535) for side in self.original_size)
        first = VERSION << 4 | (_EXTENDED if self.extensions else 0)
        kind = (_SCENARIOS.index(self.scenario) + 1) << 4 | self.quality
        fields = (first, kind, self.codec_digest, self.height // UNIT, self.width // UNIT, width, height, 0)
        return _HEADER.pack(*fields)[:_CHECKED]

    def _body(self) -> bytes:
        if not self.extensions:
            return self.payload
        fields = b"".join(_EXTENSION.pack(one.type, len(one.data)) + one.data for one in self.extensions)
        return fields + b"\0" + self.payload

    @classmethod
    def parse(cls, data: bytes) -> Bitstream:
        """Reads a container. What is inside the payload is checked when it is decoded.

        Raises:
            BadBitstream: too short, another format or version, or fields without meaning.
        """
        if len(data) < _HEADER.size:
            raise BadBitstream(f"{len(data)} bytes are too few for a bitstream: its header alone has {_HEADER.size}")
        first, kind, digest, rows, columns, width, height, check = _HEADER.unpack_from(data)
        version, flags = first >> 4, first & 15
        if version != VERSION or flags & ~_EXTENDED:
            raise BadBitstream(
                f"not a comneck bitstream, or of a later version than {VERSION}: it begins with byte {first:#04x}"
            )
        scenario, quality = kind >> 4, kind & 15
        if not 1 <= scenario <= len(_SCENARIOS) or not quality:
            raise BadBitstream(
                f"scenario {scenario}, quality {quality}: this version knows {', '.join(_SCENARIOS)}, qualities 1 to 15"
            )
        if not rows or not columns or not width or not height:
            raise BadBitstream("a side of length zero")
        extensions, payload = _read_extensions(data) if flags & _EXTENDED else ((), _HEADER.size)
        return cls(
            scenario=_SCENARIOS[scenario - 1],
            quality=quality,
            codec_digest=digest,
            height=rows * UNIT,
            width=columns * UNIT,
            original_size=(width, height),
            check=check,
            payload=data[payload:],
            extensions=extensions,
        )


def _read_extensions(data: bytes) -> tuple[tuple[Extension, ...], int]:
    """The extensions, and where the payload begins."""
    found: list[Extension] = []
    at = _HEADER.size
    while data[at : at + 1] != b"\0":
        if at + _EXTENSION.size > len(data):
            raise BadBitstream("the stream ends within its extensions")
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size + length
        if at > len(data):
            raise BadBitstream(f"the stream ends within its extension {kind}")
        if kind & _CRITICAL:
            raise BadBitstream(f"extension {kind} must be understood, and this version does not know it: update")
        found.append(Extension(kind, data[at - length : at]))
    if not found:
        raise BadBitstream("a stream that announces extensions and has none")
    return tuple(found), at + 1
