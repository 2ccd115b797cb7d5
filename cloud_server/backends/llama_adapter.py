"""LLaMA-Adapter v1, captioning (Zhang et al., 2023): CLIP tokens steer a frozen LLaMA's last layers through gates.

CLIP tokens, projected (B, 1 + patches, 768) -> Connector -> visual tokens (B, K, D)
layer i of the last L: adapter_i = query_i + visual tokens -> its own keys and values -> gated attention
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cloud_server.backends import Backend, Piece, Question
from cloud_server.backends.connector import load_connector
from cloud_server.backends.gated_attention import LayerAdapter, project_adapter
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.prompts import prompt_format
from cloud_server.vision.clip import VisionNeeds
from shared.conversation import Generation
from shared.profiles import BackendSpec, Profile
from shared.weights.store import digest_of, ensure


class Connector(nn.Module):
    """CLIP's projected tokens to the visual tokens that every adapted layer adds to its own query.

    Parameter names are those of the published caption checkpoint, besides ``cap_gate``, which there is one
    ``layers.{i}.attention.cap_gate`` per layer and here a stack.

    Args:
        clip_width: of the projected CLIP tokens (768 for ViT-L/14).
        width, heads, blocks: of the connector's own transformer (512, 16, 2 as published).
        length: visual tokens per photo (10 as published).
        llm_width, llm_layers, llm_heads: of the language model.
        adapted_layers: how many of its last layers are adapted (30 of 32 as published).
    """

    def __init__(
        self,
        clip_width: int,
        width: int,
        heads: int,
        blocks: int,
        length: int,
        llm_width: int,
        llm_layers: int,
        llm_heads: int,
        adapted_layers: int,
    ) -> None:
        super().__init__()
        self.config = {
            "clip_width": clip_width,
            "width": width,
            "heads": heads,
            "blocks": blocks,
            "length": length,
            "llm_width": llm_width,
            "llm_layers": llm_layers,
            "llm_heads": llm_heads,
            "adapted_layers": adapted_layers,
        }
        self.first_layer = llm_layers - adapted_layers
        self.length = length
        self.clip_proj = nn.Linear(clip_width, width)
        self.clip_proj_norm = nn.LayerNorm(width)
        self.visual_query = nn.Embedding(length, width)
        self.visual_blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(blocks)
        )
        self.visual_proj = nn.Linear(width, llm_width)
        self.visual_proj_norm = nn.LayerNorm(llm_width)
        self.cap_adapter_query = nn.Embedding(adapted_layers * length, llm_width)
        self.cap_gate = nn.Parameter(torch.zeros(adapted_layers, 1, llm_heads, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """CLIP tokens (B, 1 + patches, clip_width) -> visual tokens (B, K, llm_width)."""
        x = self.clip_proj_norm(self.clip_proj(features))
        x = torch.cat([self.visual_query.weight.expand(len(x), -1, -1), x], 1)  # (B, K + 1 + patches, width)
        for block in self.visual_blocks:
            x = block(x)
        return self.visual_proj_norm(self.visual_proj(x[:, : self.length]))

    def adapters(self, visual_tokens: Tensor, layers: Any) -> dict[int, LayerAdapter]:
        """Visual tokens (B, K, D) -> what each adapted layer of ``layers`` (the LLaMA's) attends to, by its index."""
        queries = self.cap_adapter_query.weight.unflatten(0, (-1, self.length))  # (L, K, D)
        return {
            self.first_layer + i: project_adapter(
                layers[self.first_layer + i].self_attn, queries[i] + visual_tokens, self.cap_gate[i]
            )
            for i in range(len(queries))
        }


class LlamaAdapter(Backend):
    """A frozen LLaMA that describes what the connector shows it."""

    needs = VisionNeeds(project=True)

    def __init__(self, connector: Connector, llm: LanguageModel, prompt: str, digests: dict[str, str]) -> None:
        self.connector = connector
        self.llm = llm
        self.format = prompt_format(prompt)
        self.digests = digests

    @classmethod
    def load(cls, spec: BackendSpec, profile: Profile, device: torch.device) -> LlamaAdapter:
        connector = load_connector(spec.connector, Connector)
        llm = LanguageModel.load(ensure(spec.llm), device, spec.dtype)
        return cls(
            connector.eval().requires_grad_(False).to(device, llm.model.dtype),
            llm,
            spec.prompt,
            {"llm": digest_of(spec.llm), "connector": digest_of(spec.connector)},
        )

    def write(self, questions: Sequence[Question], generation: Generation) -> Iterator[Piece]:
        """All questions are about a photo each, or all about none."""
        adapters = None
        if photos := [photo for question in questions for photo in question.photos]:
            with torch.inference_mode():
                tokens = self.connector(torch.stack(photos).to(self.llm.model.dtype))
                adapters = self.connector.adapters(tokens, self.llm.model.model.layers)
        prompts = [self.llm.embed(self.format(self.llm.tokenizer, question.prompt)) for question in questions]
        yield from self.llm.write(prompts, generation, adapters=adapters)
