"""Profiles are files: ours, a user's, other packages'."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import profiles
from shared.errors import BadInput, UnknownName
from shared.profiles import get_profile, profile_names
from shared.weights.catalogue import catalogue


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    get_profile.cache_clear()
    return tmp_path


def test_the_small_profile_is_the_default_and_all_it_needs_is_catalogued() -> None:
    assert profile_names()[0] == profiles.DEFAULT_PROFILE == "small"
    small = get_profile("small")
    assert set(small.server_artefacts()) <= set(catalogue())
    assert set(small.client_artefacts()) < set(small.server_artefacts())


def test_weights_with_a_placeholder_are_an_artefact_for_each_quality() -> None:
    paper, small = get_profile("vit-l-14"), get_profile("small")
    assert paper.codec_weights(2) == "comneck-codec-d1-2"
    assert paper.neck_weights(4) == "comneck-neck-d1-4"
    assert paper.client_artefacts() == [f"comneck-codec-d1-{quality}" for quality in (1, 2, 3, 4)]
    assert {f"comneck-neck-d1-{quality}" for quality in (1, 2, 3, 4)} < set(paper.server_artefacts())
    assert {small.codec_weights(quality) for quality in small.codec.qualities} == {"small-codec"}
    assert small.client_artefacts() == ["small-codec"]


@pytest.mark.parametrize("quality", [0, 5])
def test_a_quality_that_a_profile_has_not_is_refused_with_those_it_has(quality: int) -> None:
    for weights in (get_profile("small").codec_weights, get_profile("small").neck_weights):
        with pytest.raises(BadInput, match=f"profile 'small' has no quality {quality}; it has 1, 2, 3, 4"):
            weights(quality)


@pytest.mark.parametrize("name", ["small", "vit-l-14"])
def test_the_latents_have_as_many_positions_as_clip_has_patches(name: str) -> None:
    profile = get_profile(name)
    assert profile.preparation.height // 16 == profile.preparation.width // 16 == profile.clip.grid


def test_a_users_profile_is_found_in_their_folder(home: Path) -> None:
    text = (Path(profiles.__file__).parent / "small.toml").read_text().replace('name = "small"', 'name = "mine"')
    (home / "profiles" / "mine.toml").write_text(text)
    assert "mine" in profile_names()
    assert get_profile("mine").name == "mine"


def test_an_unknown_profile_is_answered_with_those_there_are(home: Path) -> None:
    with pytest.raises(UnknownName, match="small, vit-l-14"):
        get_profile("huge")


@pytest.mark.parametrize(
    ("line", "change", "complaint"),
    [
        ("qualities = [1, 2, 3, 4]", "qualities = []", "codec.qualities are"),
        ("qualities = [1, 2, 3, 4]", "qualities = [3, 1]", "codec.qualities are"),
        ("qualities = [1, 2, 3, 4]", "qualities = [3, 16]", "numbers from 1 to 15, ascending"),
        ("qualities = [1, 2, 3, 4]", 'qualities = "3"', "codec.qualities are"),
        ("qualities = [1, 2, 3, 4]", "qualities = 3", "TypeError"),
        ("qualities = [1, 2, 3, 4]", "", "'qualities'"),
        ("quality = 3", "quality = 5", "quality is 5, which is none of"),
        ('scenario = "d1"', 'scenario = "d4"', "scenario is 'd4', which is none of d1, d2, d3"),
    ],
)
def test_a_profile_whose_qualities_make_no_sense_is_named(home: Path, line: str, change: str, complaint: str) -> None:
    text = (Path(profiles.__file__).parent / "small.toml").read_text()
    assert line in text
    (home / "profiles" / "broken.toml").write_text(text.replace(line, change))
    with pytest.raises(BadInput, match=rf"broken\.toml cannot be read: .*{complaint}"):
        get_profile("broken")


def test_a_profile_that_makes_no_sense_is_named(home: Path) -> None:
    (home / "profiles" / "broken.toml").write_text('name = "broken"')
    with pytest.raises(BadInput, match=r"broken\.toml.*preparation"):
        get_profile("broken")
