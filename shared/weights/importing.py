"""``comneck weights import``: a published checkpoint becomes artefacts of this machine.

    COMNECK_HOME/catalogues
        comneck-d1-2.imported.toml                    the catalogue of one import, pins included
        comneck-codec-d1-2.3f2a9c1e77aa.safetensors   what it pins, named after its SHA-256
        comneck-neck-d1-2.90b11d4be5c8.safetensors

The catalogue is what makes them exist. It is put in place last and at once, so that an import which ends early leaves
everything as it was, and one that replaces another never mixes with it. The three may be copied to another machine.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from shared.bitstream import QUALITIES, Scenario
from shared.errors import BadInput, WeightsUnavailable
from shared.home import home
from shared.weights.catalogue import Kind, PinnedFile, catalogue, catalogue_paths, read_catalogue
from shared.weights.checkpoints import Checkpoint, read_checkpoint
from shared.weights.fetch import sha256
from shared.weights.store import plain_errors, sync, turn

LICENCE = "unknown; see where it came from"


@dataclass(frozen=True)
class Imported:
    """What an import makes.

    Attributes:
        codec: name of the artefact.
        neck: the same; None for a codec alone.
        scenario: that of the neck; None for a codec alone.
        quality: the rate point that the codec was trained for.
        codec_digest: in hex; its first 8 digits are how a bitstream names the codec.
    """

    codec: str
    neck: str | None
    scenario: str | None
    quality: int
    codec_digest: str = ""

    @property
    def names(self) -> list[str]:
        """Of its artefacts."""
        return [self.codec, self.neck] if self.neck else [self.codec]

    @property
    def catalogue(self) -> Path:
        """Where its artefacts are catalogued."""
        title = self.codec if self.neck is None else f"comneck-{self.scenario}-{self.quality}"
        return home() / "catalogues" / f"{title}.imported.toml"


@dataclass(frozen=True)
class _Made:
    """A finished file that is not in place yet."""

    path: Path
    name: str
    kind: Kind
    summary: str


def import_checkpoint(
    path: Path,
    name: str | None = None,
    scenario: str | None = None,
    quality: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Imported:
    """Makes artefacts of a checkpoint, all of them or none; importing it again replaces them.

    Args:
        path: a release of the ComNeck authors, or a codec alone (checkpoints.py tells which).
        name: of the artefact; for a codec alone, and needed then.
        scenario, quality: of a release; by default what its file name says, as d1_2.pth.tar does. A codec alone has no
            scenario, and quality 1 by default.
        say: takes the lines that tell what goes on.

    Raises:
        BadInput: what ``read_checkpoint`` raises; a name, scenario or quality that makes no sense or is needed; a name
            that another catalogue has; weights that integers cannot hold.
        WeightsUnavailable: the cache folder cannot be written.
    """
    checkpoint = read_checkpoint(path)
    network = checkpoint.network
    what = f"{network.family} N={network.N} M={network.M}"
    say(f"{path.name}: {what}, {'and its neck' if checkpoint.neck else 'without a neck'}")
    plan = _plan(path, checkpoint, name, scenario, quality)
    folder = plan.catalogue.parent
    with plain_errors(home()), turn(folder / ".import.lock", "another process is importing; waiting", say):
        _check_free(plan)
        building = folder / ".import.new"
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir()
        try:
            made, digest = _make(checkpoint, plan, f"{what}, quality {plan.quality}", building, say)
            _install(made, plan.catalogue, path.name)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return replace(plan, codec_digest=digest)


def _plan(path: Path, checkpoint: Checkpoint, name: str | None, scenario: str | None, quality: int | None) -> Imported:
    if quality is not None and quality not in QUALITIES:
        raise BadInput(f"quality {quality} is none of {QUALITIES[0]} to {QUALITIES[-1]}")
    if scenario is not None and scenario not in get_args(Scenario):
        raise BadInput(f"scenario {scenario!r} is none of {', '.join(get_args(Scenario))}")
    if not checkpoint.neck:
        if scenario:
            raise BadInput(f"{path.name} holds a codec without a neck, which has no scenario: leave out --scenario")
        if not name:
            raise BadInput(f"{path.name} holds a codec without a neck: say what to call it with --name NAME")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII) or name.lower().startswith("comneck-"):
            raise BadInput(
                f"--name {name!r} cannot be: use up to 100 letters, digits, dots, hyphens and underscores, and no "
                "comneck- at the start, by which the authors' releases are known"
            )
        return Imported(name, None, None, quality or 1)
    if name:
        raise BadInput(f"{path.name} holds a codec and a neck, named after scenario and quality: leave out --name")
    told = re.match(r"(d[123])_([1-4])(?!\d)", path.name)
    scenario = scenario or (told[1] if told else None)
    quality = quality or (int(told[2]) if told else None)
    if not scenario or not quality:
        raise BadInput(
            f"{path.name} does not tell scenario and quality, as d1_2.pth.tar does: say them with --scenario d1 "
            "--quality 2"
        )
    return Imported(f"comneck-codec-{scenario}-{quality}", f"comneck-neck-{scenario}-{quality}", scenario, quality)


def _check_free(plan: Imported) -> None:
    """Raises BadInput if another catalogue has one of the names."""
    for origin, path in catalogue_paths().items():
        if path != plan.catalogue:
            taken = {artefact.name for artefact in read_catalogue(path)}.intersection(plan.names)
            if taken:
                raise BadInput(f"the name {min(taken)} is taken in the catalogue {origin}: delete it there first")


def _make(
    checkpoint: Checkpoint, plan: Imported, summary: str, folder: Path, say: Callable[[str], object]
) -> tuple[list[_Made], str]:
    """Writes the artefacts to a folder: what they are, and the codec's digest."""
    import torch
    from safetensors import SafetensorError

    from shared.codecs.artefact import read_artefact, write_artefact
    from shared.weights.digest import save_tensors

    made = [_Made(folder / plan.codec, plan.codec, "codec", summary)]
    say(f"{plan.codec}: making its entropy path in integers; half a minute for the largest")
    qualities = {plan.quality: (torch.ones(checkpoint.network.M), torch.ones(checkpoint.network.M))}
    try:
        codec = made[0].path
        write_artefact(codec, checkpoint.network, checkpoint.bottleneck, qualities, storage="float32", trainable=True)
        digest = read_artefact(codec).digest
        if plan.neck:
            say(f"{plan.neck}: writing")
            made.append(_Made(folder / plan.neck, plan.neck, "neck", f"Transform-neck from {summary}"))
            metadata = {"scenario": str(plan.scenario), "quality": str(plan.quality)}
            save_tensors(made[1].path, checkpoint.neck, "float32", metadata)
    except SafetensorError as problem:  # its way to say that the disk is full
        raise WeightsUnavailable(
            f"{folder} cannot be written: {problem}; free some space, or set COMNECK_HOME to another folder"
        ) from problem
    return made, digest


