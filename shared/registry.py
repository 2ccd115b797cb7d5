"""Names for things that come in kinds: codecs, backends, profiles. One registry each, open to other packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from shared.errors import UnknownName


class Registry:
    """Maps names to objects that are imported when first asked for.

    Args:
        kind: what the things are called in messages, "codec" say.
        group: the entry point group in which other packages add theirs, "comneck.codecs" say.
        builtin: our own, as name -> "module:attribute".
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)

    @cached_property
    def _entries(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group) if entry.name not in self._builtin}

    def names(self) -> list[str]:
        return [*self._builtin, *sorted(self._entries)]

    def get(self, name: str) -> Any:
        """The object of that name.

        Raises:
            UnknownName: there is none; the message lists those there are.
        """
        if name in self._builtin:
            module, attribute = self._builtin[name].split(":")
            return getattr(import_module(module), attribute)
        if name in self._entries:
            return self._entries[name].load()
        raise UnknownName(f"no {self.kind} named {name!r}; there are: {', '.join(self.names())}")
