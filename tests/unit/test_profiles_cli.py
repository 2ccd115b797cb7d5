"""``comneck profiles show`` on machines where nothing, something or all of a profile is there."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comneck.cli import main
from shared.errors import UnknownName
from shared.options import add_options
from shared.profiles import CodecSpec, get_profile, profile_names
from shared.profiles.cli import needs, script, served
from shared.weights.catalogue import RECIPES, Artefact, HubSource, ImportSource, PackageSource, PinnedFile, catalogue
from shared.weights.cli import add_weights_command
from shared.weights.store import State, Status, Store
from training.neck import NeckTraining

OURS = ("small", "vit-l-14", "vit-l-14-336")
FILE = PinnedFile("model.safetensors", 2_500_000, "00")


class ScriptedStore:
    """Knows the artefacts that it is given, each in a state; those shipped or imported are not fetched."""

    def __init__(self, states: dict[str, State]) -> None:
        self.states = states

    def status(self, name: str) -> Status:
        if name not in self.states:
            raise UnknownName(f"no artefact named {name!r}")
        state = self.states[name]
        local: Any = None
        if "codec" in name or "neck" in name:
            path = Path("there", name)
            shipped = name.startswith("small-")
            local = PackageSource(path, FILE) if shipped else ImportSource(path, FILE, "checkpoint.pth")
        sources = () if local else (HubSource("someone/some", "0" * 40, (FILE,)),)
        artefact = Artefact(name, "llm", "", "MIT", (FILE.name,), sources, local)
        here = state not in ("missing", "damaged")
        problem = "" if here else f"{name} is {state}: install the package again"
        return Status(artefact, state, Path("there", name) if here else None, FILE.size, "", problem)


def scripted(**states: State) -> Any:
    return ScriptedStore({name.replace("_", "-"): state for name, state in states.items()})


def small(state: State = "installed", **others: State) -> Any:
    """A store with all that the profile `small` needs in one state, but for others."""
    every = dict.fromkeys(get_profile("small").server_artefacts(), state)
    return ScriptedStore(every | {name.replace("_", "-"): one for name, one in others.items()})


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which nothing was fetched or imported yet."""
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path))
    catalogue.cache_clear()
    get_profile.cache_clear()
    yield tmp_path
    catalogue.cache_clear()
    get_profile.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", OURS)
def test_every_artefact_of_our_profiles_is_here_or_has_a_command_that_gets_it(name: str) -> None:
    found = needs(get_profile(name), Store())
    assert [need.name for need in found] == get_profile(name).server_artefacts()
    assert [need.name for need in found if not need.path and not need.command] == []


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", OURS)
def test_what_has_no_catalogue_is_refused_with_the_command_that_makes_it(name: str) -> None:
    for need in needs(get_profile(name), Store()):
        if need.name not in catalogue():
            with pytest.raises(
                UnknownName, match=f"{need.name} is not on this machine: .*, then run `comneck "
            ) as told:
                Store().ensure(need.name)
            assert f"`{need.command}`" in str(told.value)


def test_a_profile_that_is_all_there_is_complete() -> None:
    found = needs(get_profile("small"), small())
    assert script(get_profile("small"), found) == []
    assert served(get_profile("small"), found) == [1, 2, 3, 4]
    assert all(need.path and not need.command for need in found)


def test_all_that_is_fetched_takes_one_command() -> None:
    found = needs(get_profile("small"), small(clip_vit_b_16="missing", smollm2_135m_instruct="missing"))
    assert script(get_profile("small"), found) == ["comneck weights pull clip-vit-b-16 smollm2-135m-instruct"]
    assert {need.name: need.size for need in found}["clip-vit-b-16"] == 2_500_000


def test_what_is_damaged_is_fetched_again_and_what_is_shipped_is_installed_again() -> None:
    found = needs(get_profile("small"), small(clip_vit_b_16="damaged", small_neck_d1="damaged"))
    assert script(get_profile("small"), found) == [
        "# small-neck-d1 is damaged: install the package again",
        "comneck weights pull --force clip-vit-b-16",
    ]


def test_one_checkpoint_makes_codec_and_neck() -> None:
    lines = script(get_profile("vit-l-14"), needs(get_profile("vit-l-14"), scripted()))
    assert lines.count("comneck weights import d1_2.pth.tar") == 1
    assert lines.count("# download d1_2.pth.tar from the ComNeck authors' release") == 1


