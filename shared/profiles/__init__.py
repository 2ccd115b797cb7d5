"""Profiles: small data files that name what fits together. Adding one is adding a TOML file.

Our own lie beside this module, a user's in COMNECK_HOME/profiles; other packages add theirs under the entry point
``comneck.profiles``, whose entries are paths of TOML files.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import BadInput, UnknownName
from shared.home import home

if TYPE_CHECKING:
    from shared.bitstream import Scenario
    from shared.images import Preparation

DEFAULT_PROFILE = "small"


@dataclass(frozen=True)
class CodecSpec:
    """Which codec (its registered name) with which weights (an artefact's name)."""

    name: str
    weights: str


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
        llm, connector: artefacts' names.
        prompt: how a conversation becomes the model's text: ``chatml`` or ``plain``.
    """

    name: str
    llm: str
    connector: str
    prompt: str = "plain"


@dataclass(frozen=True)
class Profile:
    """What fits together, by name. See the TOML files for the meaning of each table."""

    name: str
    description: str
    scenario: Scenario
    rate: int
    preparation: Preparation
    codec: CodecSpec
    neck: str
    clip: ClipSpec
    backends: tuple[BackendSpec, ...]

    def client_artefacts(self) -> list[str]:
        """Names of the artefacts that an edge client needs."""
        return [self.codec.weights]

    def server_artefacts(self) -> list[str]:
        """Names of the artefacts that a server needs."""
        llms = [name for backend in self.backends for name in (backend.llm, backend.connector)]
        return list(dict.fromkeys([self.codec.weights, self.neck, self.clip.weights, *llms]))


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

    return Profile(
        name=data["name"],
        description=data["description"],
        scenario=data["scenario"],
        rate=data["rate"],
        preparation=Preparation(**data["preparation"]),
        codec=CodecSpec(**data["codec"]),
        neck=data["neck"]["weights"],
        clip=ClipSpec(**data["clip"]),
        backends=tuple(BackendSpec(**backend) for backend in data["backends"]),
    )
