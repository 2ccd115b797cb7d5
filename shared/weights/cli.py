"""``comneck weights list | pull | check | import | verify | path``: the artefacts of this machine by command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import BadInput, UnknownName, WeightsUnavailable
from shared.memory import free_memory, gigabytes
from shared.weights.models import MODELS, Report
from shared.weights.store import Status, Store

LISTED = 20  # problems of a checkpoint; what is another model's has a thousand


def add_weights_command(subparsers: Any) -> None:
    """Adds ``weights`` to the subcommands of a parser (what ``ArgumentParser.add_subparsers`` returns).

    Each parsed command line has ``run``, which takes it and raises a ComneckError on failure.
    """
    parser = subparsers.add_parser("weights", help="list, fetch and check the weights", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="all artefacts, and which are on this machine")
    _add_json(command)
    command.set_defaults(run=_list)

    command = commands.add_parser("pull", help="fetch and install artefacts")
    command.add_argument("names", nargs="*", metavar="NAME", help="artefacts (default: those of the default profile)")
    command.add_argument("--profile", help="all that a server of this profile needs")
    command.add_argument("--force", action="store_true", help="install anew what is already installed")
    _add_json(command)
    command.set_defaults(run=_pull)

    command = commands.add_parser("check", help="compare a published checkpoint with its model", description=_CHECK)
    command.add_argument("name", choices=list(MODELS), metavar="NAME", help=f"model: {', '.join(MODELS)}")
    command.add_argument("path", type=Path, metavar="PATH", help="folder or file as it was downloaded")
    _add_json(command)
    command.set_defaults(run=_check)

    command = commands.add_parser(
        "import", help="make artefacts of a published checkpoint", description=_IMPORT, usage=_IMPORT_USAGE
    )
    command.add_argument("what", metavar="WHAT", help="a checkpoint of ComNeck or a codec; else what it is, as above")
    command.add_argument("path", type=Path, nargs="?", metavar="PATH", help="folder or file as it was downloaded")
    command.add_argument("--scenario", help="of a release, d1, d2 or d3 (default: as the file's name says)")
    command.add_argument("--quality", type=int, help="rate point (default: likewise; 1 for a codec alone)")
    command.add_argument("--name", help="what to call a codec that comes alone")
    command.add_argument("--base", type=Path, metavar="FOLDER", help="LLaMA-7B, which Shikra's delta is added to")
    command.add_argument("--delta", type=Path, metavar="FOLDER", help="shikra-7b-delta-v1")
    command.add_argument("--vocabulary", type=Path, metavar="FILE", help="global_vocabulary.npy")
    command.add_argument("--embedding", type=Path, metavar="FILE", help="global_codebook_embedding.pth")
    _add_json(command)
    command.set_defaults(run=_import)

    command = commands.add_parser("verify", help="hash installed artefacts and compare with what was installed")
    command.add_argument("names", nargs="*", metavar="NAME", help="artefacts (default: all that are on this machine)")
    _add_json(command)
    command.set_defaults(run=_verify)

    command = commands.add_parser("path", help="print where an installed artefact is")
    command.add_argument("name", metavar="NAME", help="artefact")
    command.set_defaults(run=_path)


_DESCRIPTION = (
    "Weights are kept in COMNECK_HOME (default: the user's cache folder). HF_ENDPOINT names a mirror of the Hugging "
    "Face Hub; a package index is used as pip is configured."
)


_CHECK = (
    "Compares a checkpoint with the full list of its model's tensors, looks at its tokenizer, and says how much memory "
    "it takes to load. No tensor is loaded, and nothing is executed."
)

_FOLDERS = [name for name, model in MODELS.items() if model.kind == "llm" and name != "shikra-7b"]

_IMPORT = (
    "Turns a release of the ComNeck authors, a codec and its neck, or a codec alone, ELIC or TIC, into artefacts of "
    "this machine; likewise what the backends' authors publish. Language models are used where they lie, Shikra apart, "
    "which is made of two. Files are read as data only. Importing again replaces what was imported before."
)

_IMPORT_USAGE = f"""comneck weights import d1_2.pth.tar [--scenario d1] [--quality 2]
       comneck weights import CODEC_FILE --name NAME [--quality 1]
       comneck weights import {{{",".join(_FOLDERS)}}} FOLDER
       comneck weights import shikra --base FOLDER --delta FOLDER
       comneck weights import llama-adapter FILE
       comneck weights import v2l --vocabulary FILE --embedding FILE"""


def _list(args: argparse.Namespace) -> None:
    store = Store()
    _print([store.status(name) for name in store.artefacts], args.json)


def _pull(args: argparse.Namespace) -> None:
    from shared.profiles import DEFAULT_PROFILE, get_profile

    store = Store(say=_say)
    names, unknown = [*args.names], []
    profile = args.profile or (None if names else DEFAULT_PROFILE)
    if profile:
        names += get_profile(profile).server_artefacts()
    for name in (names := list(dict.fromkeys(names))):
        try:
            store.status(name)  # a misspelt name is found before the first long download
        except UnknownName as problem:
            if name in args.names:
                raise
            unknown.append(name)
            _say(str(problem))
    there = [name for name in names if name not in unknown]
    for name in there:
        store.pull(name, force=args.force)
    _print([store.status(name) for name in there], args.json)
    if unknown:
        raise WeightsUnavailable(
            f"{len(unknown)} of {len(names)} artefacts of profile {profile} are for you to bring: "
            f"{', '.join(unknown)}; `comneck profiles show {profile}` says how"
        )


def _check(args: argparse.Namespace) -> None:
    from shared.weights.models import check

    report = check(MODELS[args.name], args.path)
    if args.json:
        print(json.dumps(_report(report), indent=2))
    else:
        print(f"{args.path}: {report.tensors} tensors, {gigabytes(report.size)}")
        if report.tokens is not None:
            print(f"tokenizer: {report.tokens:,} tokens")
        full, half = (gigabytes(_memory(report)[name]) for name in ("float32", "float16"))
        free = ", ".join(f"{gigabytes(size)} on {device}" for device, size in _free().items())
        print(f"memory to load it: {full} in float32, {half} in float16 or bfloat16; free: {free}")
        for problem in report.problems[:LISTED]:
            print(f"wrong: {problem}")
        if len(report.problems) > LISTED:
            print(f"and {len(report.problems) - LISTED:,} more (--json lists all)")
    if report.problems:
        raise BadInput(f"{args.path} is not {report.model.summary} as it was published")


def _import(args: argparse.Namespace) -> None:
    from shared.weights import importing

    if args.what in _FOLDERS:
        _takes(args, "path")
        made = importing.import_model(args.what, args.path, _say)
    elif args.what == "shikra":
        _takes(args, "base", "delta")
        made = importing.import_shikra(args.base, args.delta, _say)
    elif args.what == "llama-adapter":
        _takes(args, "path")
        made = importing.import_llama_adapter(args.path, _say)
    elif args.what == "v2l":
        _takes(args, "vocabulary", "embedding")
        made = importing.import_v2l(args.vocabulary, args.embedding, _say)
    else:
        _takes(args, optional=("scenario", "quality", "name"))
        _import_codec(args)
        return
    _print([Store().status(made)], args.json)


def _import_codec(args: argparse.Namespace) -> None:
    from shared.weights.importing import import_checkpoint

    made = import_checkpoint(Path(args.what), args.name, args.scenario, args.quality, _say)
    store = Store()
    statuses = [store.status(name) for name in made.names]
    if args.json:
        rows = [_row(status) for status in statuses]
        print(json.dumps({"artefacts": rows, "codec_digest": made.codec_digest}, indent=2))
        return
    _print(statuses, as_json=False)
    print(f"codec digest {made.codec_digest[:8]}")
    if made.scenario == "d1":
        print("next: cloud-server serve --profile vit-l-14")
    else:
        print(f"next: name {' and '.join(made.names)} in a profile of your own, in {store.home / 'profiles'}")


def _takes(args: argparse.Namespace, *wanted: str, optional: Sequence[str] = ()) -> None:
    """Raises BadInput unless these arguments were given, all that are wanted, and no others but the optional ones."""
    for name in ("path", "scenario", "quality", "name", "base", "delta", "vocabulary", "embedding"):
        given = getattr(args, name) is not None
        if given != (name in wanted) and not (given and name in optional):
            raise BadInput(
                f"importing {args.what} {'takes no' if given else 'needs'} {'PATH' if name == 'path' else f'--{name}'} "
                "(see comneck weights import --help)"
            )


def _verify(args: argparse.Namespace) -> None:
    store = Store()
    statuses = {name: store.status(name) for name in args.names or store.artefacts}
    if not args.names:
        statuses = {name: status for name, status in statuses.items() if status.state != "missing"}
    problems = {}
    for name in statuses:
        try:
            store.verify(name)
        except WeightsUnavailable as problem:
            problems[name] = str(problem)
    if args.json:
        rows = [{"name": name, "ok": name not in problems, "problem": problems.get(name, "")} for name in statuses]
        print(json.dumps(rows, indent=2))
    else:
        for name in statuses:
            print(problems.get(name, f"{name} is as it was installed"))
    if problems:
        raise WeightsUnavailable(f"{len(problems)} of {len(statuses)} are not in order: {', '.join(problems)}")


def _path(args: argparse.Namespace) -> None:
    print(Store().path(args.name))


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print(statuses: list[Status], as_json: bool) -> None:
    if as_json:
        print(json.dumps([_row(status) for status in statuses], indent=2))
        return
    table = [("NAME", "KIND", "SIZE", "LICENCE", "STATE", "FROM")]
    for status in statuses:
        it = status.artefact
        table.append((it.name, it.kind, _megabytes(status.size), it.licence, status.state, status.origin))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _row(status: Status) -> dict[str, Any]:
    return {
        "name": status.artefact.name,
        "kind": status.artefact.kind,
        "summary": status.artefact.summary,
        "licence": status.artefact.licence,
        "state": status.state,
        "size": status.size,
        "from": status.origin,
        "path": str(status.path) if status.path else None,
        "problem": status.problem,
    }


def _report(report: Report) -> dict[str, Any]:
    return {
        "model": report.model.name,
        "tensors": report.tensors,
        "size": report.size,
        "tokens": report.tokens,
        "memory": _memory(report),
        "free": _free(),
        "problems": report.problems,
    }


def _memory(report: Report) -> dict[str, int]:
    """Bytes that it takes to load, by type."""
    return {"float32": 4 * report.parameters, "float16": 2 * report.parameters, "bfloat16": 2 * report.parameters}


def _free() -> dict[str, int]:
    """Bytes that are free, by device."""
    import torch

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {device: free_memory(device) for device in devices}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
