"""``comneck weights import``: a published checkpoint becomes artefacts of this machine.

    COMNECK_HOME/catalogues
        comneck-d1-2.imported.toml                    the catalogue of one import, pins included
        comneck-codec-d1-2.3f2a9c1e77aa.safetensors   what it pins, named after its SHA-256
        comneck-neck-d1-2.90b11d4be5c8.safetensors
        shikra-7b.imported.toml
        shikra-7b.1c0e5d2f90ab/                       likewise, a folder
        llama-7b.imported.toml                        pins a folder that stays where the user keeps it

The catalogue is what makes them exist. It is put in place last and at once, so that an import which ends early leaves
everything as it was, and one that replaces another never mixes with it. What lies there may be copied elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from shared.bitstream import QUALITIES, Scenario
from shared.errors import BadInput, WeightsUnavailable
from shared.home import home
from shared.memory import gigabytes
from shared.weights.catalogue import Kind, PinnedFile, catalogue, catalogue_paths, read_catalogue
from shared.weights.checkpoints import Checkpoint, read_checkpoint
from shared.weights.convert import TOKENIZER_FILES, llama_adapter_from_published, shikra_from_delta
from shared.weights.fetch import sha256
from shared.weights.folders import TensorFolder, listed
from shared.weights.models import MODELS, PublishedModel, check
from shared.weights.store import plain_errors, sync, turn

LICENCE = "unknown; see where it came from"
Say = Callable[[str], object]

_OURS = re.compile(r"\.[0-9a-f]{12}(\.safetensors)?$")  # names of what is made here end so


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
        return _catalogue_of(self.codec if self.neck is None else f"comneck-{self.scenario}-{self.quality}")


@dataclass(frozen=True)
class _Made:
    """What is finished and not catalogued yet.

    Attributes:
        path: of a file or a folder in the workshop, or of a folder that stays where it is.
        files: of a folder, those in it that matter; none for all.
    """

    path: Path
    name: str
    kind: Kind
    summary: str
    licence: str = LICENCE
    files: tuple[str, ...] = ()


def import_model(name: str, path: Path, say: Say = lambda line: None) -> str:
    """Catalogues a published model's folder, to be used where it lies; returns the artefact's name.

    Raises:
        BadInput: its tensors, configuration or tokenizer are not the model's; a name that another catalogue has.
        WeightsUnavailable: the cache folder cannot be written.
    """
    model, path = MODELS[name], path.resolve()
    _check(model, path)
    with _workshop(_catalogue_of(name), [name], say) as workshop:
        weights = TensorFolder(path).files
        say(f"{name}: hashing {gigabytes(sum(file.stat().st_size for file in weights))}")
        described = ("config.json", "params.json", *TOKENIZER_FILES)
        files = [*(file.name for file in weights), *(file for file in described if (path / file).is_file())]
        made = _Made(path, name, model.kind, model.summary, model.licence, tuple(files))
        _install([made], _catalogue_of(name), workshop, path.name)
    return name


def import_shikra(base: Path, delta: Path, say: Say = lambda line: None) -> str:
    """Makes Shikra of LLaMA-7B and the delta that its authors publish; returns the artefact's name.

    Raises:
        BadInput: one of the two is not what it should be; a name that another catalogue has.
        WeightsUnavailable: the cache folder cannot be written, or its disk is too full.
    """
    model = MODELS["shikra-7b"]
    _check(MODELS["llama-7b"], base, tokenizer=False)
    _check(model, delta)
    with _workshop(_catalogue_of(model.name), [model.name], say) as workshop:
        needed, free = sum(2 * math.prod(shape) for shape in model.shapes.values()), shutil.disk_usage(workshop).free
        if needed > free:
            raise WeightsUnavailable(
                f"{model.name} takes {gigabytes(needed)}, and the disk of {home()} has {gigabytes(free)} free: free "
                "some space, or set COMNECK_HOME to another folder"
            )
        made = _Made(workshop / model.name, model.name, model.kind, model.summary, model.licence)
        made.path.mkdir()
        say(f"{model.name}: adding {delta.name} to {base.name}, {gigabytes(needed)}")
        shikra_from_delta(base, delta, made.path)
        _install([made], _catalogue_of(model.name), workshop, delta.name)
    return model.name


def import_llama_adapter(path: Path, say: Say = lambda line: None) -> str:
    """Makes a connector of LLaMA-Adapter's captioning release; returns the artefact's name.

    Raises:
        BadInput: it is another file, or has values that are not finite; a name that another catalogue has.
        WeightsUnavailable: the cache folder cannot be written.
    """
    model = MODELS["llama-adapter-caption-vit-l"]
    _check(model, path)
    with _workshop(_catalogue_of(model.name), [model.name], say) as workshop:
        made = _Made(workshop / model.name, model.name, model.kind, model.summary, model.licence)
        llama_adapter_from_published(path, made.path)
        _install([made], _catalogue_of(model.name), workshop, path.name)
    return model.name


def import_v2l(vocabulary: Path, embedding: Path, say: Say = lambda line: None) -> str:
    """Makes a codebook of what the V2L-Tokenizer authors publish; returns the artefact's name.

    Raises:
        BadInput: what ``codebook_from_published`` raises; a name that another catalogue has.
        WeightsUnavailable: the cache folder cannot be written.
    """
    from shared.weights.codebook import codebook_from_published

    name, codebook = "v2l-codebook", codebook_from_published(vocabulary, embedding)
    with _workshop(_catalogue_of(name), [name], say) as workshop:
        summary = f"V2L-Tokenizer's global codebook, {len(codebook.words):,} words"
        made = _Made(workshop / name, name, "connector", summary)
        codebook.save(made.path)
        _install([made], _catalogue_of(name), workshop, embedding.name)
    return name


def import_checkpoint(
    path: Path,
    name: str | None = None,
    scenario: str | None = None,
    quality: int | None = None,
    say: Say = lambda line: None,
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
    with _workshop(plan.catalogue, plan.names, say) as workshop:
        made, digest = _make(checkpoint, plan, f"{what}, quality {plan.quality}", workshop, say)
        _install(made, plan.catalogue, workshop, path.name)
    return replace(plan, codec_digest=digest)


def _catalogue_of(title: str) -> Path:
    return home() / "catalogues" / f"{title}.imported.toml"


def _check(model: PublishedModel, path: Path, tokenizer: bool = True) -> None:
    if problems := check(model, path, tokenizer).problems:
        raise BadInput(f"{path} is not {model.summary}: {listed(problems)}")


@contextmanager
def _workshop(catalogued: Path, names: list[str], say: Say) -> Iterator[Path]:
    """A folder to make artefacts of these names in, beside their catalogue, while no other process imports."""
    from safetensors import SafetensorError

    folder = catalogued.parent
    workshop = folder / ".import.new"
    with plain_errors(home()), turn(folder / ".import.lock", "another process is importing; waiting", say):
        _check_free(catalogued, names)
        shutil.rmtree(workshop, ignore_errors=True)  # of a process that was killed
        workshop.mkdir()
        try:
            yield workshop
        except SafetensorError as problem:  # its way to say that the disk is full
            raise WeightsUnavailable(
                f"{folder} cannot be written: {problem}; free some space, or set COMNECK_HOME to another folder"
            ) from problem
        finally:
            shutil.rmtree(workshop, ignore_errors=True)


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


def _check_free(catalogued: Path, names: list[str]) -> None:
    """Raises BadInput if another catalogue has one of the names."""
    for origin, path in catalogue_paths().items():
        if path != catalogued:
            taken = {artefact.name for artefact in read_catalogue(path)}.intersection(names)
            if taken:
                raise BadInput(f"the name {min(taken)} is taken in the catalogue {origin}: delete it there first")


def _make(checkpoint: Checkpoint, plan: Imported, summary: str, folder: Path, say: Say) -> tuple[list[_Made], str]:
    """Writes the artefacts to a folder: what they are, and the codec's digest."""
    import torch

    from shared.codecs.artefact import read_artefact, write_artefact
    from shared.weights.digest import save_tensors

    made = [_Made(folder / plan.codec, plan.codec, "codec", summary)]
    say(f"{plan.codec}: making its entropy path in integers; half a minute for the largest")
    qualities = {plan.quality: (torch.ones(checkpoint.network.M), torch.ones(checkpoint.network.M))}
    codec = made[0].path
    write_artefact(codec, checkpoint.network, checkpoint.bottleneck, qualities, storage="float32", trainable=True)
    digest = read_artefact(codec).digest
    if plan.neck:
        say(f"{plan.neck}: writing")
        made.append(_Made(folder / plan.neck, plan.neck, "neck", f"Transform-neck from {summary}"))
        metadata = {"scenario": str(plan.scenario), "quality": str(plan.quality)}
        save_tensors(made[1].path, checkpoint.neck, "float32", metadata)
    return made, digest


