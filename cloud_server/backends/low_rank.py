"""Low-rank changes of a frozen language model (LoRA; Hu et al., ICLR 2022): several backends, one model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """Changes W x to W x + up down x in every linear layer of a LLaMA's blocks, while they are applied.

    Args:
        model: a LlamaForCausalLM; it is not part of this module.
        rank: of the changes; at first they are none.
    """

    def __init__(self, model: Any, rank: int) -> None:
        super().__init__()
        self._layers: list[nn.Linear] = [
            module
            for name, module in model.model.layers.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LAYERS
        ]
        self.down = nn.ParameterList(
            torch.randn(rank, layer.in_features) * layer.in_features**-0.5 for layer in self._layers
        )
        self.up = nn.ParameterList(torch.zeros(layer.out_features, rank) for layer in self._layers)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The language model computes with the changes inside the block."""
        hooks = [
            layer.register_forward_hook(_change(down, up))
            for layer, down, up in zip(self._layers, self.down, self.up, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _change(down: Tensor, up: Tensor) -> Any:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + nn.functional.linear(nn.functional.linear(given[0], down), up)

    return hook
