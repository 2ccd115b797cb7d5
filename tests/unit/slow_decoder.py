"""A second decoder, written from docs/bitstream.md alone: short, slow, and without a line of ours.

It is what the document promises that anyone can write. Where it and ``Codec.decode`` differ, one of them is wrong, or
the document is. Arrays are int64 throughout, in which nothing here comes near an overflow.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

import numpy as np

DTYPES = {"I8": "<i1", "I32": "<i4", "F16": "<f2", "F32": "<f4"}
LIMIT = 2**14 - 1
RANGES = {"unsigned": (0, LIMIT), "signed": (-LIMIT, LIMIT), "full": (-(2**31), 2**31 - 1)}
POINT = ((0, 0),)
SQUARE_2 = ((0, 0), (0, 1), (1, 0), (1, 1))
SQUARE_3 = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))
SQUARE_5 = tuple((row, column) for row in range(-2, 3) for column in range(-2, 3))
AROUND = tuple((row, column) for row, column in SQUARE_5 if (row + column) % 2)

Taps = tuple[tuple[int, int], ...]
Tensors = Mapping[str, np.ndarray]


class Refused(Exception):
    """The bytes are no stream of this codec."""


@dataclass(frozen=True)
class Decoded:
    """What a stream holds.

    Attributes:
        y_hat: (h, w, M) in units of 1/128.
        values: (M, h, w) float32, with the inverse gains.
        symbols: the CRC-32 of the symbols.
    """

    y_hat: np.ndarray
    values: np.ndarray
    symbols: int

    def hash(self) -> str:
        """SHA-256 of y_hat as 32-bit integers, little-endian."""
        return hashlib.sha256(self.y_hat.astype("<i4").tobytes()).hexdigest()


class Artefact:
    """A codec's tensors by name, its metadata and its digest."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        self.metadata = header.pop("__metadata__")
        self.tensors: dict[str, np.ndarray] = {}
        hashed = hashlib.sha256()
        for name, entry in sorted(header.items()):
            if not (name.startswith(("exact.", "tables.")) or name == "inverse_gains"):
                continue
            first, last = entry["data_offsets"]
            raw = data[8 + length + first : 8 + length + last]
            tensor = np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"])
            shape = ",".join(map(str, tensor.shape))
            hashed.update(f"{name}\0{tensor.dtype.name}\0{shape}\0".encode() + raw)
            self.tensors[name] = tensor if name == "inverse_gains" else tensor.astype(np.int64)
        parts = [hashed.hexdigest(), *(self.metadata[key] for key in ("codec", "config", "qualities"))]
        self.digest = hashlib.sha256("\0".join(parts).encode()).digest()[:4]
        self.config = json.loads(self.metadata["config"])
        self.qualities = json.loads(self.metadata["qualities"])
        self.z_tables, self.y_tables = self._tables("z"), self._tables("y")

    def _tables(self, name: str) -> list[Table]:
        frequencies, lengths, offsets = (
            self.tensors[f"tables.{name}.{part}"] for part in ("frequencies", "lengths", "offsets")
        )
        split = np.split(frequencies, np.cumsum(lengths)[:-1])
        return [Table([0, *np.cumsum(row).tolist()], int(offset)) for row, offset in zip(split, offsets, strict=True)]


@dataclass(frozen=True)
class Table:
    """Cumulative frequencies, from 0 to 2^24, and the symbol of the first entry; the last entry is the escape."""

    cumulative: list[int]
    offset: int


class RangeDecoder:
    """Reads entries of tables from a payload."""

    def __init__(self, payload: bytes) -> None:
        padded = payload + bytes(-len(payload) % 4)
        self.words: Iterator[int] = (word for (word,) in struct.iter_unpack(">I", padded))
        self.point = next(self.words, 0) << 32 | next(self.words, 0)
        self.lower, self.range = 0, 2**64 - 1

    def read(self, cumulative: list[int]) -> int:
        scale = self.range >> 24
        quantile = (self.point - self.lower) % 2**64 // scale
        if quantile >= 2**24:
            raise Refused("a payload that no encoder writes")
        entry = bisect_right(cumulative, quantile) - 1
        self.lower = (self.lower + scale * cumulative[entry]) % 2**64
        self.range = scale * (cumulative[entry + 1] - cumulative[entry])
        if self.range < 2**32:
            self.lower, self.range = self.lower << 32 & 2**64 - 1, self.range << 32
            self.point = self.point << 32 & 2**64 - 1 | next(self.words, 0)
        return entry

    def read_pass(self, under: np.ndarray, tables: list[Table]) -> np.ndarray:
        """The symbols of a pass by place, symbol i under table ``under[i]``."""
        symbols = np.zeros(len(under), np.int64)
        escaped = []
        for table, places in groupby(np.argsort(under, kind="stable").tolist(), lambda place: int(under[place])):
            cumulative, offset = tables[table].cumulative, tables[table].offset
            for place in places:
                entry = self.read(cumulative)
                symbols[place] = entry + offset
                if entry == len(cumulative) - 2:
                    escaped.append(place)
        for place in escaped:
            symbols[place] = self.read(UNIFORM) - 32767
        return symbols