def _install(made: list[_Made], catalogued: Path, workshop: Path, checkpoint: str) -> None:
    """Puts what was made in place, then the catalogue that pins it, and removes that of the import it replaces."""
    old: set[Path] = set()
    with suppress(BadInput):  # none yet, or none that makes sense
        old = {artefact.shipped.path for artefact in read_catalogue(catalogued) if artefact.shipped}
    folder, draft = catalogued.parent, workshop / catalogued.name
    draft.write_text("# Written by `comneck weights import`, which replaces it.\n", encoding="utf-8")
    new: set[Path] = set()
    for each in made:
        place, pins = _place(each, folder, workshop)
        with draft.open("a", encoding="utf-8") as out:
            out.write(_entry(each, place, pins, checkpoint))
        if place != each.path:
            for path in [*each.path.rglob("*"), each.path]:
                if path.is_file():
                    path.chmod(draft.stat().st_mode)  # safetensors writes files that only their owner can read
                sync(path)
            if place.is_dir():  # of an import of the same bytes
                place.replace(workshop / f"{each.name}.old")
            each.path.replace(place)
        new.add(place)
    sync(draft)
    sync(folder)
    draft.replace(catalogued)
    sync(folder)
    catalogue.cache_clear()
    for path in old - new:
        if path.parent == folder and _OURS.search(path.name):  # never a folder that a user keeps
            with suppress(OSError):  # a process may have it open, on systems where that matters
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _place(made: _Made, folder: Path, workshop: Path) -> tuple[Path, tuple[PinnedFile, ...]]:
    """Where something made is to lie, and its files as they are there."""
    if made.path.is_file():
        digest = sha256(made.path)
        place = folder / f"{made.name}.{digest[:12]}.safetensors"
        return place, (PinnedFile(place.name, made.path.stat().st_size, digest),)
    names = made.files or sorted(path.relative_to(made.path).as_posix() for path in made.path.rglob("*"))
    pins = tuple(PinnedFile(name, (made.path / name).stat().st_size, sha256(made.path / name)) for name in names)
    if workshop not in made.path.parents:
        return made.path, pins
    digest = hashlib.sha256("".join(pin.sha256 for pin in pins).encode()).hexdigest()
    return folder / f"{made.name}.{digest[:12]}", pins


