"""ELIC's entropy path in integers: from z's symbols to the mean and the scale of every symbol of y.

The same walk as elic.Elic.walk, over exact layers, computed only at the positions that a pass codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.codecs.elic import Elic, ElicConfig
from shared.codecs.exact import (
    ANCHOR_TAPS,
    ONE,
    ExactConv,
    Positions,
    anchor_taps,
    as_input,
    conv_taps,
    deconv_phases,
    depth_to_space,
    latent_units,
    positions_of,
    quantise,
    quantise_to,
    square,
)
from shared.codecs.interface import SCALE_UNIT, EntropyPath, ExactCode, ExactPass, Ranges

POINT = ((0, 0),)
HALVES: tuple[Positions, Positions] = ("anchors", "rest")


class ExactElic(EntropyPath):
    """The integer form of h_s, g_ch, g_sp and the parameter aggregation of an ELIC."""

    h_s: Any  # ModuleLists of ExactConvs, or of lists of them
    channel_context: Any
    spatial_context: Any
    aggregation: Any

    def __init__(self, config: ElicConfig) -> None:
        super().__init__()
        self.config = config
        N, groups = config.N, config.groups
        self.register_buffer("medians", torch.zeros(N, dtype=torch.int32))
        self.h_s = nn.ModuleList(
            (
                ExactConv(N, 4 * N, square(3), "signed", "unsigned"),
                ExactConv(N, 4 * (N * 3 // 2), square(3), "unsigned", "unsigned"),
                ExactConv(N * 3 // 2, config.psi, square(3), "unsigned", "signed"),
            )
        )
        self.channel_context = nn.ModuleList(
            nn.ModuleList(
                (
                    ExactConv(sum(groups[i] for i in config.seen(k)), 224, square(5), "signed", "unsigned"),
                    ExactConv(224, 128, square(5), "unsigned", "unsigned"),
                    ExactConv(128, 2 * groups[k], square(5), "unsigned", "signed"),
                )
            )
            for k in range(1, len(groups))
        )
        self.spatial_context = nn.ModuleList(
            ExactConv(size, 2 * size, ANCHOR_TAPS, "signed", "signed") for size in groups
        )
        self.aggregation = nn.ModuleList(
            nn.ModuleList(
                (
                    ExactConv(widths[0], widths[1], POINT, "signed", "unsigned"),
                    ExactConv(widths[1], widths[2], POINT, "unsigned", "unsigned"),
                    ExactConv(widths[2], widths[3], POINT, "unsigned", "full"),
                )
            )
            for widths in map(config.aggregation, range(len(groups)))
        )

    def walk(self, z: Tensor, code: ExactCode) -> Tensor:
        """Codes y in ten passes: z's symbols (B, h/4, w/4, N) int32 -> y_hat (B, h w, M) int32 in units of 1 / ONE."""
        x = as_input(z * ONE + self.medians)
        for layer in self.h_s[:2]:
            x = depth_to_space(layer(x), *x.shape[1:3])
        batch, height, width = x.shape[:3]
        psi = self.h_s[2](x)  # (B, h w, C)
        y_hat = torch.zeros(batch, height * width, self.config.M, dtype=torch.int32, device=z.device)
        for k, size in enumerate(self.config.groups):
            channels = self._channels(k)
            sides = [psi]
            if k:
                x = as_input(torch.cat([y_hat[..., self._channels(i)] for i in self.config.seen(k)], -1))
                for layer in self.channel_context[k - 1]:
                    x = layer(x.unflatten(1, (height, width)))
                sides = [x, psi]
            for half in HALVES:
                at = positions_of(height, width, half, z.device)
                given = [side.index_select(1, at) for side in sides]
                absent = 2 * size  # no context yet
                if half == "rest":
                    anchors = as_input(y_hat[..., channels]).unflatten(1, (height, width))
                    given.insert(0, self.spatial_context[k](anchors, half))
                    absent = 0
                first, second, last = self.aggregation[k]
                x = torch.cat(given, -1)
                del given
                x = last.pointwise(second.pointwise(first.pointwise(x, absent)))
                mean, scale = x.split(size, -1)
                symbols = code(ExactPass(channels, at, mean, scale))
                y_hat[:, at, channels] = symbols * ONE + mean
        return y_hat

    def derive(self, network: Elic, medians: Tensor, ranges: Ranges) -> None:
        """Sets the integers from a trained network; see interface.EntropyPath."""
        config = self.config
        self.medians.copy_((medians * ONE).round())
        given = latent_units(config.N)
        for exact, trained in zip(self.h_s[:2], (network.h_s[0], network.h_s[2]), strict=True):
            least, most = (bound.repeat(4) for bound in ranges(trained))
            weight, bias = deconv_phases(trained.weight), trained.bias.repeat(4)
            given = quantise(exact, weight, bias, given, (least, most), tied=4)[: trained.out_channels]
        last = network.h_s[4]
        weight = last.weight if config.layout == "chandelier" else last.weight.transpose(0, 1).flip(2, 3)
        psi = quantise(self.h_s[2], conv_taps(weight), last.bias, given, ranges(last))
        for k, size in enumerate(config.groups):
            given = latent_units(size)
            trained = network.spatial_context[k]
            exact = self.spatial_context[k]
            units = [quantise(exact, anchor_taps(trained.weight), trained.bias, given, ranges(trained))]
            if k:
                given = latent_units(sum(config.groups[i] for i in config.seen(k)))
                for exact, trained in zip(
                    self.channel_context[k - 1], network.channel_context[k - 1][::2], strict=True
                ):
                    given = quantise(exact, conv_taps(trained.weight), trained.bias, given, ranges(trained))
                units.append(given)
            given = torch.cat([*units, psi])
            first, second, last = network.aggregation[k][::2]
            for exact, trained in zip(self.aggregation[k], (first, second), strict=False):
                given = quantise(exact, conv_taps(trained.weight), trained.bias, given, ranges(trained))
            order = [0, 1] if config.layout == "chandelier" else [1, 0]  # always mean, then scale
            weight = last.weight.unflatten(0, (2, size))[order].flatten(0, 1)
            bias = last.bias.unflatten(0, (2, size))[order].flatten()
            unit = torch.tensor([1 / ONE, SCALE_UNIT]).repeat_interleave(size)
            quantise_to(self.aggregation[k][2], conv_taps(weight), bias, given, unit)

    def _channels(self, k: int) -> slice:
        start = sum(self.config.groups[:k])
        return slice(start, start + self.config.groups[k])
