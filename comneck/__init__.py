"""comneck: photos to multimodal language models as a few hundred bytes.

from comneck import Client is the SDK; the packages beside this one are laid out in docs/architecture.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_SDK = {
    "AsyncClient": "edge_client.client",
    "Client": "edge_client.client",
    "Encoder": "edge_client.encoder",
    "read_bitstream": "edge_client.stored",
    "reconstruct": "edge_client.stored",
    "Generation": "shared.conversation",
    "Bitstream": "shared.bitstream",
    "Codec": "shared.codecs.codec",
    "Photo": "shared.images",
    "ComneckError": "shared.errors",
}
__all__ = sorted(_SDK)


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: ``import comneck`` alone costs nothing."""
    if name in _SDK:
        return getattr(import_module(_SDK[name]), name)
    raise AttributeError(f"module 'comneck' has no attribute {name!r}")
