"""CLIP's image tower, enterable at any block: block 0 with pixels, block 2 with the neck's tokens.

The tower is open_clip's; its parameter names are OpenAI's own (``visual.`` stripped). Blocks are counted from 0 as in
the paper: the neck replaces the embedding and blocks 0 and 1, its tokens enter block 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from shared.profiles import ClipSpec
from shared.weights.digest import load_tensors

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionNeeds:
    """What a backend reads from CLIP.

    Attributes:
        last_block: index of the last block to run; -1 for CLIP's last, -2 for the one before.
        project: whether every token goes through ln_post and the projection into CLIP's joint space.
        ln_post_times: OpenAI's CLIP applies ln_post once; the authors' necks were trained under two, as
            their modified CLIP's forward has it.
    """

    last_block: int = -1
    project: bool = False
    ln_post_times: int = 1


Sight = dict[int, Tensor]
"""What is known of a photo: tokens (1 + patches, D), CLS first, by the block that they leave; -1 for those that enter
block 0."""


class ClipTower(nn.Module):
    """CLIP's image tower, frozen."""

    def __init__(self, spec: ClipSpec) -> None:
        super().__init__()
        self.spec = spec
        self.visual = VisionTransformer(
            image_size=spec.image,
            patch_size=spec.patch,
            width=spec.width,
            layers=spec.layers,
            heads=spec.heads,
            mlp_ratio=4.0,
            output_dim=spec.projection,
            act_layer=QuickGELU,
        )

    @classmethod
    def load(cls, spec: ClipSpec, path: Path) -> ClipTower:
        """Reads OpenAI-layout weights, interpolating the position embedding where the input size differs."""
        tensors = {name: value.float() for name, value in load_tensors(path).items()}
        tensors["positional_embedding"] = resize_positions(tensors["positional_embedding"], spec.grid)
        tower = cls(spec)
        tower.visual.load_state_dict(tensors)
        return tower.eval().requires_grad_(False)

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in 0..1 -> the tokens that enter block 0 (B, 1 + patches, D).

        Another size than the tower's is scaled (bicubic, shorter side) and cropped at the centre.
        """
        side = self.spec.image
        if pixels.shape[-2:] != (side, side):
            scale = side / min(pixels.shape[-2:])
            size = [max(side, round(length * scale)) for length in pixels.shape[-2:]]
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
            top, left = (size[0] - side) // 2, (size[1] - side) // 2
            pixels = pixels[..., top : top + side, left : left + side]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        visual = self.visual
        patches = visual.conv1((pixels - mean) / std).flatten(2).transpose(1, 2)  # (B, patches, D)
        cls = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return visual.ln_pre(torch.cat([cls, patches], 1) + visual.positional_embedding)

    def blocks(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Runs blocks ``first`` to ``last``, both included, counted from 0: (B, 1 + patches, D) in and out."""
        for block in self.visual.transformer.resblocks[first : last + 1]:
            tokens = _run(block, tokens)
        return tokens

    def project(self, tokens: Tensor, ln_post_times: int = 1) -> Tensor:
        """ln_post and projection of every token: (B, 1 + patches, D) -> (B, 1 + patches, projection)."""
        for _ in range(ln_post_times):
            tokens = self.visual.ln_post(tokens)
        return tokens @ self.visual.proj

    def see(self, sights: Sequence[Sight], last_block: int, stops: Iterable[int] = ()) -> None:
        """Runs the blocks up to ``last_block`` of every photo from where it has come to, photos of one place at once.

        What leaves ``last_block`` and, on the way, ``stops`` is added to the sights.
        """
        last, known = last_block % self.spec.layers, {stop % self.spec.layers for stop in stops}
        groups: dict[int, list[Sight]] = {}
        for sight in sights:
            if last not in sight:
                groups.setdefault(max(block for block in sight if block < last), []).append(sight)
        for reached, group in groups.items():
            tokens = torch.stack([sight[reached] for sight in group])
            for stop in sorted({last, *(stop for stop in known if reached < stop < last)}):
                tokens, reached = self.blocks(tokens, reached + 1, stop), stop
                for sight, own in zip(group, tokens, strict=True):
                    sight[stop] = own

    def read(self, sight: Sight, needs: VisionNeeds) -> Tensor:
        """What a backend reads of a photo that was seen, (1 + patches, D or projection), CLS first."""
        tokens = sight[needs.last_block % self.spec.layers]
        return self.project(tokens, needs.ln_post_times) if needs.project else tokens


def _run(block: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
    """open_clip's block with its attention written out, (B, T, D) in and out.

    nn.MultiheadAttention transposes its input, and a linear layer whose weights are frozen then copies them once per
    token as soon as gradients pass through: distilling the neck took five times as long.
    """
    attention = block.attn
    qkv = F.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    heads = qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)  # 3, B, heads, T, d
    attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
    tokens = tokens + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return tokens + block.mlp(block.ln_2(tokens))


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embedding (1 + g^2, D) for another grid (1 + grid^2, D), bicubic as in transformers' CLIP."""
    old = round((len(positions) - 1) ** 0.5)
    if old == grid:
        return positions
    patches = positions[1:].T.reshape(1, -1, old, old)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], patches.flatten(2)[0].T])
