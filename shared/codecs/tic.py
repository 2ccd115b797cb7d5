"""TIC (Lu et al., "Transformer-based Image Compression", DCC 2022), in the variant with a hyperprior only.

    pixels -> g_a -> y -> h_a -> z -> round -> z_hat -> h_s -> mean, scale
    symbol = round(y - mean), y_hat = symbol + mean -> g_s -> x_hat

It is the base codec of TransTIC (Chen et al., ICCV 2023), whose tensors ``from_published`` renames. Unlike the first
TIC it has no context model, and Swin blocks on y too. This is the network in floating point, which training optimises
and of which an encoder runs g_a and h_a. What a bitstream is coded under is h_s in integers, exact_tic.py.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shared.codecs.interface import Code, Network, Pass
from shared.codecs.published import Rule, renamed
from shared.errors import BadInput

if TYPE_CHECKING:
    from shared.codecs.exact_tic import ExactTic

WINDOW = 8
"""Side of the attention windows of g_a and g_s, in positions."""
HYPER_WINDOW = 4
"""The same of h_a and h_s."""


@dataclass(frozen=True)
class TicConfig:
    """Sizes of a TIC codec. The defaults are TransTIC's.

    Attributes:
        N: channels of the transforms and of z.
        M: channels of the latents y.
        depths: blocks per Swin group, from pixels to z: four groups of g_a, two of h_a; g_s and h_s mirror them.
        heads: attention heads of the same groups.
        mlp_ratio: hidden width of a block's perceptron, in widths of the block.
    """

    N: int = 128
    M: int = 192
    depths: tuple[int, ...] = (2, 4, 6, 2, 2, 2)
    heads: tuple[int, ...] = (8, 8, 8, 16, 16, 16)
    mlp_ratio: int = 2


class Tic(Network):
    """A TIC codec without its probability model of z.

    pixels (B, 3, H, W) in 0..1 -> y (B, M, H/16, W/16) -> z (B, N, H/64, W/64);  H, W multiples of 256

    The other way, ``h_s`` gives (mean, scale), both (B, M, h, w), of each symbol's Gaussian, the scale not yet bounded
    from below, and ``g_s`` x_hat (B, 3, 16 h, 16 w), about 0..1. All four raise BadInput for what does not divide into
    their attention windows.
    """

    family = "tic"
    stride = 256  # one attention window on z: 4 positions of 64 pixels

    def __init__(self, config: TicConfig) -> None:
        super().__init__()
        self.config = config
        self.N, self.M = N, M = config.N, config.M

        def swin(k: int, width: int, window: int, shifted: bool = True) -> SwinGroup:
            return SwinGroup(width, config.depths[k], config.heads[k], window, shifted, config.mlp_ratio)

        self.g_a = Analysis(
            _down(3, N, 5), swin(0, N, WINDOW),
            _down(N, N), swin(1, N, WINDOW),
            _down(N, N), swin(2, N, WINDOW),
            _down(N, M), swin(3, M, WINDOW),
        )  # fmt: skip
        self.g_s = nn.Sequential(
            swin(3, M, WINDOW), _up(M, N),
            swin(2, N, WINDOW), _up(N, N),
            swin(1, N, WINDOW), _up(N, N),
            swin(0, N, WINDOW), _up(N, 3, 5),
        )  # fmt: skip
        # At 256 pixels z is one window with nothing to shift; the original then leaves shifts out at every size.
        self.h_a = nn.Sequential(
            _down(M, N), swin(4, N, HYPER_WINDOW),
            _down(N, N), swin(5, N, HYPER_WINDOW, shifted=False),
        )  # fmt: skip
        self.h_s = HyperSynthesis(
            swin(5, N, HYPER_WINDOW, shifted=False), _up(N, N),
            swin(4, N, HYPER_WINDOW), _up(N, 2 * M),
        )  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Its sizes, as JSON holds them."""
        return {name: list(size) if isinstance(size, tuple) else size for name, size in asdict(self.config).items()}

    def entropy_path(self) -> ExactTic:
        """The integer form of what is between z and y's symbols, still empty."""
        from shared.codecs.exact_tic import ExactTic

        return ExactTic(self.config)

    def walk(self, z_hat: Tensor, code: Code) -> Tensor:
        """Codes y in one pass: z_hat (B, N, h/4, w/4) -> y_hat (B, M, h, w)."""
        mean, scale = self.h_s(z_hat)
        everywhere = torch.ones(mean.shape[-2:], dtype=torch.bool, device=mean.device)
        return code(Pass(slice(0, self.M), everywhere, mean, scale))


class Analysis(nn.Sequential):
    """g_a, (B, 3, H, W) -> (B, M, H/16, W/16)."""

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if height % Tic.stride or width % Tic.stride or not height * width:
            raise BadInput(f"TIC takes multiples of {Tic.stride} pixels, not {width}x{height}: scale or pad it")
        return super().forward(pixels)


