"""A server of the product with a scripted engine instead of models, on real sockets; an encoder without a codec."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cloud_server.server import serving
from cloud_server.settings import ServerSettings
from shared.bitstream import Bitstream
from shared.conversation import Answer, Box, Conversation, ServerProfile, Timings
from shared.images import Photo, Preparation, load_photo, prepare

CODEC_DIGEST = "349eaab3"
SETTINGS = ServerSettings(grpc_port=0, http_port=0, max_request_bytes=4096, max_images=4)


@dataclass
class ScriptedEngine:
    """Says what the test wrote and remembers what it was asked.

    Attributes:
        pieces: the answer, said piece by piece.
        pause: seconds before each piece.
        failure: raised before piece number ``fails_at``.
        asked: what the fronts passed on.
        ended: set when an answer ends, however it ends.
        box: that every answer holds.
    """

    pieces: tuple[str, ...] = ("a dog", " runs")
    pause: float = 0.0
    failure: Exception | None = None
    fails_at: int = 0
    asked: list[Conversation] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    box: Box | None = field(default_factory=lambda: Box(1, 2, 3, 4))

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def server_profile(self) -> ServerProfile:
        return ServerProfile(
            profile="small",
            qualities={1: CODEC_DIGEST, 2: CODEC_DIGEST},
            scenario="d1",
            quality=2,
            backends={"llama-adapter": ("text",), "other": ("box", "choice", "text"), "few": ("label",)},
            max_request_bytes=SETTINGS.max_request_bytes,
            max_images=SETTINGS.max_images,
            max_tokens=SETTINGS.max_tokens,
            version="0.1.0",
        )

    async def stream(self, conversation: Conversation) -> AsyncGenerator[str | Answer, None]:
        self.asked.append(conversation)
        backend, task = self.server_profile().backend_for(conversation.backend, conversation.task, conversation.choices)
        self.ended.clear()
        try:
            for number, piece in enumerate(self.pieces):
                if self.failure and number == self.fails_at:
                    raise self.failure
                await asyncio.sleep(self.pause)
                yield piece
            yield Answer(
                text="".join(self.pieces),
                finish="stop",
                tokens=len(self.pieces),
                backend=backend,
                profile="small",
                timings=Timings(queue=1, decode=2, vision=3, generation=4),
                digests={"codec": "c0dec", "llm": "11a"},
                task=task,
                choice=1 if task == "choice" else None,
                box=self.box,
            )
        finally:
            self.ended.set()

    async def answer(self, conversation: Conversation) -> Answer:
        async for event in self.stream(conversation):
            if isinstance(event, Answer):
                return event
        raise AssertionError


class ScriptedEncoder:
    """Prepares as the profile says; encodes everything to the same bitstream, and remembers at which quality."""

    def __init__(self, bitstream: Bitstream) -> None:
        self.bitstream = bitstream
        self.asked: list[tuple[int | None, int | None]] = []

    def load(self, quality: int | None, max_bytes: int | None) -> None:
        pass

    def prepare(self, source: str | Path | bytes | Photo, backend: str = "") -> Photo:
        if not isinstance(source, Photo):
            source = load_photo(Path(source) if isinstance(source, str) else source)
        return prepare(source, Preparation())

    def encode(self, source: Photo, quality: int | None = None, max_bytes: int | None = None) -> Bitstream:
        self.asked.append((quality, max_bytes))
        return self.bitstream


@dataclass(frozen=True)
class RunningServer:
    engine: ScriptedEngine
    grpc: str
    http: str


@contextmanager
def running(engine: ScriptedEngine, settings: ServerSettings = SETTINGS) -> Iterator[RunningServer]:
    """A server on a loop and thread of its own, so that synchronous clients can be tested against it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    context = serving(engine, settings)
    try:
        addresses = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
        yield RunningServer(engine, addresses.grpc, addresses.http)
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
