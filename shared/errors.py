"""Everything that can go wrong and whose fault it is, in one place.

Each class fixes, once, how its kind of failure looks from outside: the exit code of a command, the gRPC status and the
HTTP status. A message names the thing, its value, the limit and the next step, in one line.
"""

from __future__ import annotations

from typing import ClassVar


class ComneckError(Exception):
    """Base of all errors that comneck raises on purpose."""

    exit_code: ClassVar[int] = 1
    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    title: ClassVar[str] = "internal error"

    @classmethod
    def slug(cls) -> str:
        """The name by which machines know this error, over gRPC and REST: ``unreadable-image``."""
        return "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("-")


class BadInput(ComneckError):
    """An argument, a request or a file that makes no sense as given."""

    exit_code = 2
    grpc_status = "INVALID_ARGUMENT"
    http_status = 400
    title = "bad input"


class UnreadableImage(BadInput):
    """A picture that cannot be read, or whose shape cannot be used."""

    exit_code = 3
    http_status = 422
    title = "unreadable image"


class BadBitstream(BadInput):
    """Bytes that are no bitstream of ours, or a damaged one."""

    exit_code = 4
    http_status = 422
    title = "bad bitstream"


class PromptTooLong(BadInput):
    """A conversation that does not fit the language model's context."""

    exit_code = 5
    http_status = 422
    title = "prompt too long"


class TooLarge(ComneckError):
    """A picture or a request over a size limit."""

    exit_code = 6
    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 413
    title = "too large"


class UnknownName(ComneckError):
    """A profile, codec, backend or artefact that is not in its registry."""

    exit_code = 7
    grpc_status = "NOT_FOUND"
    http_status = 404
    title = "unknown name"


class ProfileMismatch(ComneckError):
    """Client and server disagree on the profile or on the codec's weights."""

    exit_code = 8
    grpc_status = "FAILED_PRECONDITION"
    http_status = 409
    title = "profile mismatch"


class WeightsUnavailable(ComneckError):
    """An artefact that is not in the cache and could not be fetched, or is damaged."""

    exit_code = 9
    grpc_status = "FAILED_PRECONDITION"
    http_status = 503
    title = "weights unavailable"


class ServerUnavailable(ComneckError):
    """No server answers at the address."""

    exit_code = 10
    grpc_status = "UNAVAILABLE"
    http_status = 503
    title = "server unavailable"


class DeadlineExceeded(ComneckError):
    """The server did not answer in the time allowed."""

    exit_code = 11
    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504
    title = "deadline exceeded"


class ServerFailed(ComneckError):
    """The server failed in a way that it did not foresee; its log has the details."""

    exit_code = 12
    title = "server failed"


class NothingFound(ComneckError):
    """An answer that does not hold what is to be done something with: no box to draw, for one."""

    exit_code = 13
    title = "nothing found"


def all_errors() -> list[type[ComneckError]]:
    """Every error class, by exit code: what --help, the docs and the clients' decoding are made from."""
    found: list[type[ComneckError]] = []
    pending = [ComneckError]
    while pending:
        kind = pending.pop()
        found.append(kind)
        pending.extend(kind.__subclasses__())
    return sorted(found, key=lambda kind: kind.exit_code)


def exit_code_help() -> str:
    """The table of exit codes that ends every command's --help."""
    rows = [(0, "success")] + [(kind.exit_code, kind.title) for kind in all_errors()] + [(130, "interrupted")]
    return "exit codes:\n" + "\n".join(f"  {code:>3}  {title}" for code, title in rows)
