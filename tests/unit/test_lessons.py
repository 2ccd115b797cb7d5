"""How connectors are taught: exchanges of a photo do not see each other, and what is taught is what is asked later."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llm import tiny_llm
from torch import Tensor

from cloud_server.backends import Question
from cloud_server.backends.honeybee import Honeybee
from cloud_server.backends.shikra import parse_box
from cloud_server.pipeline import in_photo
from cloud_server.vision.clip import ClipTower
from shared.conversation import Task
from shared.errors import BadInput
from shared.images import Preparation
from shared.profiles import ClipSpec
from training.features import TeacherFeatures
from training.lessons import LESSONS, Lesson, PrefixLesson, Setting
from training.photos import Entry, Thing, in_pixels
from training.samples import Sample

SPEC = ClipSpec(weights="none", patch=16, width=32, layers=3, heads=2, projection=24, image=64)
SIZES = {
    "llama-adapter": {"width": 16, "heads": 2, "blocks": 1, "length": 3, "adapted_layers": 1},
    "honeybee": {"queries": 4, "hidden": 16, "depth": 1, "rank": 2},
    "shikra": {"join": 2, "rank": 2},
}
THINGS = (
    Thing(("the dog",), (0.3, 0.1, 0.7, 0.9), True),
    Thing(("the edge",), (0.0, 0.0, 0.1, 1.0), True),  # which a crop of a wide photo leaves out
)


@pytest.fixture
def setting() -> Setting:
    torch.manual_seed(0)
    tower = ClipTower(SPEC).eval().requires_grad_(False)
    stored = [np.random.default_rng(i).normal(size=(6, 17, 32)).astype(np.float16) for i in range(3)]
    entries = [Entry(Path(str(i)), captions=("A dog .",), things=THINGS, size=(320, 240)) for i in range(6)]
    return Setting(tower, TeacherFeatures(*stored), tiny_llm(), entries, Preparation(64, 64), "chatml", 60)


def lesson_of(name: str, setting: Setting) -> Lesson:
    return LESSONS[name](setting, SIZES[name])


def sample(photo: int, number: int, task: Task = "text") -> Sample:
    return Sample(photo, f"what is number {number}?", f"a thing {number}", task, THINGS[0])


@pytest.mark.parametrize("name", LESSONS)
def test_a_step_teaches_the_whole_connector_and_leaves_the_language_model(name: str, setting: Setting) -> None:
    lesson = lesson_of(name, setting)
    groups = lesson.parameter_groups(1e-2)
    taught = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in taught} == {id(parameter) for parameter in lesson.connector.parameters()}
    frozen = [parameter.clone() for parameter in setting.llm.model.parameters()]
    optimizer = torch.optim.AdamW(groups)
    task: Task = "box" if name == "shikra" else "text"
    photos = [0, 3, 5]
    before = None
    for _ in range(12):
        values = lesson.losses(lesson.read(photos), [[sample(photo, i, task) for i in range(2)] for photo in photos])
        before = before or values["loss"].item()
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in taught)
    assert values["loss"].item() < 0.9 * before
    assert all(map(torch.equal, frozen, setting.llm.model.parameters()))


@pytest.mark.parametrize("name", ["honeybee", "shikra"])
def test_exchanges_about_one_photo_are_as_if_each_were_alone(name: str, setting: Setting) -> None:
    lesson = lesson_of(name, setting)
    assert isinstance(lesson, PrefixLesson)
    torch.nn.init.normal_(lesson.connector.low_rank.up[0], std=0.3)
    task: Task = "box" if name == "shikra" else "text"
    features = lesson.read([0, 1])
    groups = [[sample(0, 1, task), sample(0, 22, task)], [sample(1, 333, task), sample(1, 4, task)]]
    tokens = [[len(lesson.answer(one)) for one in group] for group in groups]
    together = lesson.losses(features, groups)["loss"].item()
    alone = sum(
        lesson.losses(features[i : i + 1], [[one]])["loss"].item() * tokens[i][k]
        for i, group in enumerate(groups)
        for k, one in enumerate(group)
    )
    assert together == pytest.approx(alone / sum(map(sum, tokens)), abs=1e-4)


def test_honeybee_is_taught_on_the_prompt_that_it_answers_to(setting: Setting) -> None:
    lesson = lesson_of("honeybee", setting)
    assert isinstance(lesson, PrefixLesson)
    backend = Honeybee(lesson.connector.eval(), setting.llm, {}, "texts")
    photo = lesson.read([2])[0]
    one = sample(2, 7)
    with torch.no_grad():
        visual = lesson.connector(photo[None])[0]
        embeddings = lesson._row(visual, [one])[0]
    asked = backend._prompt(Question((photo, one.prompt)), visual)
    torch.testing.assert_close(embeddings[: len(asked)], asked)
    assert len(embeddings) == len(asked) + len(lesson.answer(one)) - 1


def test_shikra_is_taught_where_things_are_in_the_users_photo(setting: Setting) -> None:
    lesson = lesson_of("shikra", setting)
    one = sample(0, 1, "box")
    text = setting.llm.tokenizer.decode(lesson.answer(one))
    assert re.fullmatch(r"Answer: \[(0\.\d\d0,){3}0\.\d\d0\] \.", text)
    box = parse_box(text)
    assert box
    found, wanted = in_photo(box, (320, 240), setting.preparation), in_pixels(THINGS[0].box, (320, 240))
    for ours, true in zip(vars(found).values(), vars(wanted).values(), strict=True):
        assert ours == pytest.approx(true, abs=0.005 * 320)


def test_things_that_the_preparation_leaves_out_are_not_taught(setting: Setting) -> None:
    assert lesson_of("shikra", setting).entries()[0].things == THINGS[:1]
    padded = replace(setting, preparation=Preparation(64, 64, "pad"))
    assert lesson_of("shikra", padded).entries()[0].things == THINGS


def test_a_size_that_a_lesson_does_not_know_is_refused(setting: Setting) -> None:
    with pytest.raises(BadInput, match="no size named ranks; there are join, rank"):
        LESSONS["shikra"](setting, {"ranks": 3})


def test_visual_tokens_start_as_different_as_words(setting: Setting) -> None:
    for name in ("honeybee", "shikra"):
        lesson = lesson_of(name, setting)
        with torch.no_grad():
            visual: Tensor = lesson.connector(lesson.read(range(6)))
        words = setting.llm.model.get_input_embeddings().weight
        size = visual.flatten(0, 1).std(0).norm() / words.std(0).norm()
        assert 0.5 < float(size) < 2
