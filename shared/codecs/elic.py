"""ELIC (He et al., CVPR 2022) in the Chandelier layout, which is ComNeck's base codec.

The network is CompressAI's; what is ours is the walk through it, which training, encoding and decoding share:

    pixels -> g_a -> y -> h_a -> z -> round -> z_hat -> h_s -> psi
    for each channel group, anchors of the checkerboard first, then the rest:
        (psi, earlier groups, anchors) -> mean, scale -> symbol = round(y - mean), y_hat = symbol + mean
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import Elic2022Chandelier
from compressai.ops import quantize_ste
from torch import Tensor, nn

from shared.errors import BadInput


@dataclass(frozen=True)
class ElicConfig:
    """Sizes of an ELIC codec. The defaults are the paper's and ComNeck's.

    Attributes:
        N: channels of the transforms.
        M: channels of the latents y.
        groups: channels of y per context group; they sum to M.
    """

    N: int = 192
    M: int = 320
    groups: tuple[int, ...] = (16, 16, 32, 64, 192)


@dataclass(frozen=True)
class Pass:
    """One of the ten steps in which y is coded: the anchors, or the rest, of one channel group.

    Attributes:
        group: index of the channel group.
        mask: (h, w), true where this step codes.
        mean, scale: (B, G, h, w), the Gaussian that each symbol is coded under.
    """

    group: int
    mask: Tensor
    mean: Tensor
    scale: Tensor


class Elic(nn.Module):
    """The transforms and the entropy model of one ELIC codec.

    pixels (B, 3, H, W) in 0..1 -> y (B, M, H/16, W/16) -> z (B, N, H/64, W/64);  H, W multiples of 64
    """

    stride = 64
    latent_stride = 16

    def __init__(self, config: ElicConfig) -> None:
        super().__init__()
        self.config = config
        self.net = Elic2022Chandelier(config.N, config.M, list(config.groups))

    @classmethod
    def build(cls, config: dict[str, Any]) -> Elic:
        """The codec of the given sizes, as an artefact's metadata holds them."""
        return cls(ElicConfig(config["N"], config["M"], tuple(config["groups"])))

    def load_artefact(self, tensors: dict[str, Tensor]) -> None:
        """Takes the weights of an artefact, which leaves out what the network builds by itself.

        Raises:
            BadInput: a tensor is missing, left over or of another shape.
        """
        expected = {name: value.shape for name, value in self.state_dict().items() if not is_derived(name)}
        given = {name: value.shape for name, value in tensors.items()}
        if expected != given:
            wrong = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            raise BadInput(f"not the weights of an ELIC of these sizes; wrong or missing: {', '.join(wrong)}")
        self.load_state_dict(tensors, strict=False)

    def g_a(self, pixels: Tensor) -> Tensor:
        """Analysis transform: (B, 3, H, W) in 0..1 -> y (B, M, H/16, W/16)."""
        return self.net.g_a(pixels)

    def g_s(self, y_hat: Tensor) -> Tensor:
        """Synthesis transform, for human viewing only: (B, M, h, w) -> (B, 3, 16 h, 16 w), about 0..1."""
        return self.net.g_s(y_hat)

    def h_a(self, y: Tensor) -> Tensor:
        """Hyper-analysis: (B, M, h, w) -> z (B, N, h/4, w/4)."""
        return self.net.latent_codec["hyper"].h_a(y)

    def h_s(self, z_hat: Tensor) -> Tensor:
        """Hyper-synthesis: (B, N, h/4, w/4) -> psi (B, 2 M, h, w)."""
        return self.net.latent_codec["hyper"].h_s(z_hat)

    @property
    def bottleneck(self) -> EntropyBottleneck:
        """The probability model of z."""
        return self.net.latent_codec["hyper"].entropy_bottleneck

    @property
    def gaussian(self) -> GaussianConditional:
        """The probability model of y, given mean and scale. CompressAI has one per group, all alike."""
        return self.net.latent_codec["y"]["y0"]["y"].gaussian_conditional

    @property
    def z_medians(self) -> Tensor:
        """(N, 1, 1): what is subtracted from z before rounding."""
        return self.bottleneck.quantiles[:, 0, 1, None, None]

    def empty_groups(self, psi: Tensor) -> list[Tensor]:
        """The y_hat of a picture of which nothing is decoded yet: zeros (B, G, h, w) per channel group."""
        return [psi.new_zeros(len(psi), size, *psi.shape[-2:]) for size in self.config.groups]

    def passes(self, psi: Tensor, y_hat: list[Tensor]) -> Iterator[Pass]:
        """Walks the ten coding steps.

        Args:
            psi: (B, 2 M, h, w) from h_s.
            y_hat: what ``empty_groups`` gives; after each step the caller adds that step's values to its group.
        """
        coder = self.net.latent_codec["y"]
        anchors = checkerboard(psi.shape[-2], psi.shape[-1], psi.device)
        for k, size in enumerate(self.config.groups):
            group = coder[f"y{k}"]
            side = psi
            if k > 0:
                # The first and the previous group only: what sets this layout apart from the paper's.
                seen = y_hat[0] if k == 1 else torch.cat([y_hat[0], y_hat[k - 1]], 1)
                side = torch.cat([coder.channel_context[f"y{k}"](seen), psi], 1)
            context = psi.new_zeros(len(psi), 2 * size, *psi.shape[-2:])
            yield Pass(k, anchors, *group.entropy_parameters(torch.cat([context, side], 1)).chunk(2, 1))
            context = group.context_prediction(y_hat[k])
            yield Pass(k, ~anchors, *group.entropy_parameters(torch.cat([context, side], 1)).chunk(2, 1))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The training pass: reconstruction and estimated bits, differentiable.

        Rounding is straight through where a value is used and uniform noise where its bits are estimated.

        Returns:
            ``x_hat`` (B, 3, H, W), ``y_hat`` (B, M, H/16, W/16), ``bits`` (B,) estimated from the likelihoods.
        """
        y = self.g_a(pixels)
        y_hat, bits = self.quantise(y)
        return {"x_hat": self.g_s(y_hat), "y_hat": y_hat, "bits": bits}

    def quantise(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, M, h, w) -> y_hat (B, M, h, w) as a decoder would get it, and its estimated bits (B,)."""
        z = self.h_a(y).float()
        z_hat = quantize_ste(z - self.z_medians) + self.z_medians
        _, likelihood = self.bottleneck(z)
        bits = -likelihood.log2().sum((1, 2, 3))
        psi = self.h_s(z_hat)
        y_hat = self.empty_groups(psi.float())
        targets = y.float().split(self.config.groups, 1)
        for step in self.passes(psi, y_hat):
            target, mean, scale = targets[step.group], step.mean.float(), step.scale.float()
            y_hat[step.group] = y_hat[step.group] + (quantize_ste(target - mean) + mean) * step.mask
            _, likelihood = self.gaussian(target, scale, mean)
            bits = bits - (likelihood.log2() * step.mask).sum((1, 2, 3))
        return torch.cat(y_hat, 1), bits


def is_derived(name: str) -> bool:
    """Whether a state_dict entry is made by the network itself (masks) or replaced by the artefact's tables."""
    return name.endswith((".mask", ".bound", ".target", "scale_bound", "scale_table")) or "._" in name


def checkerboard(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width) of booleans, true at the anchors: (even, even) and (odd, odd)."""
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)[None, :]
    return (rows + columns) % 2 == 0