UNIFORM = list(range(0, 2**24 + 1, 2**8))


def decode(artefact: Artefact, data: bytes) -> Decoded:
    """Decodes a stream.

    Raises:
        Refused: it is no stream of this codec, or a damaged one.
    """
    if len(data) < 16:
        raise Refused("too short")
    first, kind, digest, rows, columns, width, height, check = struct.unpack_from(">BB4sBBHHI", data)
    scenario, quality = divmod(kind, 16)
    if first not in (16, 17) or scenario not in (1, 2, 3) or not (quality and rows and columns and width and height):
        raise Refused("no header of version 1")
    if digest != artefact.digest or quality not in artefact.qualities:
        raise Refused("not of this codec")
    decoder = RangeDecoder(data[skip_extensions(data) if first == 17 else 16 :])
    symbols = 0

    def read(under: np.ndarray, tables: list[Table]) -> np.ndarray:
        nonlocal symbols
        found = decoder.read_pass(under, tables)
        symbols = zlib.crc32(found.astype("<i2").tobytes(), symbols)
        return found

    N = len(artefact.z_tables)
    z = read(np.tile(np.arange(N), rows * columns), artefact.z_tables).reshape(rows, columns, N)
    y_hat = walk(artefact, z, lambda under: read(under, artefact.y_tables))
    if zlib.crc32(data[16:], zlib.crc32(data[:12], symbols)) != check:
        raise Refused("another check value")
    gain = artefact.tensors["inverse_gains"][artefact.qualities.index(quality)].astype(np.float32)
    values = y_hat.astype(np.float32) / np.float32(128) * gain
    return Decoded(y_hat, values.transpose(2, 0, 1), symbols)


def skip_extensions(data: bytes) -> int:
    """Where the payload begins."""
    at = 16
    while at < len(data) and data[at]:
        if data[at] >= 128:
            raise Refused(f"extension {data[at]} is not known")
        if at + 3 > len(data):
            break
        at += 3 + int.from_bytes(data[at + 1 : at + 3], "big")
    if at >= len(data) or at == 16:
        raise Refused("extensions cut short, or none")
    return at + 1


def walk(artefact: Artefact, z: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """z (h/4, w/4, N) -> y_hat (h, w, M); ``read`` takes the tables of a pass and gives its symbols."""

    def code(mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
        under = np.searchsorted(artefact.tensors["tables.thresholds"], scale, side="right")
        return read(under.ravel()).reshape(mean.shape) * 128 + mean

    if artefact.metadata["codec"] == "tic":
        mean, scale = np.split(tic_parameters(artefact.tensors, artefact.config, z), 2, -1)
        return code(mean, scale)
    return walk_elic(artefact, z, code)


def layer(tensors: Tensors, name: str, x: np.ndarray, taps: Taps, kind: str) -> np.ndarray:
    """(h, w, C) -> (h, w, O)"""
    weight, bias, shift = (tensors[f"exact.{name}.{part}"] for part in ("weight", "bias", "shift"))
    height, width, channels = x.shape
    reach = max(abs(step) for tap in taps for step in tap)
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)))
    sums = np.zeros((height * width, len(bias)), x.dtype)
    for (row, column), rows in zip(taps, np.split(weight, len(taps)), strict=True):
        seen = padded[reach + row : reach + row + height, reach + column : reach + column + width]
        sums += seen.reshape(-1, channels) @ rows
    return np.clip((sums + bias) >> shift, *RANGES[kind]).reshape(height, width, -1)


