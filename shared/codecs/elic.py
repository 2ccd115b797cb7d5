"""ELIC (He et al., CVPR 2022): the transforms, and the space-channel context model that y is coded under.

    pixels -> g_a -> y -> h_a -> z -> round -> z_hat -> h_s -> psi
    for each channel group, anchors of the checkerboard first, then the rest:
        (psi, earlier groups, anchors) -> mean, scale -> symbol = round(y - mean), y_hat = symbol + mean

This is the network in floating point, which training optimises and of which an encoder runs g_a and h_a. What a
bitstream is coded under is its integer form, exact_elic.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from shared.codecs.interface import Code, Network, Pass
from shared.codecs.published import Rule, renamed

if TYPE_CHECKING:
    from shared.codecs.exact_elic import ExactElic

Layout = Literal["chandelier", "official"]


@dataclass(frozen=True)
class ElicConfig:
    """Sizes of an ELIC codec. The defaults are the paper's and ComNeck's.

    Attributes:
        N: channels of the transforms and of z.
        M: channels of the latents y.
        groups: channels of y per context group; they sum to M.
        layout: ``chandelier`` (ComNeck's base codec): a group sees the first and the previous one, psi has 2 M
            channels, parameters are (mean, scale). ``official`` (the paper, in CompressAI's reading): a group sees all
            earlier ones, psi has 2 N channels, parameters are (scale, mean).
    """

    N: int = 192
    M: int = 320
    groups: tuple[int, ...] = (16, 16, 32, 64, 192)
    layout: Layout = "chandelier"

    @property
    def psi(self) -> int:
        """Channels that h_s gives."""
        return 2 * (self.M if self.layout == "chandelier" else self.N)

    def seen(self, k: int) -> list[int]:
        """The earlier groups that group k's channel context reads, in their order."""
        return list(range(k)) if self.layout == "official" else sorted({0, k - 1}) if k else []

    def aggregation(self, k: int) -> list[int]:
        """Channels from layer to layer of group k's parameter aggregation, input first."""
        size = 2 * self.groups[k]
        first = size * (2 if k else 1) + self.psi
        if self.layout == "chandelier":
            return [first, 2 * self.M, 512, size]
        ramp = [int(first + (size - first) * step / 3) for step in (1, 2)]
        return [first, *(max(width, self.psi) for width in ramp), size]


class Elic(Network):
    """An ELIC codec without its probability model of z.

    pixels (B, 3, H, W) in 0..1 -> y (B, M, H/16, W/16) -> z (B, N, H/64, W/64);  H, W multiples of 64
    """

    stride = 64
    h_s: Any  # a Sequential; the others are ModuleLists
    channel_context: Any
    spatial_context: Any
    aggregation: Any

    def __init__(self, config: ElicConfig) -> None:
        super().__init__()
        self.config = config
        self.family = f"elic-{config.layout}"
        self.N, self.M = config.N, config.M
        N, M, groups = config.N, config.M, config.groups
        self.g_a = nn.Sequential(
            _down(3, N), *_blocks(N),
            _down(N, N), *_blocks(N), AttentionBlock(N),
            _down(N, N), *_blocks(N),
            _down(N, M), AttentionBlock(M),
        )  # fmt: skip
        self.g_s = nn.Sequential(
            AttentionBlock(M), _up(M, N), *_blocks(N),
            _up(N, N), AttentionBlock(N), *_blocks(N),
            _up(N, N), *_blocks(N),
            _up(N, 3),
        )  # fmt: skip
        self.h_a = nn.Sequential(
            nn.Conv2d(M, N, 3, padding=1), nn.ReLU(), _down(N, N), nn.ReLU(), _down(N, N)
        )  # fmt: skip
        last = nn.Conv2d if config.layout == "chandelier" else nn.ConvTranspose2d
        self.h_s = nn.Sequential(
            _up(N, N), nn.ReLU(), _up(N, N * 3 // 2), nn.ReLU(), last(N * 3 // 2, config.psi, 3, padding=1)
        )
        same = partial(nn.Conv2d, kernel_size=5, padding=2)
        self.channel_context = nn.ModuleList(
            nn.Sequential(
                same(sum(groups[i] for i in config.seen(k)), 224), nn.ReLU(), same(224, 128), nn.ReLU(),
                same(128, 2 * groups[k]),
            )
            for k in range(1, len(groups))
        )  # fmt: skip
        self.spatial_context = nn.ModuleList(AnchorContext(size) for size in groups)
        self.aggregation = nn.ModuleList(_pointwise(config.aggregation(k)) for k in range(len(groups)))

    def describe(self) -> dict[str, Any]:
        """Its sizes, as JSON holds them."""
        return {"N": self.N, "M": self.M, "groups": list(self.config.groups)}

    def entropy_path(self) -> ExactElic:
        """The integer form of what is between z and y's symbols, still empty."""
        from shared.codecs.exact_elic import ExactElic

        return ExactElic(self.config)

    def walk(self, z_hat: Tensor, code: Code) -> Tensor:
        """Codes y in ten passes: z_hat (B, N, h/4, w/4) -> y_hat (B, M, h, w)."""
        psi = self.h_s(z_hat)
        anchors = checkerboard(psi.shape[-2], psi.shape[-1], psi.device)
        y_hat: list[Tensor] = []
        start = 0
        for k, size in enumerate(self.config.groups):
            side = psi
            if k:
                seen = torch.cat([y_hat[i] for i in self.config.seen(k)], 1)
                side = torch.cat([self.channel_context[k - 1](seen), psi], 1)
            group = psi.new_zeros(len(psi), size, *psi.shape[-2:])
            context = psi.new_zeros(len(psi), 2 * size, *psi.shape[-2:])
            for mask in (anchors, ~anchors):
                parameters = self.aggregation[k](torch.cat([context, side], 1)).chunk(2, 1)
                mean, scale = parameters if self.config.layout == "chandelier" else parameters[::-1]
                group = group + code(Pass(slice(start, start + size), mask, mean, scale)) * mask
                if mask is anchors:
                    context = self.spatial_context[k](group)
            y_hat.append(group)
            start += size
        return torch.cat(y_hat, 1)


class AnchorContext(nn.Conv2d):
    """g_sp of the paper: what the anchors around a position tell of it, (B, G, h, w) -> (B, 2 G, h, w)."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 2 * size, kernel_size=5, padding=2)

    def forward(self, group: Tensor) -> Tensor:
        return conv2d(group, self.weight * ~checkerboard(5, 5, group.device), self.bias, padding=2)


class BottleneckBlock(nn.Module):
    """The paper's residual bottleneck block, (B, N, h, w) -> (B, N, h, w)."""

    def __init__(self, N: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(N, N // 2, 1)
        self.conv2 = nn.Conv2d(N // 2, N // 2, 3, padding=1)
        self.conv3 = nn.Conv2d(N // 2, N, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x).relu_()).relu_())


class ResidualUnit(nn.Module):
    """Of an attention block; like a bottleneck block, with a ReLU at its end."""

    def __init__(self, N: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(N, N // 2, 1), nn.ReLU(), nn.Conv2d(N // 2, N // 2, 3, padding=1), nn.ReLU(),
            nn.Conv2d(N // 2, N, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).relu_()


class AttentionBlock(nn.Module):
    """Simplified attention of Cheng et al. (CVPR 2020): x + a sigmoid(b), (B, N, h, w) -> (B, N, h, w)."""

    def __init__(self, N: int) -> None:
        super().__init__()
        self.conv_a = nn.Sequential(*(ResidualUnit(N) for _ in range(3)))
        self.conv_b = nn.Sequential(*(ResidualUnit(N) for _ in range(3)), nn.Conv2d(N, N, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_a(x) * self.conv_b(x).sigmoid()


_PUBLISHED: list[Rule] = [
    # VincentChandelier, ComNeck
    (r"^cc_transforms\.", "channel_context."),
    (r"^context_prediction\.", "spatial_context."),
    (r"^ParamAggregation\.", "aggregation."),
    # CompressAI
    (r"^latent_codec\.hyper\.", ""),
    (r"^latent_codec\.y\.channel_context\.y(\d+)", lambda found: f"channel_context.{int(found[1]) - 1}"),
    (r"^latent_codec\.y\.latent_codec\.y(\d+)\.context_prediction", r"spatial_context.\1"),
    (r"^latent_codec\.y\.latent_codec\.y(\d+)\.entropy_parameters", r"aggregation.\1"),
]


def checkerboard(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width) of booleans, true at the anchors: (even, even) and (odd, odd)."""
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)[None, :]
    return (rows + columns) % 2 == 0


def chandelier(config: dict[str, Any]) -> Elic:
    """ComNeck's base codec, of the given sizes."""
    return Elic(ElicConfig(config["N"], config["M"], tuple(config["groups"]), "chandelier"))


def official(config: dict[str, Any]) -> Elic:
    """The paper's codec, of the given sizes."""
    return Elic(ElicConfig(config["N"], config["M"], tuple(config["groups"]), "official"))


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict by our names: of VincentChandelier's ELIC, which is ComNeck's, or of CompressAI's two."""
    return renamed(state, _PUBLISHED)


def _down(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel_size=5, stride=2, padding=2)


def _up(channels: int, out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out, kernel_size=5, stride=2, padding=2, output_padding=1)


def _blocks(N: int) -> list[BottleneckBlock]:
    return [BottleneckBlock(N) for _ in range(3)]


def _pointwise(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, out in pairwise(widths):
        layers += [nn.Conv2d(channels, out, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
