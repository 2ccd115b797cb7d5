"""What the two fronts share: what they ask of the engine, and how they report a failure that no one foresaw."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Protocol
from uuid import uuid4

from shared.conversation import Answer, Conversation, ServerProfile
from shared.errors import BadInput, ComneckError, ServerFailed

GRACE = 5.0  # seconds that requests in progress have to finish when the server stops

log = logging.getLogger("comneck")


class Answering(Protocol):
    """The engine as the fronts see it (cloud_server/engine.py); without its imports they start and test at once."""

    def server_profile(self) -> ServerProfile: ...

    def stream(self, conversation: Conversation) -> AsyncGenerator[str | Answer, None]:
        """Pieces of text, then the whole answer. Closing the iterator stops the generation."""
        ...

    async def answer(self, conversation: Conversation) -> Answer: ...


@contextmanager
def foreseen() -> Iterator[None]:
    """Lets only ComneckError out: another error becomes ServerFailed with an id, and the log has its traceback."""
    try:
        yield
    except ComneckError:
        raise
    except Exception as problem:
        request = uuid4().hex[:8]
        log.exception("request %s failed", request)
        raise ServerFailed(f"the server failed on request {request}; its log says why") from problem


def address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listener(host: str, port: int, flag: str) -> socket.socket:
    """A socket that listens there.

    Raises:
        BadInput: the port is taken, or the address is not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as problem:
        raise BadInput(
            f"cannot listen on {address(host, port)}: {problem.strerror}; choose another with --host or {flag}"
        ) from problem
