"""The cache of artefacts on this machine: what is installed, getting what is not, and checking what is.

    COMNECK_HOME (default: the user's cache folder)
        weights/<name>/     the installed files and receipt.json: where they came from, size and SHA-256 of each
        downloads/<name>/   unfinished downloads, gone once the artefact is installed

A folder weights/<name> is complete or not there at all. It may be copied to another machine as it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Literal

from shared.errors import WeightsUnavailable
from shared.home import home as default_folder
from shared.weights.catalogue import (
    Artefact,
    FolderSource,
    LocalSource,
    PackageSource,
    PinnedFile,
    RemoteSource,
    catalogue,
    find_artefact,
)
from shared.weights.fetch import SourceFailed, fetch, local_name, one_line, sha256

RECEIPT = "receipt.json"

_log = logging.getLogger(__name__)

State = Literal["shipped", "imported", "installed", "missing", "damaged"]


@dataclass(frozen=True)
class Status:
    """How an artefact stands on this machine, as far as a look at names and sizes tells.

    Attributes:
        state: ``shipped`` is part of a package, ``imported`` was made of a user's checkpoint or is one, ``installed``
            is in the cache, ``damaged`` is there but not as it was installed.
        path: of the file or folder; None if it is missing or damaged.
        size: bytes on this disk; of a missing one, bytes to fetch from its first source.
        origin: the source it came from; of a missing one, its first source.
        problem: what is wrong and what to do, if it is missing or damaged.
    """

    artefact: Artefact
    state: State
    path: Path | None
    size: int
    origin: str
    problem: str = ""


@dataclass(frozen=True)
class _Receipt:
    """What was installed and from where: receipt.json.

    Attributes:
        fetched: SHA-256 of each of the source's files, by its name there.
        installed: when, in UTC.
        files: what is in the folder, this file apart.
    """

    artefact: str
    source: str
    fetched: dict[str, str]
    installed: str
    files: tuple[PinnedFile, ...]

    @staticmethod
    def read(folder: Path) -> _Receipt | None:
        """The receipt of an installed artefact; None if there is none, or none that makes sense."""
        try:
            fields = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
            return _Receipt(**{**fields, "files": tuple(PinnedFile(**file) for file in fields["files"])})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        (folder / RECEIPT).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


class Store:
    """The artefacts of one cache folder.

        store = Store()
        store.ensure("clip-vit-b-16")  # -> .../weights/clip-vit-b-16/model.safetensors, fetched if need be
        store.verify("clip-vit-b-16")  # raises if a byte has changed since

    Args:
        home: the cache folder; shared.home.home() by default.
        artefacts: by name; the catalogue by default.
        say: takes the lines that tell what goes on; the log by default.
    """

    def __init__(
        self,
        home: Path | None = None,
        artefacts: Mapping[str, Artefact] | None = None,
        say: Callable[[str], object] = _log.info,
    ) -> None:
        self.home = default_folder() if home is None else home
        self.artefacts = catalogue() if artefacts is None else artefacts
        self._say = say

    def status(self, name: str) -> Status:
        """How the artefact stands, without reading its bytes.

        Raises:
            UnknownName: no such artefact.
        """
        artefact = find_artefact(name, self.artefacts)
        if artefact.shipped:
            return _status_of_shipped(artefact, artefact.shipped)
        folder = self._folder(name)
        receipt = _Receipt.read(folder)
        first = artefact.sources[0]
        if receipt is None or receipt.fetched not in map(_pins, artefact.sources):
            why = "was installed from files that this version does not pin" if receipt else "is not installed"
            problem = f"{name} {why}: run `comneck weights pull {name}`"
            return Status(artefact, "missing", None, sum(file.size for file in first.files), str(first), problem)
        size = sum(file.size for file in receipt.files)
        for file in receipt.files:
            if _size(folder / file.name) != file.size:
                problem = f"{name} is damaged: {folder / file.name} has not the {file.size:,} bytes that it had"
                return Status(artefact, "damaged", None, size, receipt.source, f"{problem}; {_again(name)}")
        path = folder / artefact.installs[0] if len(artefact.installs) == 1 else folder
        return Status(artefact, "installed", path, size, receipt.source)

    def path(self, name: str) -> Path:
        """The artefact's file, or its folder if it has several.

        Raises:
            UnknownName: no such artefact.
            WeightsUnavailable: it is missing or damaged; the message has the command that gets it.
        """
        status = self.status(name)
        if status.path is None:
            raise WeightsUnavailable(status.problem)
        return status.path

    def ensure(self, name: str) -> Path:
        """The artefact's path; fetches it first if it is not there.

        Raises:
            UnknownName: no such artefact.
            WeightsUnavailable: it cannot be had; the message tells why, source by source, and what to do.
        """
        return self.status(name).path or self.pull(name)

    def pull(self, name: str, force: bool = False) -> Path:
        """Fetches and installs the artefact, from the first of its sources that works.

        Processes that pull the same artefact at once take turns, and the later ones find it installed.

        Args:
            force: install it anew even if it seems to be in order.

        Raises:
            as ``ensure``.
        """
        artefact = find_artefact(name, self.artefacts)
        if artefact.shipped:
            return self.path(name)
        lock = self._folder(f".{name}.lock")
        with plain_errors(self.home), turn(lock, f"{name}: another process is installing it; waiting", self._say):
            found = self.status(name).path
            return found if found and not force else self._install(artefact)

    def verify(self, name: str) -> None:
        """Hashes the artefact's files again.

        Raises:
            UnknownName: no such artefact.
            WeightsUnavailable: it is missing, or a file is not what was installed (or shipped, or imported).
        """
        self.path(name)
        artefact = self.artefacts[name]
        with plain_errors(self.home):
            if artefact.shipped:
                for path, file in _pinned(artefact.shipped).items():
                    if sha256(path) != file.sha256:
                        raise WeightsUnavailable(f"{name} is damaged: {path} has changed; {_restore(artefact.shipped)}")
                return
            folder = self._folder(name)
            receipt = _Receipt.read(folder)
            for file in receipt.files if receipt else ():
                if sha256(folder / file.name) != file.sha256:
                    raise WeightsUnavailable(f"{name} is damaged: {folder / file.name} has changed; {_again(name)}")

    def digest(self, name: str) -> str:
        """SHA-256 of the artefact's tensors file, in hex, as pinned or as installed; nothing is read again.

        Of several such files it is the SHA-256 of theirs, in hex, one after another.

        Raises:
            UnknownName, WeightsUnavailable: as ``path``.
        """
        self.path(name)
        artefact = self.artefacts[name]
        if artefact.shipped:
            files = tuple(_pinned(artefact.shipped).values())
        else:
            receipt = _Receipt.read(self._folder(name))
            files = receipt.files if receipt else ()
        tensors = [file for file in files if file.name.endswith((".safetensors", ".bin", ".pth"))] or files
        digests = [file.sha256 for file in tensors]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def _folder(self, name: str) -> Path:
        return self.home / "weights" / name

    def _install(self, artefact: Artefact) -> Path:
        downloads = self.home / "downloads" / artefact.name
        building = self._folder(f".{artefact.name}.new")
        reasons = []
        for source in artefact.sources:
            shutil.rmtree(building, ignore_errors=True)  # of the source before, or of a process that was killed
            building.mkdir(parents=True)
            try:
                _build(artefact, source, downloads / _key(source), building)
            except SourceFailed as problem:
                self._say(f"{artefact.name}: {source} failed: {problem}")
                reasons.append(f"{source}: {problem}")
                continue
            _swap_in(building, self._folder(artefact.name))
            shutil.rmtree(downloads, ignore_errors=True)
            return self.path(artefact.name)
        shutil.rmtree(building, ignore_errors=True)
        raise WeightsUnavailable(
            f"{artefact.name} cannot be had from any source. {'. '.join(reasons)}. What helps: set HF_ENDPOINT to a "
            "mirror of the hub, give pip an index that has the package (pip config set global.index-url URL), or copy "
            f"{self._folder(artefact.name)} from a machine that has it"
        )


def path(name: str) -> Path:
    """``Store().path(name)``: where an installed artefact is."""
    return Store().path(name)


def ensure(name: str) -> Path:
    """``Store().ensure(name)``: where an artefact is, once it is fetched if need be."""
    return Store().ensure(name)


def digest_of(name: str) -> str:
    """``Store().digest(name)``: SHA-256 of an artefact's tensors file."""
    return Store().digest(name)


