"""Runs of ``comneck evaluate answers`` resume from their own answers and from no others."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from evaluation.answers import Row, read_rows


def test_answers_of_another_run_and_a_line_cut_short_are_left_out(tmp_path: Path) -> None:
    ours = Row("ours", "captions", "a.png", 0, "what?", "A dog.", "A cat.", 1000, 0.12)
    theirs = replace(ours, run="theirs", file="b.png")
    cut = json.dumps(asdict(replace(ours, number=1)))[:-9]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join([json.dumps(asdict(ours)), json.dumps(asdict(theirs)), cut]))
    assert read_rows(path, "ours") == {("a.png", 0): ours}
    assert set(read_rows(path)) == {("a.png", 0), ("b.png", 0)}
