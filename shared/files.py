"""Files as hostile as they come: reading with a bound, and writing that leaves a whole file or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import BadInput, TooLarge


def read_file(path: Path, limit: int, wanted: str, advice: str) -> bytes:
    """The bytes of a file, at most ``limit`` of them.

    Args:
        wanted: what is to be given instead of a folder: "one picture".
        advice: what to do about a file that is too large.

    Raises:
        BadInput: no such file, a folder, or one that cannot be read.
        TooLarge: more than ``limit`` bytes.
    """
    try:
        if path.is_dir():
            raise BadInput(f"{path} is a folder; give {wanted}")
        with path.open("rb") as file:
            data = file.read(limit + 1)  # bounded: a pipe or a device may have no end
    except FileNotFoundError as problem:
        raise BadInput(f"{path} does not exist") from problem
    except (OSError, ValueError) as problem:
        raise BadInput(f"{path} cannot be read: {_reason(problem)}") from problem
    if len(data) > limit:
        raise TooLarge(f"{path} is larger than {limit:,} bytes: {advice}")
    return data


def write_file(path: Path, data: bytes, source: Path | None = None) -> None:
    """Writes a file as a whole, replacing one that is there; a failure leaves everything as it was.

    Args:
        source: what the data were made from, which is never replaced.

    Raises:
        BadInput: it cannot be written, or is ``source``.
    """
    with _replacing(path, source) as (unfinished, target):
        unfinished.write_bytes(data)
        unfinished.replace(target)


def check_writable(path: Path, source: Path | None = None) -> None:
    """Raises what ``write_file`` would raise, as far as that shows before there are data."""
    with _replacing(path, source) as (unfinished, _):
        unfinished.touch()


@contextmanager
def _replacing(path: Path, source: Path | None) -> Iterator[tuple[Path, Path]]:
    """The file to write at first, which is gone afterwards, and the one that it is to replace."""
    try:
        target = path.resolve()  # of a link, the file behind it
        if source is not None and target.exists() and target.samefile(source):
            raise BadInput(f"{path} is the file that is read: give another name to what is written")
        if target.exists() and not target.is_file():
            raise BadInput(f"{path} is no file that could be replaced: give another name to what is written")
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.new")
        try:
            yield unfinished, target
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as problem:  # RuntimeError: links that lead in a circle
        raise BadInput(f"{path} cannot be written: {_reason(problem)}; name another place") from problem


def _reason(problem: Exception) -> object:
    return getattr(problem, "strerror", None) or problem
