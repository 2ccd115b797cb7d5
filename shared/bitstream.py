"""The container: 16 bytes that say what a payload is, and the payload (docs/bitstream.md).

offset  bytes
0       1      format version, 1
1       1      scenario (high 4 bits: d1, d2, d3 as 1, 2, 3) and rate index (low 4 bits)
2       4      codec digest: first 4 bytes of the SHA-256 over the codec's tensors
6       1+1    codec input height and width, in units of 64 pixels
8       2+2    width and height of the original photo, upright, big-endian
12      4      CRC-32 of the decoded symbols, big-endian
16      ...    entropy-coded payload, to the end
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from shared.errors import BadBitstream

MEDIA_TYPE = "application/vnd.comneck"
VERSION = 1
UNIT = 64
MAX_SIDE = 255 * UNIT

Scenario = Literal["d1", "d2", "d3"]
_SCENARIOS: tuple[Scenario, ...] = ("d1", "d2", "d3")
_HEADER = struct.Struct(">BB4sBBHHI")


@dataclass(frozen=True)
class Bitstream:
    """One encoded photo.

    Attributes:
        scenario: how the codec was trained (ComNeck, Table 1).
        rate: index of the rate point, 0 to 15.
        codec_digest: 4 bytes that name the codec weights.
        height, width: of the codec's input in pixels, multiples of 64.
        original_size: (width, height) of the upright photo before preparation; at most 65,535, larger ones are capped.
        check: CRC-32 over the symbols of z, then y, each in raster order as little-endian 16-bit integers.
        payload: what the entropy coder wrote.
    """

    scenario: Scenario
    rate: int
    codec_digest: bytes
    height: int
    width: int
    original_size: tuple[int, int]
    check: int
    payload: bytes

    def __bytes__(self) -> bytes:
        width, height = (min(side, 65535) for side in self.original_size)
        kind = (_SCENARIOS.index(self.scenario) + 1) << 4 | self.rate
        header = _HEADER.pack(
            VERSION, kind, self.codec_digest, self.height // UNIT, self.width // UNIT, width, height, self.check
        )
        return header + self.payload

    def __len__(self) -> int:
        """Bytes of the whole bitstream."""
        return _HEADER.size + len(self.payload)

    @property
    def bpp(self) -> float:
        """Bits per pixel of the codec's input: the figure that the paper reports."""
        return 8 * len(self) / (self.height * self.width)

    @classmethod
    def parse(cls, data: bytes) -> Bitstream:
        """Reads a container. What is inside the payload is checked when it is decoded.

        Raises:
            BadBitstream: too short, another format or version, or fields without meaning.
        """
        if len(data) <= _HEADER.size:
            raise BadBitstream(f"{len(data)} bytes are too few for a bitstream: its header alone has {_HEADER.size}")
        version, kind, digest, rows, columns, width, height, check = _HEADER.unpack_from(data)
        if version != VERSION:
            raise BadBitstream(
                f"not a comneck bitstream, or of a format version other than {VERSION}: first byte {version}"
            )
        scenario, rate = kind >> 4, kind & 15
        if not 1 <= scenario <= len(_SCENARIOS):
            raise BadBitstream(f"scenario {scenario} is unknown; this version knows {', '.join(_SCENARIOS)}")
        if not rows or not columns or not width or not height:
            raise BadBitstream("a side of length zero")
        return cls(
            scenario=_SCENARIOS[scenario - 1],
            rate=rate,
            codec_digest=digest,
            height=rows * UNIT,
            width=columns * UNIT,
            original_size=(width, height),
            check=check,
            payload=data[_HEADER.size :],
        )
