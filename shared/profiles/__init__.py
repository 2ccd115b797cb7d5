"""Profiles: small data files that name what fits together. Adding one is adding a TOML file.

Our own lie beside this module, a user's in COMNECK_HOME/profiles; other packages add theirs under the entry point
``comneck.profiles``, whose entries are paths of TOML files.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from shared.bitstream import QUALITIES, Scenario
from shared.errors import BadInput, UnknownName
from shared.home import home

if TYPE_CHECKING:
    from shared.images import Preparation

DEFAULT_PROFILE = "small"
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
PLACEHOLDER = "{quality}"  # in the name of weights: there is an artefact for each quality


@dataclass(frozen=True)
class CodecSpec:
    """Which codec with which weights.

    Attributes:
        name: registered name of the codec.
        weights: artefact's name, of one for all qualities, or with PLACEHOLDER of one for each.
        qualities: that there are, ascending.
    """

    name: str
    weights: str
    qualities: tuple[int, ...]


@dataclass(frozen=True)
class ClipSpec:
    """CLIP's image tower: its sizes, and the block (0-based) that the neck's tokens enter.

    Attributes:
        weights: artefact's name.
        patch, image: sides in pixels; the position embedding is interpolated to ``image // patch``.
        width, layers, heads, projection: of the transformer and of the joint space.
        entry_block: 2 in the paper: the neck replaces the patch embedding and blocks 0 and 1.
    """

    weights: str
    patch: int
    width: int
    layers: int
    heads: int
    projection: int
    image: int
    entry_block: int = 2

    @property
    def grid(self) -> int:
        """Patches a side; equals the latents' side."""
        return self.image // self.patch


@dataclass(frozen=True)
class BackendSpec:
    """A language model that answers.

    Attributes:
        name: registered name of the backend.
        llm, connector: artefacts' names; no connector where the language model's artefact holds it.
        prompt: how a conversation becomes the model's text; which there are, the backend knows.
        preparation: how a photo becomes the codec's input, where it is not the profile's way.
        dtype: that the language model computes in; ``auto`` is float32 on a CPU, float16 on a GPU.
        options: whatever else the backend takes, by name.
    """

    name: str
    llm: str
    connector: str = ""
    prompt: str = "plain"
    preparation: Preparation | None = None
    dtype: Dtype = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def artefacts(self) -> list[str]:
        """Names of what it needs."""
        return [name for name in (self.llm, self.connector) if name]


@dataclass(frozen=True)
class Profile:
    """What fits together, by name.

    Attributes:
        scenario: how codec and neck were trained (ComNeck, Table 1).
        quality: that photos are encoded at where nobody asks for another.
        preparation: how a photo becomes the codec's input, unless a backend wants another way.
        neck: artefact's name, as in CodecSpec.
        backends: the default first.
    """

    name: str
    description: str
    scenario: Scenario
    quality: int
    preparation: Preparation
    codec: CodecSpec
    neck: str
    clip: ClipSpec
    backends: tuple[BackendSpec, ...]

    def __post_init__(self) -> None:
        qualities = self.codec.qualities
        if not qualities or list(qualities) != sorted(set(qualities) & set(QUALITIES)):
            raise ValueError(f"codec.qualities are {list(qualities)}; they are numbers from 1 to 15, ascending")
        if self.quality not in qualities:
            raise ValueError(f"quality is {self.quality}, which is none of codec.qualities")
        if self.scenario not in get_args(Scenario):
            raise ValueError(f"scenario is {self.scenario!r}, which is none of {', '.join(get_args(Scenario))}")
        if len({(each.height, each.width) for each in map(self.preparation_for, self.backend_names())}) > 1:
            raise ValueError("its backends want photos of different sizes; a neck takes one size")

    def backend_names(self) -> list[str]:
        """The default first."""
        return [backend.name for backend in self.backends]

    def preparation_for(self, backend: str = "") -> Preparation:
        """How a photo is prepared for the backend of that name, or for the default."""
        own = (spec.preparation for spec in self.backends if spec.name == (backend or self.backends[0].name))
        return next(own, None) or self.preparation

    def codec_weights(self, quality: int) -> str:
        """Name of the codec's artefact for a quality. Raises BadInput where there is no such quality."""
        return self._named(self.codec.weights, quality)

    def neck_weights(self, quality: int) -> str:
        """Name of the neck's artefact for a quality. Raises BadInput where there is no such quality."""
        return self._named(self.neck, quality)

    def client_artefacts(self) -> list[str]:
        """Names of the artefacts that an edge client needs."""
        return list(dict.fromkeys(map(self.codec_weights, self.codec.qualities)))

    def server_artefacts(self) -> list[str]:
        """Names of the artefacts that a server needs."""
        necks = map(self.neck_weights, self.codec.qualities)
        llms = [name for backend in self.backends for name in backend.artefacts]
        return list(dict.fromkeys([*self.client_artefacts(), *necks, self.clip.weights, *llms]))

    def _named(self, weights: str, quality: int) -> str:
        if quality not in self.codec.qualities:
            known = ", ".join(map(str, self.codec.qualities))
            raise BadInput(f"profile {self.name!r} has no quality {quality}; it has {known}")
        return weights.replace(PLACEHOLDER, str(quality))


def profile_names() -> list[str]:
    """All profiles that there are, the default first."""
    names = sorted(_files())
    return sorted(names, key=lambda name: (name != DEFAULT_PROFILE, name))


@cache
def get_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        UnknownName: there is none; the message lists those there are.
        BadInput: its file makes no sense.
    """
    files = _files()
    if name not in files:
        raise UnknownName(f"no profile named {name!r}; there are: {', '.join(profile_names())}")
    try:
        return _parse(tomllib.loads(files[name].read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BadInput(f"profile {files[name]} cannot be read: {problem!r}") from problem


def _files() -> dict[str, Path]:
    own = {path.stem: path for path in Path(__file__).parent.glob("*.toml")}
    others = {entry.name: Path(entry.load()) for entry in entry_points(group="comneck.profiles")}
    users = {path.stem: path for path in (home() / "profiles").glob("*.toml")}
    return {**others, **users, **own}


def _parse(data: dict[str, Any]) -> Profile:
    from shared.images import Preparation  # numpy and Pillow: not for a --help that only names the default

    preparation = data["preparation"]

    def backend(table: dict[str, Any]) -> BackendSpec:
        own = table.get("preparation")
        return BackendSpec(**{**table, "preparation": Preparation(**{**preparation, **own}) if own else None})

    return Profile(
        name=data["name"],
        description=data["description"],
        scenario=data["scenario"],
        quality=data["quality"],
        preparation=Preparation(**preparation),
        codec=CodecSpec(**{**data["codec"], "qualities": tuple(data["codec"]["qualities"])}),
        neck=data["neck"]["weights"],
        clip=ClipSpec(**data["clip"]),
        backends=tuple(map(backend, data["backends"])),
    )
