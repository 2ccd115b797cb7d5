"""The border between our errors and gRPC's statuses, in both directions.

An error travels as its class's status, its message, and its name in the trailing metadata under ``comneck-error``, by
which the client finds the class again: several classes share a status.
"""

from __future__ import annotations

from typing import cast

import grpc

from shared.errors import (
    BadInput,
    ComneckError,
    DeadlineExceeded,
    ServerFailed,
    ServerUnavailable,
    TooLarge,
    all_errors,
)

ERROR_KEY = "comneck-error"
MAX_MESSAGE = 1000  # characters; a message may quote its request, and gRPC drops headers of more than 8 kB

_BY_STATUS: dict[grpc.StatusCode, type[ComneckError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadInput,
    grpc.StatusCode.RESOURCE_EXHAUSTED: TooLarge,
}


def to_status(problem: ComneckError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]:
    """What ``context.abort`` takes: status, message and trailing metadata."""
    message = str(problem)
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} ..."
    return grpc.StatusCode[problem.grpc_status], message, ((ERROR_KEY, problem.slug()),)


def from_status(problem: grpc.RpcError, address: str) -> ComneckError:
    """The error that the server at ``address`` raised; or, where it is gRPC's own, the one of ours that says it."""
    call = cast("grpc.Call", problem)  # what is raised has a call's methods too
    code, details = call.code(), call.details() or ""
    sent = dict(call.trailing_metadata() or ()).get(ERROR_KEY)
    for kind in all_errors():
        if kind.slug() == sent:
            return kind(details)
    if code is grpc.StatusCode.UNAVAILABLE:
        return ServerUnavailable(f"no comneck server answers at {address}; `cloud-server serve` starts one")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{address} did not answer in the time allowed; give it longer with --timeout")
    if code in _BY_STATUS:
        return _BY_STATUS[code](f"{address} refused the request: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerFailed(f"{address} speaks gRPC, but not comneck.v1: {details}")
    return ServerFailed(f"{address} failed with {code.name}: {details}")