@contextmanager
def turn(lock: Path, busy: str, say: Callable[[str], object]) -> Iterator[None]:
    """Waits until no other process holds the lock; says that it is ``busy`` if one does."""
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        say(busy)
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def plain_errors(home: Path) -> Iterator[None]:
    """Turns what the disk of the cache folder does not let us do into WeightsUnavailable."""
    try:
        yield
    except OSError as problem:
        if problem.errno == errno.ENOSPC:
            reason, advice = f"no space left on the disk of {home}", "free some"
        else:
            reason, advice = f"{problem.filename or home}: {problem.strerror or problem}", "make it writable"
        raise WeightsUnavailable(f"{reason}; {advice}, or set COMNECK_HOME to another folder") from problem


def sync(path: Path) -> None:
    """Returns once a file or folder is on the disk for good."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle for a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _build(artefact: Artefact, source: RemoteSource, fetched: Path, building: Path) -> None:
    """Fills ``building`` with the files to install and their receipt."""
    fetch(source, fetched)
    if source.convert is None:
        for file in source.files:
            (fetched / local_name(file)).replace(building / local_name(file))
    else:
        _convert(source.convert, fetched, building)
    missing = [file for file in artefact.installs if not (building / file).is_file()]
    if missing:
        raise SourceFailed(f"it gives no {', '.join(missing)}")
    _write_receipt(artefact, source, building)


def _convert(converter: str, fetched: Path, building: Path) -> None:
    module, function = converter.split(":")
    try:
        getattr(import_module(module), function)(fetched, building)
    except ModuleNotFoundError as problem:
        raise SourceFailed(f"converting it needs the Python package {problem.name}: install it") from problem
    except Exception as problem:  # of whatever library reads that format
        if isinstance(problem, OSError) and problem.errno:
            raise  # the disk's fault, and the same with every other source
        raise SourceFailed(f"it cannot be converted: {one_line(problem)}") from problem


def _write_receipt(artefact: Artefact, source: RemoteSource, folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = (PinnedFile(path.relative_to(folder).as_posix(), path.stat().st_size, sha256(path)) for path in paths)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    _Receipt(artefact.name, str(source), _pins(source), now, tuple(files)).write(folder)
    for path in paths:
        path.chmod((folder / RECEIPT).stat().st_mode)  # some libraries write files that only their owner can read


def _swap_in(building: Path, folder: Path) -> None:
    """Puts a finished folder in place, on the disk for good."""
    for path in [*building.rglob("*"), building]:
        sync(path)
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    building.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _status_of_shipped(artefact: Artefact, source: LocalSource) -> Status:
    pinned = _pinned(source)
    size, wanted = sum(map(_size, pinned)), sum(file.size for file in pinned.values())
    for path, file in pinned.items():
        if (found := _size(path)) != file.size:
            origin = "is part of an installed package" if isinstance(source, PackageSource) else "was imported"
            state = f"has {found:,} bytes instead of {file.size:,}" if found else "is missing"
            problem = f"{artefact.name} {origin}, but {path} {state}: {_restore(source)}"
            return Status(artefact, "damaged" if size else "missing", None, size or wanted, str(source), problem)
    return Status(
        artefact, "shipped" if isinstance(source, PackageSource) else "imported", source.path, size, str(source)
    )


def _pinned(source: LocalSource) -> dict[Path, PinnedFile]:
    """Where each of its files is."""
    if isinstance(source, FolderSource):
        return {source.path / file.name: file for file in source.files}
    return {source.path: source.file}


def _restore(source: LocalSource) -> str:
    if isinstance(source, PackageSource):
        return "install the package again"
    return f"import {source.checkpoint} again (`comneck weights import`)"


def _pins(source: RemoteSource) -> dict[str, str]:
    return {file.name: file.sha256 for file in source.files}


def _key(source: RemoteSource) -> str:
    """Names a download by what is pinned: an unfinished one of other bytes is never continued."""
    return hashlib.sha256(json.dumps(_pins(source)).encode()).hexdigest()[:16]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _again(name: str) -> str:
    return f"run `comneck weights pull --force {name}`"
