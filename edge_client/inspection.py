"""What is in a bitstream: every field of its header, its bytes by part, and whether this machine decodes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from edge_client.stored import find_codec
from shared.bitstream import VERSION, Bitstream
from shared.errors import ProfileMismatch, TooLarge


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found.

    Attributes:
        header, extensions, payload: bytes of each part.
        profile: name of one whose codec decodes it; empty where there is none on this machine.
        problem: why it is not decoded here; empty where it is.
        z_bits, y_bits: information content under the tables they were coded with, which the payload comes to up to a
            few bytes; None where it is not decoded.
    """

    bitstream: Bitstream
    header: int
    extensions: int
    payload: int
    profile: str = ""
    problem: str = ""
    z_bits: float | None = None
    y_bits: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, as ``edge-client inspect --json`` prints them."""
        bitstream = self.bitstream
        width, height = bitstream.original_size
        return {
            "bytes": len(bitstream),
            "bpp": round(bitstream.bpp, 4),
            "version": VERSION,
            "scenario": bitstream.scenario,
            "quality": bitstream.quality,
            "codec_digest": bitstream.codec_digest.hex(),
            "width": bitstream.width,
            "height": bitstream.height,
            "original_width": width,
            "original_height": height,
            "check": f"{bitstream.check:08x}",
            "bytes_header": self.header,
            "bytes_extensions": self.extensions,
            "bytes_payload": self.payload,
            "extensions": [{"type": one.type, "bytes": len(one.data)} for one in bitstream.extensions],
            "z_bits": self.z_bits and round(self.z_bits, 1),
            "y_bits": self.y_bits and round(self.y_bits, 1),
            "decodes": not self.problem,
            "profile": self.profile or None,
            "problem": self.problem or None,
        }

    def __str__(self) -> str:
        bitstream = self.bitstream
        width, height = bitstream.original_size
        types = ", ".join(f"type {one.type} of {len(one.data):,} B" for one in bitstream.extensions)
        rows = [
            ("size", f"{len(bitstream):,} B, {bitstream.bpp:.3f} bpp"),
            ("version", f"{VERSION}"),
            ("scenario", bitstream.scenario),
            ("quality", f"{bitstream.quality}"),
            ("codec", bitstream.codec_digest.hex()),
            ("codec's input", f"{bitstream.width}x{bitstream.height}"),
            ("original photo", f"{width}x{height}"),
            ("check value", f"{bitstream.check:08x}"),
            ("header", f"{self.header:,} B"),
            ("extensions", f"{self.extensions:,} B" + (f": {types}" if types else "")),
            ("payload", f"{self.payload:,} B"),
        ]
        for name, bits in (("  z", self.z_bits), ("  y", self.y_bits)):
            if bits is not None:
                rows.append((name, f"{bits / 8:,.1f} B, {bits:,.0f} bits"))
        rows.append(("decodes", f"no: {self.problem}" if self.problem else f"yes, with profile {self.profile}"))
        return "\n".join(f"{name:<16}{value}" for name, value in rows)


def inspect(bitstream: Bitstream) -> Inspection:
    """Looks into a bitstream, and decodes it where this machine has its codec.

    Raises:
        BadBitstream: it is damaged, as decoding it finds.
    """
    bare = replace(bitstream, payload=b"")
    header = len(replace(bare, extensions=()))
    inspection = Inspection(bitstream, header, len(bare) - header, len(bitstream.payload))
    try:
        found = find_codec(bitstream)
        z_bits, y_bits = found.codec.information(bitstream)
    except (ProfileMismatch, TooLarge) as problem:
        return replace(inspection, problem=str(problem))
    return replace(inspection, profile=found.profile, z_bits=z_bits, y_bits=y_bits)
