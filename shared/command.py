"""What the three commands have in common: how they read their arguments, fail and exit."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from shared.errors import BadInput, ComneckError, exit_code_help

INTERRUPTED = 130
READER_GONE = 141  # as a shell reports SIGPIPE
EXTRAS = "pip install 'comneck[server]' has what a server needs, 'comneck[train]' what training and evaluation need"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and the exit codes at the end of --help."""

    def __init__(self, **kwargs: Any) -> None:
        defaults = {"epilog": exit_code_help(), "formatter_class": argparse.RawDescriptionHelpFormatter}
        description = textwrap.fill(kwargs.pop("description", ""), 80)  # that formatter takes it as it is
        super().__init__(description=description, **{**defaults, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(BadInput.exit_code, f"{self.prog}: {message} (see {self.prog} --help)\n")


def run(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parses, calls what the subcommand set as its default ``run`` with the parsed arguments, returns the exit code.

    A failure is one line on stderr. With COMNECK_DEBUG=1 its traceback goes before.
    """
    # torch, through the libraries that we use: nothing that a user could do about it.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\..*is deprecated", category=FutureWarning)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `edge-client send ... | head -c 9`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails as well
        return READER_GONE
    except Exception as problem:
        if os.environ.get("COMNECK_DEBUG"):
            traceback.print_exc()
        if isinstance(problem, ComneckError):
            code, message = problem.exit_code, str(problem)
        elif isinstance(problem, ModuleNotFoundError):
            code = ComneckError.exit_code
            message = f"this needs the Python package {problem.name}: {EXTRAS}"
        else:
            code = ComneckError.exit_code
            message = f"unexpected {type(problem).__name__}: {problem} (COMNECK_DEBUG=1 shows where)"
        print(f"{parser.prog}: {' '.join(message.split())}", file=sys.stderr)
        return code
