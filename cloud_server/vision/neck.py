"""The transform-neck: from quantised latents to CLIP's third block, without pixels."""

from __future__ import annotations

import torch
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn

from shared.errors import BadInput


class TransformNeck(nn.Module):
    """Turns quantised latents into the tokens that enter CLIP's third block (ComNeck, section 3.3).

        y_hat (B, M, h, w) -> linear -> [CLS] + positions -> LayerNorm -> one CLIP block -> (B, 1 + h w, D)

    It replaces g_s, CLIP's patch embedding and CLIP's first two blocks, and is the only part trained for machine use in
    d1. Parameter names are those of the authors' release, so that a published neck loads as it is.

    Args:
        channels: M of the codec.
        grid: h = w of the latents: 16 for 256 pixels.
        width, heads: D of the CLIP it enters, and its attention heads.
    """

    def __init__(self, channels: int, grid: int, width: int, heads: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) * width**-0.5)
        self.trans_latent_dim = nn.Linear(channels, width)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers=1, heads=heads, act_layer=QuickGELU)

    def forward(self, y_hat: Tensor) -> Tensor:
        """y_hat (B, M, h, w) -> tokens (B, 1 + h w, D)."""
        if y_hat.shape[2] * y_hat.shape[3] + 1 != len(self.positional_embedding):
            raise BadInput(
                f"latents of {y_hat.shape[2]}x{y_hat.shape[3]} positions; this neck was made for "
                f"{len(self.positional_embedding) - 1}: encode at the profile's input size"
            )
        patches = self.trans_latent_dim(y_hat.flatten(2).transpose(1, 2))  # (B, h w, D), row-major
        cls = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([cls, patches], 1) + self.positional_embedding
        return self.transformer(self.ln_pre(tokens))
