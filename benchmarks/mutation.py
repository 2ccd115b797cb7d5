"""Bitstreams as they must not be, and what becomes of them: for the tests and benchmarks of hostile input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

import torch
from torch import Tensor

from shared.bitstream import MAX_PIXELS, Bitstream
from shared.codecs.codec import Codec
from shared.errors import BadBitstream, BadInput, ProfileMismatch, TooLarge

REFUSALS = (BadBitstream, BadInput, ProfileMismatch, TooLarge)
HEADER = 16
FIELDS = ((0, 1), (1, 1), (2, 4), (6, 1), (7, 1), (6, 2), (8, 2), (10, 2), (12, 4))  # offset and bytes of each


class Undetected(Exception):
    """A stream that was no real one was decoded, or a real one to something else."""


class Unsealed(Bitstream):
    """Takes for right whatever check value its symbols give, and keeps it."""

    def seal(self, symbols: int) -> int:
        object.__setattr__(self, "check", super().seal(symbols))
        return self.check


def flip(random: Random, streams: Sequence[bytes]) -> bytes:
    """One to eight bits."""
    data = bytearray(random.choice(streams))
    for _ in range(random.choice((1, 1, 2, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def cut(random: Random, streams: Sequence[bytes]) -> bytes:
    """The beginning of a stream."""
    data = random.choice(streams)
    return data[: random.randrange(len(data))]


def splice(random: Random, streams: Sequence[bytes]) -> bytes:
    """The beginning of one and the end of another, where the header ends or anywhere."""
    first, second = random.choice(streams), random.choice(streams)
    at = random.choice((12, HEADER, random.randrange(len(first))))
    return first[:at] + second[random.choice((at, random.randrange(len(second)))) :]


def invent(random: Random, streams: Sequence[bytes]) -> bytes:
    """Random bytes, mostly after a real header."""
    header = random.choice(streams)[: random.choice((0, 12, HEADER, HEADER))]
    return header + random.randbytes(random.choice((0, 1, 7, 50, 500, 3000)))


def exaggerate(random: Random, streams: Sequence[bytes]) -> bytes:
    """A field of the header at an extreme."""
    data = bytearray(random.choice(streams))
    at, size = random.choice(FIELDS)
    most = 256**size - 1
    value = random.choice((0, 1, most // 2, most // 2 + 1, most - 1, most, random.randint(0, most)))
    data[at : at + size] = value.to_bytes(size, "big")
    return bytes(data)


def append(random: Random, streams: Sequence[bytes]) -> bytes:
    """More bytes at the end: zeros, which a range decoder would not notice, or others."""
    more = random.choice((1, 2, 4, 100))
    return random.choice(streams) + (bytes(more) if random.random() < 0.5 else random.randbytes(more))


def rearrange(random: Random, streams: Sequence[bytes]) -> bytes:
    """A run of bytes left out, doubled or moved."""
    data = random.choice(streams)
    first, last = sorted(random.sample(range(len(data) + 1), 2))
    run, rest = data[first:last], data[:first] + data[last:]
    at = random.randrange(len(rest) + 1)
    return random.choice((rest, data[:last] + run + data[last:], rest[:at] + run + rest[at:]))


def extend(random: Random, streams: Sequence[bytes]) -> bytes:
    """Extensions, well-formed or not, that nothing in the stream accounts for."""
    data = random.choice(streams)
    area = b""
    for _ in range(random.choice((0, 1, 1, 3, 500))):
        kind, length = random.choice((0, 1, 2, 127, 128, 255)), random.choice((0, 1, 5, 200))
        told = random.choice((length, length, length + 1, 65535))
        area += bytes((kind,)) + told.to_bytes(2, "big") + random.randbytes(length)
    area = area[: random.choice((len(area), random.randint(0, len(area))))] + random.choice((b"", b"\0"))
    return bytes((data[0] | random.choice((1, 1, 1, 15)),)) + data[1:HEADER] + area + data[HEADER:]


MUTATIONS: tuple[Callable[[Random, Sequence[bytes]], bytes], ...] = (
    flip, cut, splice, invent, exaggerate, append, rearrange, extend
)  # fmt: skip


def fate(codec: Codec, data: bytes, real: Mapping[bytes, Tensor], max_pixels: int = MAX_PIXELS) -> str:
    """What becomes of bytes: the name of the error that refuses them, or ``identical``.

    Args:
        real: the streams that were really encoded, and what they decode to.

    Raises:
        Undetected: they were taken for something that nobody encoded.
        Exception: whatever else a decoder should not raise.
    """
    try:
        bitstream = Bitstream.parse(data)
        if bytes(bitstream) != data:
            raise Undetected("a container that is written otherwise than it was read")
        y_hat = codec.decode(bitstream, max_pixels).y_hat
    except REFUSALS as refusal:
        if type(refusal) not in REFUSALS:
            raise
        return type(refusal).__name__
    if data not in real or not torch.equal(y_hat, real[data]):
        raise Undetected(f"{len(data)} bytes were decoded, and nobody encoded that")
    return "identical"


def compare(codecs: Sequence[Codec], data: bytes) -> bool:
    """Decodes bytes as if their check value were right; whether they are a stream then.

    Raises:
        Undetected: codecs that differ in nothing but their kernels make different things of them, or two at once do.
        Exception: whatever else a decoder should not raise.
    """
    first, *others = codecs
    try:
        stream = Unsealed.parse(data)
        y_hat = first.decode(stream).y_hat
    except REFUSALS:
        return False
    again = Bitstream.parse(bytes(stream))
    found = [codec.decode(again) for codec in others] + first.decode_all([again, again])
    if not all(torch.equal(latents.y_hat, y_hat) for latents in found):
        raise Undetected(f"{len(data)} bytes that are not the same to all kernels")
    return True