def walk_elic(artefact: Artefact, z: np.ndarray, code: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """z (h/4, w/4, N) -> y_hat (h, w, M); ``code`` takes a pass's means and scales and gives its y_hat."""
    tensors = artefact.tensors
    x = cut(z * 128 + tensors["exact.medians"])
    for i in (0, 1):
        x = double(layer(tensors, f"h_s.{i}", x, SQUARE_3, "unsigned"))
    psi = layer(tensors, "h_s.2", x, SQUARE_3, "signed")
    height, width = psi.shape[:2]
    rest = np.add.outer(np.arange(height), np.arange(width)) % 2 == 1
    y_hat: list[np.ndarray] = []
    for k, size in enumerate(artefact.config["groups"]):
        side = [psi]
        if k:
            earlier = range(k) if artefact.metadata["codec"] == "elic-official" else sorted({0, k - 1})
            x = cut(np.concatenate([y_hat[i] for i in earlier], -1))
            for i, kind in enumerate(("unsigned", "unsigned", "signed")):
                x = layer(tensors, f"channel_context.{k - 1}.{i}", x, SQUARE_5, kind)
            side = [x, psi]
        group = np.zeros((height, width, size), np.int64)
        context = np.zeros((height, width, 2 * size), np.int64)
        for positions in (~rest, rest):
            x = np.concatenate([context, *side], -1)
            for i, kind in enumerate(("unsigned", "unsigned", "full")):
                x = layer(tensors, f"aggregation.{k}.{i}", x, POINT, kind)
            group[positions] = code(x[positions, :size], x[positions, size:])
            context = layer(tensors, f"spatial_context.{k}", cut(group), AROUND, "signed")
        y_hat.append(group)
    return np.concatenate(y_hat, -1)


def tic_parameters(tensors: Tensors, config: Mapping[str, Sequence[int]], z: np.ndarray) -> np.ndarray:
    """z (h/4, w/4, N) -> means and scales (h, w, 2 M)"""
    x = cut(z * 128 + tensors["exact.medians"]) << tensors["exact.lift"]
    for group, up, n in (("swin0", "up1", 5), ("swin2", "up3", 4)):
        x = swin_group(tensors, group, config["depths"][n], config["heads"][n], x)
        narrow = int(tensors[f"exact.{group}.narrow"])
        x = hold(double(layer(tensors, up, cut((x + (1 << narrow >> 1)) >> narrow), SQUARE_2, "full")))
    return x


def swin_group(tensors: Tensors, group: str, depth: int, heads: int, x: np.ndarray) -> np.ndarray:
    b, epsilon = x, int(tensors[f"exact.{group}.epsilon"])
    for i in range(depth):
        name = f"{group}.blocks.{i}"
        moved = 2 if group == "swin2" and i % 2 else 0
        b = hold(b + hold(attention(tensors, f"{name}.attn", heads, moved, norm(b, epsilon))))
        b = hold(b + hold(perceptron(tensors, f"{name}.mlp", norm(b, epsilon))))
    return hold(x + b)


def norm(x: np.ndarray, epsilon: int) -> np.ndarray:
    channels = x.shape[-1]
    d = x - nearest(x.sum(-1, keepdims=True), channels)
    power = (d * d).sum(-1, keepdims=True) + channels * epsilon
    root = np.vectorize(math.isqrt, otypes=[x.dtype])(power << 8)
    return cut(nearest(d * math.isqrt(channels << 28), root))


def perceptron(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    x = layer(tensors, f"{name}.fc1", x, POINT, "signed")
    bump = tensors[f"exact.{name}.bump"][np.clip(np.abs(x), 0, 4095).astype(int)]
    return layer(tensors, f"{name}.fc2", np.clip(x, 0, None) - bump, POINT, "full")


def attention(tensors: Tensors, name: str, heads: int, moved: int, x: np.ndarray) -> np.ndarray:
    bias, shift, powers = (tensors[f"exact.{name}.{part}"] for part in ("bias", "shift", "powers"))
    height, width, channels = x.shape
    tokens = layer(tensors, f"{name}.qkv", x, POINT, "signed").reshape(height, width, 3, heads, -1)
    mean = np.zeros((height, width, heads, channels // heads), x.dtype)

    def home(position: tuple[int, int]) -> tuple[int, int]:
        return (position[0] - moved) // 4, (position[1] - moved) // 4

    for _, window in groupby(sorted(product(range(height), range(width)), key=home), home):
        at = rows, columns = tuple(np.array(list(window)).T)
        places = (rows - moved) % 4 * 4 + (columns - moved) % 4
        query, key, value = tokens[at].transpose(1, 2, 0, 3)  # heads, positions, channels
        score = (query @ key.swapaxes(1, 2) + bias[:, places][..., places]) >> shift
        behind = score.max(-1, keepdims=True) - score
        weight = powers[(behind % 256).astype(int)] >> np.minimum(behind >> 8, 31)
        mean[at] = nearest(weight @ value, weight.sum(-1, keepdims=True)).swapaxes(0, 1)
    return layer(tensors, f"{name}.proj", mean.reshape(height, width, channels), POINT, "full")


def cut(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -LIMIT, LIMIT)


def hold(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -(2**21) + 1, 2**21 - 1)


def nearest(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    return (2 * a + b) // (2 * b)


def double(x: np.ndarray) -> np.ndarray:
    """(h, w, 4 O) -> (2 h, 2 w, O)"""
    height, width, channels = x.shape
    return x.reshape(height, width, 2, 2, channels // 4).swapaxes(1, 2).reshape(2 * height, 2 * width, channels // 4)
