"""A connector's artefact: its tensors, and in the metadata ``config`` what it is built of, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from shared.weights.digest import load_tensors, read_metadata
from shared.weights.store import ensure

Connector = TypeVar("Connector", bound=nn.Module)


def load_connector(name: str, build: Callable[..., Connector]) -> Connector:
    """The connector of the artefact of that name, in float32; ``build`` takes what ``config`` holds by name.

    Raises:
        WeightsUnavailable: it cannot be had, or is damaged.
    """
    path = ensure(name)
    connector = build(**json.loads(read_metadata(path)["config"]))
    connector.load_state_dict({key: value.float() for key, value in load_tensors(path).items()})
    return connector
