"""The one path from a conversation to an answer, which every front shares.

    bitstreams -> entropy-decode -> y_hat -> transform-neck -> CLIP from block 2 -> backend -> text

Models run on a thread of their own, one request at a time, so that the event loop never waits for them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from shared.conversation import Answer, Conversation, ServerProfile
from shared.errors import BadInput, ProfileMismatch
from shared.profiles import get_profile

if TYPE_CHECKING:
    from cloud_server.pipeline import Pipeline
    from cloud_server.settings import ServerSettings

log = logging.getLogger(__name__)
Event = str | Answer | BaseException


class Engine:
    """Answers conversations with the models of one profile."""

    def __init__(self, pipeline: Pipeline, settings: ServerSettings) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._profile = _server_profile(pipeline, settings)

    @classmethod
    def load(cls, settings: ServerSettings) -> Engine:
        """Loads every model of the profile, fetching what is missing.

        Raises:
            UnknownName: no such profile.
            WeightsUnavailable: an artefact could not be had.
        """
        get_profile(settings.profile)  # a wrong name is told before seconds of imports
        from cloud_server.pipeline import Pipeline

        return cls(
            Pipeline.load(settings.profile, settings.device, settings.threads, settings.cache_photos, settings.dtype),
            settings,
        )

    def server_profile(self) -> ServerProfile:
        """What a client must know to encode for this server."""
        return self._profile

    async def answer(self, conversation: Conversation) -> Answer:
        """The whole answer."""
        async for event in self.stream(conversation):
            if isinstance(event, Answer):
                return event
        raise AssertionError("a stream ends with its answer")

    async def stream(self, conversation: Conversation) -> AsyncGenerator[str | Answer]:
        """Pieces of text as they are written, then the answer. Closing the iterator stops the writing.

        Raises:
            ComneckError: whatever is wrong with the conversation, before the first piece.
        """
        conversation = self._check(conversation)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        stopped = threading.Event()

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is gone: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        asked = time.perf_counter()
        self._thread.submit(self._work, conversation, asked, emit, stopped)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            stopped.set()

    async def close(self) -> None:
        """Waits for the request in hand; none is taken any more."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _check(self, conversation: Conversation) -> Conversation:
        """The conversation with its backend and task settled."""
        settings, images = self._settings, len(conversation.images)
        name, task = self._profile.backend_for(conversation.backend, conversation.task, conversation.choices)
        backend = self._pipeline.backends[name]
        limit = min(settings.max_images, backend.max_images)
        if images > limit:
            raise BadInput(f"{images} photos in one conversation; backend {name!r} takes at most {limit} here")
        if task in ("choice", "box") and images != 1:
            raise BadInput(f"{images} photos; an answer that is a {task} is about one")
        if task == "choice" and len(set(conversation.choices)) < max(2, len(conversation.choices)):
            raise BadInput("there must be two or more choices, each another")
        if task != "choice" and conversation.choices:
            raise BadInput(f"there are choices, but the answer is to be a {task}: say task choice")
        if any(not choice.strip() for choice in conversation.choices):
            raise BadInput("a choice is empty")
        conversation = replace(conversation, backend=name, task=task)
        backend.check(conversation)
        generation = conversation.generation
        if not 1 <= generation.max_tokens <= settings.max_tokens:
            raise BadInput(f"max_tokens {generation.max_tokens} is outside 1 to {settings.max_tokens}")
        if not 0 <= generation.temperature <= 2:
            raise BadInput(f"temperature {generation.temperature} is outside 0 to 2")
        if not 0 < generation.top_p <= 1:
            raise BadInput(f"top_p {generation.top_p} is outside 0 (excluded) to 1")
        size = self._pipeline.profile.preparation
        for image in conversation.images:
            digest = image.codec_digest.hex()
            same_size = (image.height, image.width) == (size.height, size.width)
            if self._profile.qualities.get(image.quality) != digest or not same_size:
                raise ProfileMismatch(
                    f"a photo was encoded at {image.width}x{image.height}, quality {image.quality} by codec {digest}; "
                    f"this server runs profile {self._profile.profile!r}, which is {size.width}x{size.height}, "
                    f"{self._profile.offer}: encode with that profile"
                )
        return conversation

    def _work(
        self, conversation: Conversation, asked: float, emit: Callable[[Event], None], stopped: threading.Event
    ) -> None:
        try:
            if stopped.is_set():
                return
            queue = 1000 * (time.perf_counter() - asked)
            for event in self._pipeline.answer(conversation, queue):
                emit(event)
                if stopped.is_set():
                    return
        except BaseException as problem:
            emit(problem)


def _server_profile(pipeline: Pipeline, settings: ServerSettings) -> ServerProfile:
    profile, served = pipeline.profile, pipeline.entrances
    return ServerProfile(
        profile=profile.name,
        qualities={quality: entrance.codec.digest_bytes.hex() for quality, entrance in served.items()},
        scenario=profile.scenario,
        quality=min(served, key=lambda quality: abs(quality - profile.quality)),  # its own, unless that is left out
        backends={name: backend.tasks for name, backend in pipeline.backends.items()},
        max_request_bytes=settings.max_request_bytes,
        max_images=settings.max_images,
        max_tokens=settings.max_tokens,
        version=version("comneck"),
    )
