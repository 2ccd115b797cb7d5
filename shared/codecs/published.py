"""Names of the tensors in checkpoints that others published, as ours. Each family adds its own rules to these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_DERIVED = (
    r"(^|\.)(mask|attn_mask|relative_position_index|bound|target|scale_bound|scale_table"
    r"|_quantized_cdf|_cdf_length|_offset)$"
)
_BOTTLENECK: list[Rule] = [  # of CompressAI before 1.2.8
    (r"^bottleneck\._matrix", "bottleneck.matrices."),
    (r"^bottleneck\._bias", "bottleneck.biases."),
    (r"^bottleneck\._factor", "bottleneck.factors."),
]


def renamed(state: dict[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """A published state_dict by our names.

    The probability model of z is ``bottleneck.*`` in CompressAI's present names. What CompressAI's classes derive by
    themselves, masks, bounds and tables, is left out: our artefacts have their own.

    Args:
        rules: regular expressions and what replaces them, in turn.
    """
    named = {}
    for name, tensor in state.items():
        if re.search(_DERIVED, name):
            continue
        for pattern, ours in [*rules, (r"^entropy_bottleneck\.", "bottleneck."), *_BOTTLENECK]:
            name = re.sub(pattern, ours, name)
        named[name] = tensor
    return named
