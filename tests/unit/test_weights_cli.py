"""``comneck weights`` from the command line."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared import profiles
from shared.errors import UnknownName, WeightsUnavailable
from shared.weights import store as module
from shared.weights.catalogue import read_catalogue
from shared.weights.cli import add_weights_command

CATALOGUE = """
[[artefact]]
name = "tiny-codec"
kind = "codec"
summary = "A tiny codec"
licence = "MIT"
installs = ["codec.bin"]

[[artefact.source]]
kind = "package"
files = [{ name = "codec.bin", size = 3, sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" }]

[[artefact]]
name = "tiny-llm"
kind = "llm"
summary = "A tiny model"
licence = "Apache-2.0"
installs = ["model.bin"]

[[artefact.source]]
kind = "hub"
repo = "someone/tiny"
revision = "0000000000000000000000000000000000000000"
files = [{ name = "model.bin", size = 2500000, sha256 = "00" }]
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch) -> Path:
    """A machine on which the codec is shipped and the hub is out of reach."""
    (tmp_path / "catalogue.toml").write_text(CATALOGUE)
    (tmp_path / "codec.bin").write_bytes(b"abc")
    artefacts = {artefact.name: artefact for artefact in read_catalogue(tmp_path / "catalogue.toml")}
    monkeypatch.setattr(module, "catalogue", lambda: artefacts)
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


def weights(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_weights_command(parser.add_subparsers())
    args = parser.parse_args(["weights", *arguments])
    args.run(args)


def test_list_tells_what_is_here_and_where_the_rest_comes_from(capsys):
    weights("list")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["NAME", "KIND", "SIZE", "LICENCE", "STATE", "FROM"]
    assert lines[1] == ["tiny-codec", "codec", "0.0", "MB", "MIT", "shipped", "package", "codec.bin"]
    assert lines[2] == ["tiny-llm", "llm", "2.5", "MB", "Apache-2.0", "missing", "hub", "someone/tiny"]


def test_list_speaks_json(capsys, machine: Path):
    weights("list", "--json")
    codec, llm = json.loads(capsys.readouterr().out)
    assert codec["path"] == str(machine / "codec.bin")
    assert (llm["name"], llm["state"], llm["size"], llm["path"]) == ("tiny-llm", "missing", 2_500_000, None)


def test_path_prints_the_path_alone(capsys, machine: Path):
    weights("path", "tiny-codec")
    assert capsys.readouterr().out == f"{machine / 'codec.bin'}\n"


def test_pull_says_which_source_failed_and_raises(capsys):
    with pytest.raises(WeightsUnavailable, match="tiny-llm cannot be had from any source"):
        weights("pull", "tiny-llm")
    assert "tiny-llm: hub someone/tiny failed" in capsys.readouterr().err


def test_a_misspelt_name_is_found_before_anything_is_fetched(capsys):
    with pytest.raises(UnknownName, match="'tiny-lm'; there are: tiny-codec, tiny-llm"):
        weights("pull", "tiny-llm", "tiny-lm")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("profile", [("--profile", "paper"), ()], ids=["named", "default"])
def test_pull_of_a_profile_gets_what_can_be_had_and_says_how_the_rest_is_brought(capsys, monkeypatch, profile):
    needed = ["comneck-codec-d1-2", "tiny-codec", "llama-7b"]
    monkeypatch.setattr(profiles, "get_profile", lambda name: SimpleNamespace(server_artefacts=lambda: needed))
    with pytest.raises(
        WeightsUnavailable, match=r"2 of 3 .* are for you to bring: comneck-codec-d1-2, llama-7b; `comneck"
    ):
        weights("pull", *profile)
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[0] == "tiny-codec"
    assert "then run `comneck weights import d1_2.pth.tar`" in said.err
    assert "then run `comneck weights import llama-7b FOLDER`" in said.err


def test_verify_looks_at_all_that_is_here(capsys):
    weights("verify")
    assert capsys.readouterr().out == "tiny-codec is as it was installed\n"


def test_verify_fails_for_what_is_damaged_or_asked_for_and_missing(capsys, machine: Path):
    (machine / "codec.bin").write_bytes(b"abd")
    with pytest.raises(WeightsUnavailable, match="2 of 2 are not in order: tiny-llm, tiny-codec"):
        weights("verify", "tiny-llm", "tiny-codec", "--json")
    llm, codec = json.loads(capsys.readouterr().out)
    assert [llm["ok"], codec["ok"]] == [False, False]
    assert "is not installed" in llm["problem"]
    assert "has changed" in codec["problem"]


def test_listing_imports_nothing_heavy():
    script = (
        "import sys; from shared.weights.__main__ import main; sys.argv[1:] = ['list']; main(); "
        "print([name for name in ('torch', 'transformers', 'onnx', 'httpx', 'numpy') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.stdout.splitlines()[-1] == "[]", ran.stderr
    assert "clip-vit-b-16" in ran.stdout


def test_a_failure_is_one_line_and_its_exit_code(machine: Path):
    ran = subprocess.run(
        [sys.executable, "-m", "shared.weights", "path", "nothing"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert ran.returncode == UnknownName.exit_code
    assert ran.stderr.startswith("comneck: no artefact named 'nothing'")
    assert ran.stderr.count("\n") == 1
