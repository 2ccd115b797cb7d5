"""What the three commands do when something is not as it should be."""

from __future__ import annotations

import argparse

import pytest

from shared.command import Parser, run


def fail(arguments: argparse.Namespace) -> None:
    import a_package_that_no_one_has  # noqa: F401


def test_a_missing_package_is_one_line_with_the_extra_that_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="comneck")
    parser.set_defaults(run=fail)
    assert run(parser, []) == 1
    said = capsys.readouterr().err
    assert "a_package_that_no_one_has" in said
    assert "comneck[train]" in said
    assert len(said.splitlines()) == 1
