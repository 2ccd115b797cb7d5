"""``comneck profiles show``: what a profile fits together, what of it is on this machine, and how the rest is got."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shared.errors import UnknownName
from shared.profiles import Profile, get_profile, profile_names
from shared.weights.catalogue import PackageSource, find_recipe
from shared.weights.store import Status, Store


@dataclass(frozen=True)
class Need:
    """An artefact that a profile names, and how it stands on this machine.

    Attributes:
        uses: what for: codec, neck, clip, names of backends.
        client: whether an edge client needs it; a server needs all.
        state: as in shared.weights.store.Status; ``unknown`` where nobody says how it is got.
        size: bytes on this disk; of a missing one, bytes to fetch, None where no catalogue tells.
        path: None where it is missing, damaged or unknown.
        command: that gets it; empty where it is here, or no command would.
        first, after: what else is to do, before the command and after it.
    """

    name: str
    uses: tuple[str, ...]
    client: bool
    state: str
    size: int | None
    path: str | None
    command: str = ""
    first: str = ""
    after: str = ""


def needs(profile: Profile, store: Store) -> list[Need]:
    """All that a server of the profile needs, codecs first. Nothing is fetched."""
    client = profile.client_artefacts()
    uses = {name: ["codec"] for name in client}
    for quality in profile.codec.qualities:
        uses.setdefault(profile.neck_weights(quality), ["neck"])
    uses.setdefault(profile.clip.weights, ["clip"])
    for backend in profile.backends:
        for name in backend.artefacts:
            uses.setdefault(name, []).append(backend.name)
    return [_need(name, tuple(uses[name]), name in client, store) for name in profile.server_artefacts()]


def _need(name: str, uses: tuple[str, ...], client: bool, store: Store) -> Need:
    try:
        status = store.status(name)
    except UnknownName:
        if recipe := find_recipe(name):
            return Need(name, uses, client, "missing", None, None, recipe.command, recipe.first, recipe.after)
        return Need(name, uses, client, "unknown", None, None, first=f"no catalogue has {name}: is the name right?")
    path, command = str(status.path) if status.path else None, _command(status)
    return Need(name, uses, client, status.state, status.size, path, command, "" if command else status.problem)


def _command(status: Status) -> str:
    """What gets a catalogued artefact; empty if it is there, or is part of a package."""
    name, shipped = status.artefact.name, status.artefact.shipped
    if status.path or isinstance(shipped, PackageSource):
        return ""
    if shipped is None:
        return f"comneck weights pull {'--force ' if status.state == 'damaged' else ''}{name}"
    recipe = find_recipe(name)
    return recipe.command if recipe else f"comneck weights import {shipped.checkpoint} --name {name}"


def served(profile: Profile, found: Sequence[Need]) -> list[int]:
    """The qualities whose codec and neck are here."""
    here = {need.name for need in found if need.path}
    return [quality for quality in profile.codec.qualities if _way_in(profile, quality) <= here]


def script(profile: Profile, found: Sequence[Need]) -> list[str]:
    """What gets all that is missing for a server to start: commands, and comments on what is to be done by hand.

    One quality is enough for that.
    """
    ways = set().union(*(_way_in(profile, quality) for quality in profile.codec.qualities))
    one = _way_in(profile, _quality(profile, found))
    missing = [need for need in found if not need.path and (need.name in one or need.name not in ways)]
    pulls = [need.name for need in missing if need.command == f"comneck weights pull {need.name}"]
    lines = [f"comneck weights pull {' '.join(pulls)}"] if pulls else []
    for need in missing:
        if need.name not in pulls and need.command not in lines:
            lines += [f"# {need.first}"] if need.first else []
            lines += [need.command] if need.command else []
            lines += [f"# then {need.after}"] if need.after else []
    return lines


def _quality(profile: Profile, found: Sequence[Need]) -> int:
    """The one to start with."""
    able = served(profile, found)
    return profile.quality if profile.quality in able or not able else able[0]


def _way_in(profile: Profile, quality: int) -> set[str]:
    """The artefacts of a quality."""
    return {profile.codec_weights(quality), profile.neck_weights(quality)}


def add_profiles_command(subparsers: Any) -> None:
    """Adds ``profiles`` to the subcommands of a parser, as shared.weights.cli adds ``weights``."""
    parser = subparsers.add_parser("profiles", help="what fits together, what it needs, and what of it is here")
    actions = parser.add_subparsers(required=True, metavar="COMMAND")
    show = actions.add_parser(
        "show",
        help="print what a profile needs and how to get what is missing",
        description="Prints a profile, every artefact that it needs, whether it is on this machine, and the commands "
        "that get what is not. Nothing is fetched.",
    )
    show.add_argument("name", nargs="?", metavar="NAME", help="profile (default: all)")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)


def _show(arguments: argparse.Namespace) -> None:
    profiles = [get_profile(name) for name in ([arguments.name] if arguments.name else profile_names())]
    store = Store()
    found = {profile.name: needs(profile, store) for profile in profiles}
    if arguments.json:
        print(json.dumps([_row(profile, found[profile.name]) for profile in profiles], indent=2))
    else:
        print("\n\n".join(_text(profile, found[profile.name]) for profile in profiles))


def _row(profile: Profile, found: Sequence[Need]) -> dict[str, Any]:
    row = asdict(profile)
    for backend in row["backends"]:
        backend["preparation"] = asdict(profile.preparation_for(backend["name"]))
    return row | {
        "artefacts": [asdict(need) for need in found],
        "complete": all(need.path for need in found),
        "served": served(profile, found),
        "commands": [line for line in script(profile, found) if not line.startswith("#")],
    }


def _text(profile: Profile, found: Sequence[Need]) -> str:
    codec, clip, size = profile.codec, profile.clip, profile.preparation
    fits: dict[str, list[str]] = {}
    for name in profile.backend_names():
        fits.setdefault(profile.preparation_for(name).fit, []).append(name)
    lines = [
        f"photos    {size.width}x{size.height}, " + ", ".join(f"{fit} for {' '.join(fits[fit])}" for fit in fits),
        f"codec     {codec.name}, scenario {profile.scenario}, quality {' '.join(map(str, codec.qualities))} "
        f"(default {profile.quality})",
        f"CLIP      {clip.grid}x{clip.grid} patches, {clip.layers} blocks, entered at {clip.entry_block}",
        *_table(found),
        *_what_to_do(profile, found),
    ]
    return "\n".join([f"{profile.name}: {profile.description}", *(f"  {line}" for line in lines)])


def _table(found: Sequence[Need]) -> list[str]:
    rows = [("NAME", "FOR", "ON", "STATE", "SIZE", "GET IT WITH")]
    for need in found:
        machines = "client, server" if need.client else "server"
        size = "" if need.size is None else f"{need.size / 1e6:,.1f} MB"
        rows.append((need.name, " ".join(need.uses), machines, need.state, size, need.command))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _what_to_do(profile: Profile, found: Sequence[Need]) -> list[str]:
    if all(need.path for need in found):
        return ["complete"]
    if lines := script(profile, found):
        return [f"to serve it at quality {_quality(profile, found)}:", *(f"  {line}" for line in lines)]
    return [f"enough for quality {' '.join(map(str, served(profile, found)))}"]