class HyperSynthesis(nn.Sequential):
    """h_s, (B, N, h/4, w/4) -> mean, scale, both (B, M, h, w)."""

    def forward(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        scale, mean = super().forward(z_hat).chunk(2, 1)
        return mean, scale


class SwinGroup(nn.Module):
    """Swin blocks and, around them all, one more residual (RSTB), (B, C, h, w) -> (B, C, h, w).

    Args:
        width: C.
        depth: number of blocks.
        heads: attention heads of each; they divide C.
        window: side of the squares within which positions attend to each other; it divides h and w.
        shifted: whether every second block moves its windows by half a window, so that neighbours meet.
        mlp_ratio: hidden width of the perceptrons, in C.
    """

    def __init__(self, width: int, depth: int, heads: int, window: int, shifted: bool, mlp_ratio: int) -> None:
        super().__init__()
        self.window = window
        shifts = [window // 2 if shifted and i % 2 else 0 for i in range(depth)]
        self.blocks = nn.Sequential(*(SwinBlock(width, heads, window, shift, mlp_ratio) for shift in shifts))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.window or width % self.window or not height * width:
            raise BadInput(
                f"{width}x{height} latents do not divide into attention windows of {self.window}x{self.window}: "
                f"TIC takes pictures whose sides are multiples of {Tic.stride} pixels"
            )
        return x + self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SwinBlock(nn.Module):
    """A transformer block on windows (Liu et al., ICCV 2021, equation 3), (B, h, w, C) -> (B, h, w, C)."""

    def __init__(self, width: int, heads: int, window: int, shift: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, shift)
        self.norm2 = nn.LayerNorm(width)
        hidden = mlp_ratio * width
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WindowAttention(nn.Module):
    """Attention within windows, biased by relative position, (B, h, w, C) -> (B, h, w, C).

    Shifted windows are those of the picture rolled up and left by ``shift``. The last row and column of them then hold
    both edges of the picture, which are no neighbours and must not see each other; all other windows need no mask.
    """

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.shift = shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def bias(self) -> Tensor:
        """(heads, T, T), of the T = window^2 positions as queries and as keys."""
        y, x = _places(self.window, self.relative_position_bias_table.device)
        rows = (2 * self.window - 1) * _differences(y) + _differences(x)
        return self.relative_position_bias_table[rows].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias()
        if not self.shift:
            return self.proj(self._attend(self.qkv(x), bias))
        rolled = [places >= self.window - self.shift for places in _places(self.window, x.device)]
        apart_y, apart_x = (each[:, None] != each for each in rolled)  # (T, T), in the last row, in the last column
        height, width = x.shape[1:3]
        qkv = self.qkv(x.roll((-self.shift, -self.shift), (1, 2)))
        upper, lower = qkv.split([height - self.window, self.window], 1)
        bands = []
        for band, near in ((upper, bias), (lower, _hide(bias, apart_y))):
            inner, last = band.split([width - self.window, self.window], 2)
            bands.append(torch.cat([self._attend(inner, near), self._attend(last, _hide(near, apart_x))], 2))
        return self.proj(torch.cat(bands, 1)).roll((self.shift, self.shift), (1, 2))

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Attention in windows that need the same bias: (B, h, w, 3 C) and (heads, T, T) -> (B, h, w, C)."""
        side, heads, size = self.window, self.heads, qkv.shape[-1] // (3 * self.heads)
        batch, rows, columns = len(qkv), qkv.shape[1] // side, qkv.shape[2] // side
        tokens = qkv.reshape(batch, rows, side, columns, side, 3, heads, size).permute(5, 0, 1, 3, 6, 2, 4, 7)
        tokens = tokens.reshape(3, batch * rows * columns, heads, side * side, size)
        attended = scaled_dot_product_attention(tokens[0], tokens[1], tokens[2], bias[None])  # windows, heads, T, size
        attended = attended.reshape(batch, rows, columns, heads, side, side, size).permute(0, 1, 4, 2, 5, 3, 6)
        return attended.reshape(*qkv.shape[:3], heads * size)


def build(config: dict[str, Any]) -> Tic:
    """The codec of the given sizes, as an artefact's metadata holds them."""
    return Tic(
        TicConfig(config["N"], config["M"], tuple(config["depths"]), tuple(config["heads"]), config["mlp_ratio"])
    )


_PUBLISHED: list[Rule] = [(r"^([gh]_[as])(\d)\.(residual_group\.)?", r"\1.\2.")]


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names a state_dict of TransTIC's TIC_hp as ours."""
    return renamed(state, _PUBLISHED)


def _hide(bias: Tensor, apart: Tensor) -> Tensor:
    return bias.masked_fill(apart, -torch.inf)


@lru_cache(maxsize=32)
def _places(window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of a window's T positions, (T,) each."""
    with torch.inference_mode(False):  # kept, and training may be what asks next
        places = torch.arange(window * window, device=device)
        return places // window, places % window


def _differences(places: Tensor) -> Tensor:
    """(T,) places -> (T, T) of place of query - place of key, from 0."""
    differences = places[:, None] - places
    return differences - differences.min()


def _down(channels: int, out: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2)


def _up(channels: int, out: int, kernel: int = 3) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out, kernel, stride=2, padding=kernel // 2, output_padding=1)