def _install(made: list[_Made], catalogued: Path, checkpoint: str) -> None:
    """Puts the files in place, then the catalogue that pins them, and removes those of the import it replaces."""
    old: set[Path] = set()
    with suppress(BadInput):  # none yet, or none that makes sense
        old = {artefact.shipped.path for artefact in read_catalogue(catalogued) if artefact.shipped}
    folder, draft = catalogued.parent, made[0].path.with_name(catalogued.name)
    draft.write_text("# Written by `comneck weights import`, which replaces it.\n", encoding="utf-8")
    new: set[Path] = set()
    for each in made:
        digest = sha256(each.path)
        file = PinnedFile(f"{each.name}.{digest[:12]}.safetensors", each.path.stat().st_size, digest)
        with draft.open("a", encoding="utf-8") as out:
            out.write(_entry(each, file, checkpoint))
        each.path.chmod(draft.stat().st_mode)  # safetensors writes files that only their owner can read
        sync(each.path)
        new.add(each.path.replace(folder / file.name))
    sync(draft)
    sync(folder)
    draft.replace(catalogued)
    sync(folder)
    catalogue.cache_clear()
    for path in old - new:
        with suppress(OSError):  # a process may have it open, on systems where that matters
            path.unlink()


def _entry(made: _Made, file: PinnedFile, checkpoint: str) -> str:
    """One artefact, as catalogues have it."""
    return f"""
[[artefact]]
name = {_quoted(made.name)}
kind = {_quoted(made.kind)}
summary = {_quoted(made.summary)}
licence = {_quoted(LICENCE)}
installs = ["model.safetensors"]

[[artefact.source]]
kind = "import"
checkpoint = {_quoted(checkpoint)}
files = [
    {{ name = {_quoted(file.name)}, size = {file.size}, sha256 = {_quoted(file.sha256)} }},
]
"""


def _quoted(text: str) -> str:
    """A TOML string, whatever a file may be called."""
    return json.dumps("".join(letter if letter.isprintable() else "?" for letter in text), ensure_ascii=False)
