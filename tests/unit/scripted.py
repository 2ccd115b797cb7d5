"""A server of the product with a scripted engine instead of models, on real sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cloud_server.server import serving
from cloud_server.settings import ServerSettings
from shared.conversation import Answer, Conversation, ServerProfile, Timings

CODEC_DIGEST = "349eaab3"
SETTINGS = ServerSettings(grpc_port=0, http_port=0, max_request_bytes=4096, max_images=2)


@dataclass
class ScriptedEngine:
    """Says what the test wrote and remembers what it was asked.

    Attributes:
        pieces: the answer, said piece by piece.
        pause: seconds before each piece.
        failure: raised before piece number ``fails_at``.
        asked: what the fronts passed on.
        ended: set when an answer ends, however it ends.
    """

    pieces: tuple[str, ...] = ("a dog", " runs")
    pause: float = 0.0
    failure: Exception | None = None
    fails_at: int = 0
    asked: list[Conversation] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def server_profile(self) -> ServerProfile:
        return ServerProfile(
            profile="small",
            codec_digest=CODEC_DIGEST,
            scenario="d1",
            rate=2,
            backends=("llama-adapter", "other"),
            max_request_bytes=SETTINGS.max_request_bytes,
            max_images=SETTINGS.max_images,
            max_tokens=SETTINGS.max_tokens,
            version="0.1.0",
        )

    async def stream(self, conversation: Conversation) -> AsyncGenerator[str | Answer, None]:
        self.asked.append(conversation)
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
                backend=conversation.backend or "llama-adapter",
                profile="small",
                timings=Timings(queue=1, decode=2, vision=3, generation=4),
                digests={"codec": "c0dec", "llm": "11a"},
            )
        finally:
            self.ended.set()

    async def answer(self, conversation: Conversation) -> Answer:
        async for event in self.stream(conversation):
            if isinstance(event, Answer):
                return event
        raise AssertionError


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
