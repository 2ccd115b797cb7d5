"""One process, one event loop: the engine and both fronts, from the first model loaded to a graceful stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloud_server.fronts import Answering, address
from cloud_server.grpc_front import GrpcFront
from cloud_server.rest_front import RestFront
from cloud_server.settings import ServerSettings

if TYPE_CHECKING:
    from cloud_server.engine import Engine


@dataclass(frozen=True)
class Addresses:
    """Where a server listens.

    Attributes:
        grpc: HOST:PORT.
        http: URL.
    """

    grpc: str
    http: str


@asynccontextmanager
async def serving(engine: Answering, settings: ServerSettings) -> AsyncIterator[Addresses]:
    """Both fronts over one engine. They listen inside the block; requests in progress may finish when it ends."""
    grpc_front, rest_front = GrpcFront(engine, settings), RestFront(engine, settings)
    try:
        grpc_port, http_port = await grpc_front.start(), await rest_front.start()
        yield Addresses(address(settings.host, grpc_port), f"http://{address(settings.host, http_port)}")
    finally:
        await asyncio.gather(grpc_front.stop(), rest_front.stop())


def serve(settings: ServerSettings, announce: Callable[[Addresses], None]) -> None:
    """Loads the models, then listens, until SIGINT or SIGTERM. A second SIGINT does not wait for requests."""
    from cloud_server.engine import Engine

    asyncio.run(_serve(Engine.load(settings), settings, announce))


async def _serve(engine: Engine, settings: ServerSettings, announce: Callable[[Addresses], None]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    try:
        async with serving(engine, settings) as addresses:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            announce(addresses)
            await stop.wait()
            loop.remove_signal_handler(signal.SIGINT)
    finally:
        await engine.close()
