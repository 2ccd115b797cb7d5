"""Makes the golden bitstreams: to be run when the shipped codec or the format changes, and only then.

    python -m tests.unit.streams.make

From four photos that scikit-image carries it writes NAME-QUALITY.cnk, the hashes of what these decode to (y_hat.sha256)
and the worked example of docs/bitstream.md. The photos are free of rights: chelsea (Stefan van der Walt, CC0), coffee
(Rachel Michetti, CC0), astronaut (NASA, public domain), rocket (SpaceX, released into the public domain).
"""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

import shared
from benchmarks.server import sample_photo
from shared.bitstream import Bitstream
from shared.codecs.codec import Codec
from shared.codecs.interface import ExactCode
from shared.images import Preparation, load_photo, prepare
from tests.unit.slow_decoder import Artefact, RangeDecoder, decode

FOLDER = Path(__file__).parent
SHIPPED = Path(shared.__file__).parent / "weights" / "files" / "small-codec.safetensors"
HASHES = FOLDER / "y_hat.sha256"  # as sha256sum writes them, of integers instead of files
DOCUMENT = Path(__file__).parents[3] / "docs" / "bitstream.md"
MARKED = re.compile(
    r"(?<=<!-- example, written by tests/unit/streams/make.py -->\n).*(?=<!-- end of example -->)", re.S
)
EXAMPLE = "chelsea-3.cnk"
SIZES = {"chelsea.png": (256, 256), "coffee.png": (256, 384), "astronaut.png": (192, 192), "rocket.jpg": (128, 320)}


def main() -> None:
    codec = Codec.load(SHIPPED)
    hashes = []
    for name, (height, width) in SIZES.items():
        photo = prepare(load_photo(sample_photo(name)), Preparation(height, width))
        for quality in codec.qualities:
            bitstream = codec.encode(photo, "d1", quality)
            path = FOLDER / f"{Path(name).stem}-{quality}.cnk"
            path.write_bytes(bytes(bitstream))
            hashes.append(f"{y_hat_hash(codec, bitstream)}  {path.name}\n")
            print(f"{path.name}: {len(bitstream)} bytes")
    HASHES.write_text("".join(hashes))
    DOCUMENT.write_text(MARKED.sub(lambda _: example(), DOCUMENT.read_text()))


def y_hat_hash(codec: Codec, bitstream: Bitstream) -> str:
    """SHA-256 of what a bitstream decodes to before gains: y_hat (h, w, M) in units of 1/128, 32 bits little-endian."""
    found: list[Tensor] = []
    walk = codec.path.walk

    def listen(z: Tensor, code: ExactCode) -> Tensor:
        found.append(walk(z, code))
        return found[-1]

    with patch.object(codec.path, "walk", listen):
        codec.decode(bitstream)
    return hashlib.sha256(found[0].cpu().numpy().astype("<i4").tobytes()).hexdigest()


def example() -> str:
    """The worked example of docs/bitstream.md, in Markdown."""
    data = (FOLDER / EXAMPLE).read_bytes()
    stream = Bitstream.parse(data)
    artefact, (width, height) = Artefact(SHIPPED), stream.original_size
    fields = (
        (0, "version 1, no flags"),
        (1, f"scenario {stream.scenario}, quality {stream.quality}"),
        (2, "digest of the codec"),
        (6, f"height: {data[6]} x 64 = {stream.height}"),
        (7, f"width: {data[7]} x 64 = {stream.width}"),
        (8, f"width of the photo: {width}"),
        (10, f"height of the photo: {height}"),
        (12, "check value"),
        (16, f"payload, {len(stream.payload):,} bytes, of which the first 8"),
    )
    table, decoder = artefact.z_tables[0], RangeDecoder(stream.payload)
    point, scale = decoder.point, decoder.range >> 24
    entry = decoder.read(table.cumulative)
    frequencies = ", ".join(f"{after - before:,}" for before, after in pairwise(table.cumulative))
    return "\n".join(
        (
            f"`tests/unit/streams/{EXAMPLE}` has {len(data):,} bytes and begins thus:",
            "",
            "| offset | bytes | |",
            "|---|---|---|",
            *(
                f"| {at} | `{data[at:end].hex(' ')}` | {meaning} |"
                for (at, meaning), (end, _) in pairwise((*fields, (24, "")))
            ),
            "",
            f"The range decoder starts with `point` = 0x{point:x}, `scale` is 0x{scale:x} and the first quantile",
            f"{point // scale:,}. Table 0 of z has the frequencies {frequencies} and the offset {table.offset}, so",
            f"this is entry {entry}, and z's first symbol is {entry + table.offset}. The CRC-32 of all symbols, before",
            f"that of header and payload, is 0x{decode(artefact, data).symbols:08x}.",
            "",
        )
    )


if __name__ == "__main__":
    main()
