"""``python -m shared.weights list | pull | check | import ...``: the subcommand of ``comneck``, on its own."""

import sys

from shared.command import Parser, run
from shared.weights.cli import add_weights_command


def main() -> int:
    parser = Parser(prog="comneck")
    add_weights_command(parser.add_subparsers(required=True, metavar="COMMAND"))
    return run(parser, ["weights", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
