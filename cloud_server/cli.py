"""``cloud-server``: answers what edge clients ask."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from cloud_server.settings import ServerSettings
from shared.command import Parser, run
from shared.options import add_options, parse_options

if TYPE_CHECKING:
    from cloud_server.server import Addresses


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="cloud-server", description="Answers questions about photos that edge clients encode.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve",
        help="load the models, then answer over gRPC and REST",
        description="Loads the models, then answers over gRPC and REST until SIGINT (Ctrl-C) or SIGTERM.",
    )
    add_options(serve, ServerSettings)
    serve.add_argument("--json", action="store_true", help="print where it listens as one line of JSON")
    serve.set_defaults(run=_serve)
    return run(parser, argv)


def _serve(arguments: argparse.Namespace) -> None:
    settings = parse_options(ServerSettings, arguments)

    import logging

    from cloud_server.server import serve

    def announce(addresses: Addresses) -> None:
        if arguments.json:
            print(json.dumps({"profile": settings.profile, **asdict(addresses)}), flush=True)
        else:
            print(
                f"serving {settings.profile}: gRPC {addresses.grpc}, REST {addresses.http} (try {addresses.http}/docs)",
                flush=True,
            )

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    serve(settings, announce)


if __name__ == "__main__":
    raise SystemExit(main())
