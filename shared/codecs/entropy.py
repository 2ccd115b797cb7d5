"""Entropy coding: integers and probability tables on one side, bytes on the other.

The coder is constriction's range coder, which is safe on hostile bytes; docs/bitstream.md says what it computes. A call
codes many symbols, each under its own table, grouped by table, so that the cost is a few vectorised calls and the file
pays for one coder state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from shared.errors import BadBitstream, BadInput

TOTAL = 2**24  # of a table's frequencies
LARGEST_SYMBOL = 2**15 - 1  # of an escaped symbol, either sign
_ESCAPED_BITS = 16
_ESCAPED = constriction.stream.model.Uniform(2**_ESCAPED_BITS)
_WORD = 4  # bytes

Symbols = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tables:
    """Probability tables as data.

    Attributes:
        frequencies: (sum of lengths,) of TOTAL, table after table, each at least 1.
        lengths: (T,) entries of each table, the last of which is the escape.
        offsets: (T,) the symbol that a table's first entry stands for.
    """

    frequencies: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]

    def check(self) -> None:
        """Raises BadInput unless every table is a distribution."""
        whole = len(self.frequencies) == int(self.lengths.sum()) and int(self.lengths.min()) >= 2
        if not whole or int(self.frequencies.min()) < 1 or any(table.sum() != TOTAL for table in self.split()):
            raise BadInput(f"a probability table whose frequencies are not positive or do not sum to {TOTAL:,}")

    @cached_property
    def models(self) -> list[Any]:
        """One constriction model per table. It gives every entry one of TOTAL and shares out the rest as it is told."""
        return [constriction.stream.model.Categorical(table - 1.0, perfect=False) for table in self.split()]

    @cached_property
    def escapes(self) -> Symbols:
        """(T,) the entry of each table that announces an escaped symbol."""
        return (self.lengths - 1).astype(np.int32)

    def information(self, symbols: Symbols, indexes: Symbols) -> float:
        """Bits that ``symbols`` (n,) cost under tables ``indexes`` (n,)."""
        entries = symbols - self.offsets[indexes]
        escaped = (entries < 0) | (entries >= self.escapes[indexes])
        starts = np.cumsum(self.lengths) - self.lengths
        frequencies = self.frequencies[starts[indexes] + np.where(escaped, self.escapes[indexes], entries)]
        return float(-np.log2(frequencies / TOTAL).sum() + _ESCAPED_BITS * escaped.sum())

    def split(self) -> list[npt.NDArray[np.int32]]:
        """The frequencies, a table at a time."""
        return np.split(self.frequencies, np.cumsum(self.lengths)[:-1])


class SymbolWriter:
    """Collects symbols and gives back one payload."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def write(self, symbols: Symbols, indexes: Symbols, tables: Tables) -> None:
        """Codes ``symbols[i]`` under table ``indexes[i]``; both (n,). Symbols are within +-LARGEST_SYMBOL."""
        order, runs = _by_table(indexes, len(tables.lengths))
        symbols, indexes = symbols[order], indexes[order]
        entries = symbols - tables.offsets[indexes]
        escapes = tables.escapes[indexes]
        escaped = (entries < 0) | (entries >= escapes)
        entries = np.where(escaped, escapes, entries).astype(np.int32)
        for table, first, last in runs:
            self._encoder.encode(entries[first:last], tables.models[table])
        if escaped.any():
            self._encoder.encode((symbols[escaped] + LARGEST_SYMBOL).astype(np.int32), _ESCAPED)

    def payload(self) -> bytes:
        """The shortest bytes that stand for everything written, given that a reader continues them with zeros."""
        words, (lower, size) = self._encoder.pos()
        data = self._encoder.get_compressed().astype(">u4").tobytes()
        length = _WORD * (words + 2)  # the coder's state has two words beyond those it has settled
        number = int.from_bytes(data.ljust(length, b"\0")[:length], "big")
        start = number - (number - lower) % 2**64  # any number from start to start + size is this stream
        for bits in range(64, -1, -8):
            rounded = -(-start >> bits) << bits
            if rounded < start + size:
                return rounded.to_bytes(length, "big").rstrip(b"\0")
        raise AssertionError("start itself is in the interval")


class SymbolReader:
    """Reads back what a SymbolWriter wrote, given the same tables in the same order."""

    def __init__(self, payload: bytes) -> None:
        padded = payload + bytes(-len(payload) % _WORD)
        self._decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))

    def read(self, indexes: Symbols, tables: Tables) -> Symbols:
        """The symbols coded under tables ``indexes`` (n,).

        Raises:
            BadBitstream: the payload cannot have come from these tables.
        """
        order, runs = _by_table(indexes, len(tables.lengths))
        entries = np.empty(len(indexes), np.int32)
        try:
            for table, first, last in runs:
                entries[first:last] = self._decoder.decode(tables.models[table], last - first)
            indexes = indexes[order]
            escaped = entries == tables.escapes[indexes]
            entries += tables.offsets[indexes]
            if escaped.any():
                entries[escaped] = self._decoder.decode(_ESCAPED, int(escaped.sum())) - LARGEST_SYMBOL
        except AssertionError as problem:  # how constriction reports data that its models rule out
            raise BadBitstream("the payload is damaged: it holds symbols that the codec never writes") from problem
        symbols = np.empty_like(entries)
        symbols[order] = entries
        return symbols


def _by_table(indexes: Symbols, tables: int) -> tuple[npt.NDArray[np.intp], list[tuple[int, int, int]]]:
    """Places in the order of their tables, and for each table in use the run (table, first, last) of its places."""
    order = np.argsort(indexes.astype(np.uint8 if tables <= 256 else np.uint16), kind="stable")  # a radix sort
    counts = np.bincount(indexes, minlength=tables)
    ends = np.cumsum(counts)
    used = np.flatnonzero(counts)
    return order, [(int(table), int(ends[table] - counts[table]), int(ends[table])) for table in used]
