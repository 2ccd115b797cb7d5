"""``python -m shared.weights list | pull | verify | path``: the subcommand of ``comneck``, on its own."""

import argparse
import sys

from shared.errors import ComneckError, exit_code_help
from shared.weights.cli import add_weights_command


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="comneck", epilog=exit_code_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_weights_command(parser.add_subparsers(required=True, metavar="COMMAND"))
    args = parser.parse_args(["weights", *sys.argv[1:]])
    try:
        return int(args.handler(args))
    except ComneckError as problem:
        print(f"comneck: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
