"""What the engine tells clients, what it refuses, and that it never holds up the event loop. No model takes part."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import CODEC_DIGEST, SETTINGS

from cloud_server.backends import Backend
from cloud_server.engine import Engine
from shared.bitstream import Bitstream
from shared.conversation import Answer, Conversation, Task, Timings
from shared.errors import BadInput, ProfileMismatch
from shared.profiles import get_profile


class ScriptedBackend(Backend):
    """Takes whatever the engine lets through."""

    def __init__(self, max_images: int, tasks: tuple[Task, ...]) -> None:
        self.max_images, self.tasks = max_images, tasks  # type: ignore[misc]

    load = write = None


class ScriptedPipeline:
    """The profile `small` with a codec for each of the qualities given."""

    def __init__(self, digests: dict[int, str]) -> None:
        self.profile = get_profile("small")
        self.backends = {"llama-adapter": ScriptedBackend(2, ("text",)), "other": ScriptedBackend(1, ("box", "choice"))}
        self.entrances = {
            quality: SimpleNamespace(codec=SimpleNamespace(digest_bytes=bytes.fromhex(digest)))
            for quality, digest in digests.items()
        }
        self.pause = 0.0

    def backend(self, name: str) -> Any:
        return self.backends[name or "llama-adapter"]

    def answer(self, conversation: Conversation, queue_ms: float) -> Iterator[str | Answer]:
        time.sleep(self.pause)
        yield "a dog"
        yield Answer("a dog", "stop", 1, "llama-adapter", "small", Timings(), {})


@pytest.fixture
def pipeline() -> ScriptedPipeline:
    return ScriptedPipeline({1: CODEC_DIGEST, 2: CODEC_DIGEST, 4: "00c0ffee"})


@pytest.fixture
def engine(pipeline: ScriptedPipeline) -> Engine:
    return Engine(pipeline, SETTINGS)  # type: ignore[arg-type]


async def test_it_tells_the_codec_of_every_quality(engine: Engine) -> None:
    profile = engine.server_profile()
    assert profile.qualities == {1: CODEC_DIGEST, 2: CODEC_DIGEST, 4: "00c0ffee"}
    assert profile.offer == f"quality 1, 2 by codec {CODEC_DIGEST}; quality 4 by codec 00c0ffee"
    assert (profile.profile, profile.backends) == (
        "small",
        {"llama-adapter": ("text",), "other": ("box", "choice")},
    )


@pytest.mark.parametrize(("served", "quality"), [((1, 2, 3, 4), 3), ((1, 2), 2), ((4,), 4), ((1, 4), 4)])
def test_its_quality_is_the_profiles_or_the_nearest_that_is_served(served: tuple[int, ...], quality: int) -> None:
    engine = Engine(ScriptedPipeline(dict.fromkeys(served, CODEC_DIGEST)), SETTINGS)  # type: ignore[arg-type]
    assert engine.server_profile().quality == quality


async def test_every_quality_that_is_served_is_answered(engine: Engine, bitstream: Bitstream) -> None:
    best = replace(bitstream, quality=4, codec_digest=bytes.fromhex("00c0ffee"))
    for images in ((bitstream,), (replace(bitstream, quality=1),), (best,), (best, bitstream)):
        assert (await engine.answer(Conversation((*images, "what?")))).text == "a dog"


@pytest.mark.parametrize(
    "change",
    [
        {"codec_digest": bytes(4)},
        {"codec_digest": bytes.fromhex("00c0ffee")},  # of another quality
        {"quality": 3},  # not served
        {"quality": 4},  # by another codec
        {"height": 512},
        {"width": 64},
    ],
)
async def test_what_no_codec_here_has_written_is_refused_with_what_is_served(
    engine: Engine, bitstream: Bitstream, change: dict[str, Any]
) -> None:
    with pytest.raises(
        ProfileMismatch,
        match=rf"runs profile 'small', which is 256x256, quality 1, 2 by codec {CODEC_DIGEST}; quality 4",
    ):
        await engine.answer(Conversation((bitstream, replace(bitstream, **change), "what?")))


async def test_more_photos_than_the_backend_takes_are_refused(engine: Engine, bitstream: Bitstream) -> None:
    with pytest.raises(BadInput, match="3 photos in one conversation; backend 'llama-adapter' takes at most 2"):
        await engine.answer(Conversation((bitstream,) * 3 + ("what?",)))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backend": "llama-adapter", "task": "box"}, "answers with text, not with box: ask other"),
        ({"task": "label"}, "no backend here answers with label"),
        ({"backend": "other", "task": "text"}, "answers with box or choice, not with text: ask llama-adapter"),
        ({"backend": "other", "task": "choice"}, "two or more choices"),
        ({"backend": "other", "task": "choice", "choices": ("cat",)}, "two or more choices"),
        ({"backend": "other", "task": "choice", "choices": ("cat", "cat")}, "each another"),
        ({"backend": "other", "task": "choice", "choices": ("cat", " ")}, "a choice is empty"),
        ({"task": "box", "choices": ("cat", "dog")}, "the answer is to be a box: say task choice"),
        ({"parts": ("where?",), "backend": "other"}, "0 photos; an answer that is a box is about one"),
        ({"parts": (" ",)}, "the prompt is empty"),
    ],
)
async def test_questions_that_make_no_sense_are_refused(
    engine: Engine, bitstream: Bitstream, fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        await engine.answer(replace(Conversation((bitstream, "what?")), **fields))


async def test_the_loop_runs_on_while_a_model_works(
    engine: Engine, pipeline: ScriptedPipeline, bitstream: Bitstream
) -> None:
    pipeline.pause = 0.3
    answering = asyncio.ensure_future(engine.answer(Conversation((bitstream, "what?"))))
    longest, before = 0.0, time.monotonic()
    while not answering.done():
        await asyncio.sleep(0.005)
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    assert (await answering).text == "a dog"
    assert longest < 0.2
