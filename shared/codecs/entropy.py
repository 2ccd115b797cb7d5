"""Entropy coding: integers and probability tables on one side, bytes on the other.

The coder is constriction's range coder, which is safe on hostile bytes. A call codes many symbols, each under its own
table, grouped by table, so that the cost is a few vectorised calls and the file pays for one coder state, not eleven.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from shared.errors import BadBitstream

LARGEST_SYMBOL = 2**15 - 1  # of an escaped symbol, either sign
_ESCAPED = constriction.stream.model.Uniform(2 * LARGEST_SYMBOL + 2)

Symbols = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Tables:
    """Probability tables as data: CompressAI's buffers without their padding.

    Attributes:
        cdf: cumulative frequencies of 2**16, table after table; table t has lengths[t] of them.
        lengths: (T,) one more than the table's symbols, the last of which is the escape.
        offsets: (T,) the symbol that a table's first entry stands for.
    """

    cdf: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]

    @cached_property
    def models(self) -> list[Any]:
        """One constriction model per table."""
        return [
            constriction.stream.model.Categorical(np.diff(table) / 2**16, perfect=False)
            for table in np.split(self.cdf.astype(np.float64), np.cumsum(self.lengths)[:-1])
        ]

    @cached_property
    def escapes(self) -> Symbols:
        """(T,) the entry of each table that announces an escaped symbol."""
        return (self.lengths - 2).astype(np.int32)


class SymbolWriter:
    """Collects symbols and gives back one payload."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def write(self, symbols: Symbols, indexes: Symbols, tables: Tables) -> None:
        """Codes ``symbols[i]`` under table ``indexes[i]``; both (n,). Symbols are within +-LARGEST_SYMBOL."""
        entries = symbols - tables.offsets[indexes]
        escapes = tables.escapes[indexes]
        escaped = (entries < 0) | (entries >= escapes)
        entries = np.where(escaped, escapes, entries).astype(np.int32)
        for table, places in _by_table(indexes):
            self._encoder.encode(entries[places], tables.models[table])
        if escaped.any():
            self._encoder.encode((symbols[escaped] + LARGEST_SYMBOL).astype(np.int32), _ESCAPED)

    def payload(self) -> bytes:
        """The bytes of everything written. Zeros at the end carry nothing and are left out."""
        words = self._encoder.get_compressed()
        return bytes(words.astype(">u4").tobytes().rstrip(b"\0"))


class SymbolReader:
    """Reads back what a SymbolWriter wrote, given the same tables in the same order."""

    def __init__(self, payload: bytes) -> None:
        padded = payload + bytes(-len(payload) % 4)
        self._decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(padded, ">u4").astype(np.uint32))

    def read(self, indexes: Symbols, tables: Tables) -> Symbols:
        """The symbols coded under tables ``indexes`` (n,).

        Raises:
            BadBitstream: the payload cannot have come from these tables.
        """
        entries = np.empty(len(indexes), np.int32)
        try:
            for table, places in _by_table(indexes):
                entries[places] = self._decoder.decode(tables.models[table], len(places))
            symbols = entries + tables.offsets[indexes]
            escaped = entries == tables.escapes[indexes]
            if escaped.any():
                symbols[escaped] = self._decoder.decode(_ESCAPED, int(escaped.sum())) - LARGEST_SYMBOL
        except AssertionError as problem:  # how constriction reports data that its models rule out
            raise BadBitstream("the payload is damaged: it holds symbols that the codec never writes") from problem
        return symbols.astype(np.int32)


def _by_table(indexes: Symbols) -> list[tuple[int, npt.NDArray[np.intp]]]:
    """The tables in use, ascending, each with the places of its symbols in their order."""
    order = np.argsort(indexes, kind="stable")
    used, starts = np.unique(indexes[order], return_index=True)
    return list(zip(used.tolist(), np.split(order, starts[1:]), strict=True))
