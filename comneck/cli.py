"""The command ``comneck``: weights, profiles, training, evaluation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from shared.command import Parser, run
from shared.options import add_options, parse_options
from shared.profiles.cli import add_profiles_command
from shared.weights.cli import add_weights_command

TRAINERS = {
    "codec": ("training.codec", "CodecTraining", "a codec for rate and distortion"),
    "neck": ("training.neck", "NeckTraining", "a transform-neck for d1"),
    "connector": ("training.connector", "ConnectorTraining", "a LLaMA-Adapter connector on clean features"),
    "codebook": ("training.codebook", "CodebookTraining", "a V2L-Tokenizer codebook from captions and labels"),
}
EVALUATIONS = {
    "answers": ("evaluation.answers", "AnswerEvaluation", "what a backend says from pixels and through the bitstream"),
    "fewshot": ("evaluation.fewshot", "FewshotEvaluation", "labels from one example of each class"),
    "picture": ("evaluation.picture", "PictureOptions", "photos, bytes and answers as one picture"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="comneck", description="Weights, profiles, training and evaluation of comneck.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_weights_command(commands)
    add_profiles_command(commands)
    for command, jobs, doc in (("train", TRAINERS, "train a part"), ("evaluate", EVALUATIONS, "measure")):
        group = commands.add_parser(command, help=doc)
        kinds = group.add_subparsers(metavar="WHAT", required=True)
        for name, (module, options, summary) in jobs.items():
            job = kinds.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
            if arguments[:2] == [command, name]:  # its options lie in a module that imports torch
                kind = getattr(import_module(module), options)
                add_options(job, kind)
                job.set_defaults(run=partial(_start, module, kind))
    return run(parser, arguments)


def _start(module: str, kind: type, given: argparse.Namespace) -> None:
    import_module(module).run(parse_options(kind, given))


if __name__ == "__main__":
    sys.exit(main())
