"""LLaMA-Adapter's gated attention (Zhang et al., 2023, section 3.2), as an attention function for transformers.

Each adapted layer attends to its text as ever, and besides to the adapter's keys under a softmax of their own, whose
result enters through ``tanh(gate)``. The adapter's keys get neither normalisation nor rotary positions; the queries
have theirs. The golden tests hold it to the original's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention

NAME = "comneck_gated_adapter"


@dataclass(frozen=True)
class LayerAdapter:
    """What one layer attends to besides its text.

    Attributes:
        keys, values: (B, key-value heads, K, head_dim), from the layer's own k_proj and v_proj.
        gate: (1, query heads, 1, 1), before tanh.
    """

    keys: Tensor
    values: Tensor
    gate: Tensor


def project_adapter(attention: LlamaAttention, adapter: Tensor, gate: Tensor) -> LayerAdapter:
    """Adapter tokens (B, K, D) -> the keys and values that layer ``attention`` (a LlamaAttention) makes of them."""
    shape = (*adapter.shape[:2], -1, attention.head_dim)
    return LayerAdapter(
        keys=attention.k_proj(adapter).view(shape).transpose(1, 2),
        values=attention.v_proj(adapter).view(shape).transpose(1, 2),
        gate=gate,
    )


def gated_attention(
    module: LlamaAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    adapters: dict[int, LayerAdapter] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled-dot-product attention plus the gated adapter of this layer, if it has one.

    query (B, heads, T, head_dim), key and value (B, key-value heads, S, head_dim) -> (B, T, heads, head_dim)
    """
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    adapter = (adapters or {}).get(module.layer_idx)
    if adapter is None:
        return output, None
    repeats = query.shape[1] // adapter.keys.shape[1]  # grouped queries share their key-value head
    keys = adapter.keys.repeat_interleave(repeats, 1)
    values = adapter.values.repeat_interleave(repeats, 1)
    scores = query @ keys.transpose(-1, -2) * module.scaling  # (B, heads, T, K)
    weights = adapter.gate.tanh() * torch.softmax(scores, -1, dtype=torch.float32)
    return output + (weights.to(values.dtype) @ values).transpose(1, 2), None


AttentionInterface.register(NAME, gated_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
