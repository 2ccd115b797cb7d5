"""``comneck weights list | pull | import | verify | path``: the artefacts of this machine from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from shared.errors import WeightsUnavailable
from shared.weights.store import Status, Store


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
    command.add_argument("names", nargs="*", metavar="NAME", help="artefacts (default: all)")
    command.add_argument("--profile", help="all that a server of this profile needs")
    command.add_argument("--force", action="store_true", help="install anew what is already installed")
    _add_json(command)
    command.set_defaults(run=_pull)

    command = commands.add_parser("import", help="make artefacts of a published checkpoint", description=_IMPORT)
    command.add_argument("file", type=Path, metavar="FILE", help="checkpoint as it was downloaded, like d1_2.pth.tar")
    command.add_argument("--scenario", help="d1, d2 or d3 (default: as the file's name says)")
    command.add_argument("--quality", type=int, help="rate point (default: likewise; 1 for a codec alone)")
    command.add_argument("--name", help="what to call a codec that comes alone")
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


_IMPORT = (
    "Turns a release of the ComNeck authors, a codec and its neck, or a codec alone, ELIC or TIC, into artefacts of "
    "this machine. The file is read as data only. Importing it again replaces them."
)


def _list(args: argparse.Namespace) -> None:
    store = Store()
    _print([store.status(name) for name in store.artefacts], args.json)


def _pull(args: argparse.Namespace) -> None:
    store = Store(say=_say)
    names = [*args.names]
    if args.profile:
        from shared.profiles import get_profile

        names += get_profile(args.profile).server_artefacts()
    names = list(dict.fromkeys(names)) or list(store.artefacts)
    for name in names:
        store.status(name)  # a misspelt name is found before the first long download
    for name in names:
        store.pull(name, force=args.force)
    _print([store.status(name) for name in names], args.json)


def _import(args: argparse.Namespace) -> None:
    from shared.weights.importing import import_checkpoint

    made = import_checkpoint(args.file, args.name, args.scenario, args.quality, _say)
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


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
