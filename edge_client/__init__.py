"""The edge: prepares and encodes photos, and asks a server about them.

from edge_client import Client
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_client.client import AsyncClient, Client, Receipt, Reply
    from edge_client.encoder import Encoder

__all__ = ["AsyncClient", "Client", "Encoder", "Receipt", "Reply"]


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: the command's --help takes neither gRPC nor NumPy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_client import client

    return getattr(client, name)