def test_a_server_starts_with_any_one_quality() -> None:
    profile = get_profile("vit-l-14")
    missing = needs(profile, scripted())
    assert served(profile, missing) == []
    assert {f"comneck weights import d1_{quality}.pth.tar" for quality in (1, 2, 3, 4)} <= {n.command for n in missing}
    assert [line for line in script(profile, missing) if "d1_" in line][1:] == ["comneck weights import d1_2.pth.tar"]
    third = needs(profile, scripted(comneck_codec_d1_3="imported", comneck_neck_d1_3="imported"))
    assert served(profile, third) == [3]
    assert not any("d1_" in line for line in script(profile, third))


def test_an_import_whose_file_has_gone_is_made_again() -> None:
    store = scripted(comneck_codec_d1_2="missing", comneck_neck_d1_2="imported")
    codec = {need.name: need for need in needs(get_profile("vit-l-14"), store)}["comneck-codec-d1-2"]
    assert codec.command == "comneck weights import d1_2.pth.tar"
    own = replace(get_profile("small"), codec=CodecSpec("elic-chandelier", "my-codec", (3,)))
    assert needs(own, small(my_codec="damaged"))[0].command == "comneck weights import checkpoint.pth --name my-codec"


def test_the_commands_that_make_artefacts_are_commands_of_ours() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    commands = parser.add_subparsers()
    add_weights_command(commands)
    add_options(commands.add_parser("train").add_subparsers().add_parser("neck"), NeckTraining)
    for recipe in RECIPES.values():
        program, *arguments = shlex.split(recipe.command.replace("$(", "'").replace(")", "'"))
        assert program == "comneck"
        parser.parse_args(arguments)


def test_codecs_are_for_both_sides_and_the_rest_for_the_server() -> None:
    found = needs(get_profile("vit-l-14-336"), scripted())
    assert {need.uses for need in found if need.client} == {("codec",)}
    assert {need.uses for need in found if not need.client} == {("neck",), ("clip",), ("llava",)}


@pytest.mark.usefixtures("fresh")
def test_all_profiles_are_shown_one_below_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show"]) == 0
    shown = capsys.readouterr().out
    blocks = shown.split("\n\n")
    assert [block.split(":")[0] for block in blocks] == profile_names()
    lines = [line.strip() for line in blocks[0].splitlines()]
    assert lines[0] == "small: 256x256, OpenAI CLIP ViT-B/16, SmolLM2-135M-Instruct"
    assert lines[4].split() == ["NAME", "FOR", "ON", "STATE", "SIZE", "GET", "IT", "WITH"]
    assert lines[5].split() == ["small-codec", "codec", "client,", "server", "shipped", "18.8", "MB"]
    assert lines[-2:] == [
        "to serve it at quality 3:",
        "comneck weights pull clip-vit-b-16 smollm2-135m-instruct",
    ]


@pytest.mark.usefixtures("fresh")
def test_one_profile_is_shown_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "vit-l-14-336", "--json"]) == 0
    (profile,) = json.loads(capsys.readouterr().out)
    assert (profile["name"], profile["complete"], profile["served"]) == ("vit-l-14-336", False, [])
    assert profile["preparation"] == {"height": 384, "width": 384, "fit": "pad", "resample": "bicubic"}
    clip = next(artefact for artefact in profile["artefacts"] if artefact["name"] == "clip-vit-l-14-336")
    assert (clip["state"], clip["command"]) == ("missing", "comneck weights pull clip-vit-l-14-336")
    assert profile["commands"][-1] == "comneck weights import llava-1.5-7b FOLDER"


def test_a_profile_that_names_what_nobody_knows_is_shown_all_the_same(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "shared" / "profiles" / "small.toml").read_text()
    (fresh / "profiles").mkdir()
    (fresh / "profiles" / "mine.toml").write_text(
        text.replace('name = "small"', 'name = "mine"').replace('"small-codec"', '"my-codec"')
    )
    assert main(["profiles", "show", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "my-codec" in shown
    assert "unknown" in shown
    assert "# no catalogue has my-codec: is the name right?" in shown


def test_an_unknown_profile_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "huge"]) == UnknownName.exit_code
    assert "no profile named 'huge'" in capsys.readouterr().err


def test_latents_of_384_pixels_have_as_many_positions_as_clip_has_patches_at_336() -> None:
    profile = get_profile("vit-l-14-336")
    assert profile.preparation.height // 16 == profile.preparation.width // 16 == profile.clip.grid == 24
