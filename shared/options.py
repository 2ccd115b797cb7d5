"""Settings as typed dataclasses whose field docs are the command line's help."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def option(doc: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with its help text. Without a default it must be given."""
    return dataclasses.field(default=default, metadata={"doc": doc}, kw_only=True)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Gives ``parser`` one flag per field of the dataclass ``kind``."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        hint, doc = hints[field.name], field.metadata["doc"]
        required = field.default is dataclasses.MISSING
        shown = doc if required or field.default is None else f"{doc} (default: {_show(field.default)})"
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=shown)
        elif typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
            parser.add_argument(flag, choices=choices, default=field.default, required=required, help=shown)
        elif typing.get_origin(hint) is tuple:
            (item, _) = typing.get_args(hint)
            parser.add_argument(flag, type=item, nargs="+", default=field.default, required=required, help=shown)
        else:
            if typing.get_origin(hint) is types.UnionType:
                hint = next(part for part in typing.get_args(hint) if part is not type(None))
            parser.add_argument(flag, type=hint, default=field.default, required=required, help=shown)


def parse_options(kind: type[Settings], namespace: argparse.Namespace) -> Settings:
    """Builds ``kind`` from parsed flags."""
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