def _entry(made: _Made, place: Path, pins: tuple[PinnedFile, ...], checkpoint: str) -> str:
    """One artefact, as catalogues have it."""
    if made.path.is_file():
        kind, installs = "import", ["model.safetensors"]
    else:
        kind, installs = "folder", [pin.name for pin in pins]
    lines = [
        "",
        "[[artefact]]",
        f"name = {_quoted(made.name)}",
        f"kind = {_quoted(made.kind)}",
        f"summary = {_quoted(made.summary)}",
        f"licence = {_quoted(made.licence)}",
        f"installs = [{', '.join(map(_quoted, installs))}]",
        "",
        "[[artefact.source]]",
        f"kind = {_quoted(kind)}",
        f"checkpoint = {_quoted(checkpoint)}",
    ]
    if kind == "folder":
        lines.append(f"path = {_quoted(str(place) if place == made.path else place.name)}")
    lines += ["files = [", *(_pin(pin) for pin in pins), "]", ""]
    return "\n".join(lines)


def _pin(pin: PinnedFile) -> str:
    return f"    {{ name = {_quoted(pin.name)}, size = {pin.size}, sha256 = {_quoted(pin.sha256)} }},"


def _quoted(text: str) -> str:
    """A TOML string, whatever a file may be called."""
    return json.dumps("".join(letter if letter.isprintable() else "?" for letter in text), ensure_ascii=False)
