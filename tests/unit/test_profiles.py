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


@pytest.mark.parametrize("name", ["small", "vit-l-14"])
def test_the_latents_have_as_many_positions_as_clip_has_patches(name: str) -> None:
    profile = get_profile(name)
    assert profile.preparation.height // 16 == profile.preparation.width // 16 == profile.clip.grid


def test_a_users_profile_is_found_in_their_folder(home: Path) -> None:
    text = (Path(profiles.__file__).parent / "small.toml").read_text().replace('name = "small"', 'name = "mine"')
    (home / "profiles" / "mine.toml").write_text(text)
    assert "mine" in profile_names()
    assert get_profile("mine").name == "mine"


def test_an_unknown_profile_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnknownName, match="small, vit-l-14"):
        get_profile("huge")


def test_a_profile_that_makes_no_sense_is_named(home: Path) -> None:
    (home / "profiles" / "broken.toml").write_text('name = "broken"')
    with pytest.raises(BadInput, match=r"broken\.toml.*description"):
        get_profile("broken")
