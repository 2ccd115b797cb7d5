"""TIC's entropy path in integers: from z's symbols to the mean and the scale of every symbol of y.

The same walk as tic.Tic.walk. Convolutions and linear layers are exact layers; what stands between them is here:

    residual stream   integers in one unit for all its channels, so that adding to it is adding integers
    LayerNorm         exact sums and an integer square root; its gain and bias are in the weights of the layer it feeds
    attention         powers of two by a table, exact sums of products, one rounded division at the end
    GELU              a ReLU less a bump, which is a table

Values are cut off alike on both sides, and the bounds that follow are the proof that nothing overflows. No mathematical
library has a part in it: tables are data of the artefact, and every operation is one of

    integers of up to 64 bits   sums, products, comparisons, shifts, floor division
    64-bit floats               matrix products of integers whose sums stay below 2^53, exact in whatever order they are
                                summed; and a square root, which integers then correct
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.codecs.exact import (
    LIMIT,
    ONE,
    PHASE_TAPS,
    Checked,
    ExactConv,
    as_input,
    deconv_phases,
    depth_to_space,
    finest_step,
    positions_of,
    quantise_to,
)
from shared.codecs.interface import SCALE_UNIT, EntropyPath, ExactCode, ExactPass, Ranges
from shared.codecs.tic import HYPER_WINDOW, SwinBlock, TicConfig, WindowAttention
from shared.errors import BadInput

POINT = ((0, 0),)
STREAM = 2**21 - 1  # where the residual stream is cut off
WIDEST = 512  # channels of it: so many of its squares sum to less than 2^52
LIFT = 6  # bits by which z's unit can be made finer and z still fits the stream
NORMED = 10  # fraction bits of a LayerNorm's output: the largest that 256 channels allow fits LIMIT
OCTAVE = 8  # fraction bits of attention scores, which are logarithms to base 2
HEAVIEST = 2**16  # weight of what has the largest score
UNSEEN = -(2**40)  # a score of which no weight is left
BUMP = 2**12  # entries of a GELU's table
TURN = 2**21  # scores; more windows are taken in turns

# How large the largest values usually are. What is 16 times as large is cut off in the stream, 8 times in what layers
# read, 4 times in a GELU.
USUAL_STREAM, USUAL, USUAL_HIDDEN = 2**17, 2**11, 2**12


class ExactTic(EntropyPath):
    """The integer form of h_s."""

    medians: Tensor  # (N,) int32
    lift: Tensor  # () int32, bits by which the first stream's unit is finer than 1 / ONE

    def __init__(self, config: TicConfig) -> None:
        super().__init__()
        N, self.M = config.N, config.M
        if N > WIDEST:
            raise BadInput(f"a TIC of {N} channels cannot be computed exactly: the limit is {WIDEST}")
        self.register_buffer("medians", torch.zeros(N, dtype=torch.int32))
        self.register_buffer("lift", torch.zeros((), dtype=torch.int32))

        def swin(k: int, shifted: bool) -> ExactGroup:
            return ExactGroup(N, config.depths[k], config.heads[k], HYPER_WINDOW, shifted, config.mlp_ratio)

        def up(out: int) -> ExactConv:
            return ExactConv(N, 4 * out, PHASE_TAPS[3], "signed", "full")

        self.swin0, self.up1 = swin(5, shifted=False), up(N)
        self.swin2, self.up3 = swin(4, shifted=True), up(2 * self.M)

    def check(self) -> None:
        """Raises BadInput where z could leave 32 bits or the stream."""
        if not 0 <= int(self.lift) <= LIFT or int(self.medians.long().abs().max()) > 2**30:
            raise BadInput("the medians or the unit of z are too large to be computed exactly")

    def walk(self, z: Tensor, code: ExactCode) -> Tensor:
        """Codes y in one pass: z's symbols (B, h/4, w/4, N) int32 -> y_hat (B, h w, M) int32 in units of 1 / ONE."""
        x = as_input(z * ONE + self.medians).int() << self.lift
        for swin, up in ((self.swin0, self.up1), (self.swin2, self.up3)):
            x = swin(x)
            x = cut_off(depth_to_space(up(narrowed(x, swin.narrow)), *x.shape[1:3]))
        mean, scale = x.flatten(1, 2).chunk(2, -1)
        at = positions_of(*x.shape[1:3], "all", z.device)
        return code(ExactPass(slice(0, self.M), at, mean, scale)) * ONE + mean

    def derive(self, network: Any, medians: Tensor, ranges: Ranges) -> None:
        """Sets the integers from a trained network; see interface.EntropyPath."""
        swin0, up1, swin2, up3 = network.h_s
        self.medians.copy_((medians * ONE).round())
        writers = self.swin0.derive(swin0, ranges)
        unit = _stream_unit(writers, ranges, [swin0, *swin0.blocks])
        unit = min(max(unit, 2**-LIFT / ONE), 1 / ONE)
        self.lift.fill_(round(math.log2(1 / ONE / unit)))
        given = self.swin0.settle(swin0, writers, unit, ranges)
        writers = [_deconvolution(self.up1, up1, given), *self.swin2.derive(swin2, ranges)]
        unit = _stream_unit(writers, ranges, [up1, swin2, *swin2.blocks])
        last = _deconvolution(self.up3, up3, self.swin2.settle(swin2, writers, unit, ranges))
        order = torch.arange(8 * self.M).view(4, 2, self.M).flip(1).flatten()  # in each phase mean, then scale
        units = torch.tensor([1 / ONE, SCALE_UNIT]).repeat_interleave(self.M).repeat(4)
        quantise_to(last.layer, last.weight[order], last.bias[order], last.given, units)
        for module in self.modules():
            if isinstance(module, Checked):
                module.check()


class Writer(NamedTuple):
    """A layer whose outputs are added to a residual stream: ``quantise_to``'s arguments before the stream's unit."""

    layer: ExactConv
    weight: Tensor  # (O, T, C)
    bias: Tensor  # (O,)
    given: float  # unit of its input: one for all channels, as weights have fewer bits to spare than what they multiply


class ExactGroup(nn.Module):
    """tic.SwinGroup on a residual stream, (B, h, w, C) int32 -> the same."""

    epsilon: Tensor  # () int32, LayerNorm's, in squares of the stream's unit
    narrow: Tensor  # () int32, bits of the stream that the convolution after the group does not read

    def __init__(self, width: int, depth: int, heads: int, window: int, shifted: bool, mlp_ratio: int) -> None:
        super().__init__()
        self.register_buffer("epsilon", torch.ones((), dtype=torch.int32))
        self.register_buffer("narrow", torch.zeros((), dtype=torch.int32))
        self.blocks = nn.ModuleList(
            ExactBlock(width, heads, window, window // 2 if shifted and i % 2 else 0, mlp_ratio) for i in range(depth)
        )

    def check(self) -> None:
        """Raises BadInput where a LayerNorm could divide by zero, or a shift is none."""
        if int(self.epsilon) < 1 or not 0 <= int(self.narrow) <= 20:
            raise BadInput("a residual stream's units are such that it cannot be computed exactly")

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for block in self.blocks:
            out = block(out, self.epsilon)
        return cut_off(x + out)

    def derive(self, trained: Any, ranges: Ranges) -> list[Writer]:
        """Sets all but what depends on the stream's unit."""
        pairs: Iterable[tuple[Any, Any]] = zip(self.blocks, trained.blocks, strict=True)
        return [writer for exact, block in pairs for writer in exact.derive(block, ranges)]

    def settle(self, trained: Any, writers: Iterable[Writer], unit: float, ranges: Ranges) -> float:
        """Sets what depends on the stream's unit; gives that of what the convolution after the group reads."""
        self.epsilon.fill_(max(1, round(float(trained.blocks[0].norm1.eps) / unit**2)))
        for writer in writers:
            quantise_to(*writer, torch.full((len(writer.bias),), unit))
        given = _power_of_two(max(unit, _reached(trained, ranges) / USUAL))
        self.narrow.fill_(round(math.log2(given / unit)))
        return given


class ExactBlock(nn.Module):
    """tic.SwinBlock on a residual stream, (B, h, w, C) int32 -> the same."""

    def __init__(self, width: int, heads: int, window: int, shift: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attn = ExactAttention(width, heads, window, shift)
        self.mlp = ExactPerceptron(width, mlp_ratio * width)

    def forward(self, x: Tensor, epsilon: Tensor) -> Tensor:
        for part in (self.attn, self.mlp):
            x = cut_off(x + cut_off(part(normalised(x, epsilon))))
        return x

    def derive(self, trained: SwinBlock, ranges: Ranges) -> tuple[Writer, Writer]:
        """Sets all but what writes into the stream."""
        attn = self.attn.derive(trained.attn, trained.norm1, ranges)
        return attn, self.mlp.derive(trained.mlp, trained.norm2, ranges)


class ExactAttention(nn.Module):
    """tic.WindowAttention on integers, (B, h, w, C) int16 in units of 2^-NORMED -> int32 in the stream's unit."""

    bias: Tensor  # (heads, T, T) int32, of each query and key
    shift: Tensor  # () int32, from products and bias to scores; all are rounded down, and a softmax does not notice
    powers: Tensor  # (2^OCTAVE,) int32, HEAVIEST * 2^(-i / 2^OCTAVE)

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.moved = heads, window, shift
        self.qkv = ExactConv(width, 3 * width, POINT, "signed", "signed")
        self.proj = ExactConv(width, width, POINT, "signed", "full")
        self.register_buffer("bias", torch.zeros(heads, window**2, window**2, dtype=torch.int32))
        self.register_buffer("shift", torch.zeros((), dtype=torch.int32))
        self.register_buffer("powers", torch.ones(2**OCTAVE, dtype=torch.int32))

    def check(self) -> None:
        """Raises BadInput where a sum could leave 53 bits, or weights sum to nothing."""
        least, most = int(self.powers.min()), int(self.powers.max())
        if not 0 <= int(self.shift) <= 30 or least < 0 or most > HEAVIEST or int(self.powers[0]) < 1:
            raise BadInput("an attention's table or its shift is not such that it can be computed exactly")

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width = x.shape[:3]
        if self.moved:
            x = x.roll((-self.moved, -self.moved), (1, 2))
        qkv = windows(self.qkv.pointwise(x.flatten(1, 2)).unflatten(1, (height, width)), self.window)
        tokens = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3, windows, heads, T, size
        apart = self._apart(height, width, x.device).repeat(batch, 1, 1)[:, None]
        many = max(1, TURN // self.bias.numel())
        turns = zip(*(part.split(many) for part in (*tokens, apart)), strict=True)
        attended = torch.cat([self._attend(*turn) for turn in turns]).transpose(1, 2).flatten(2)  # windows, T, C
        out = self.proj.pointwise(joined(attended, height, width).flatten(1, 2)).unflatten(1, (height, width))
        return out.roll((self.moved, self.moved), (1, 2)) if self.moved else out

    def derive(self, trained: WindowAttention, norm: nn.LayerNorm, ranges: Ranges) -> Writer:
        """Sets all but the projection. Queries take in the softmax's scale and its change of base."""
        C = norm.weight.numel()
        query_scale = (C // self.heads) ** -0.5 / math.log(2)
        scale = torch.tensor([query_scale, 1, 1], dtype=torch.float64).repeat_interleave(C)
        weight, bias = _after(norm, trained.qkv)
        weight, bias = weight * scale[:, None, None], bias * scale
        reached = torch.stack(ranges(trained.qkv)).abs().amax(0) * scale
        needed = torch.maximum(reached / USUAL, finest_step(weight * 2.0**-NORMED, bias)).view(3, C).amax(1)
        query, key, value = map(_power_of_two, needed.tolist())
        position = trained.bias() / math.log(2)
        # Products are shifted to scores by 0 to 30 bits, and 32 hold the bias.
        least = _power_of_two(max(float(position.abs().max()) / 2**28, 2.0 ** -(OCTAVE + 30)))
        query = min(max(query, least / key), 2.0**-OCTAVE / key)
        units = torch.tensor([query, key, value], dtype=torch.float64)
        quantise_to(self.qkv, weight, bias, 2.0**-NORMED, units.repeat_interleave(C))
        self.shift.fill_(round(-OCTAVE - math.log2(query * key)))
        self.bias.copy_((position / (query * key)).round())
        self.powers.copy_((HEAVIEST * 2.0 ** (-torch.arange(2**OCTAVE).double() / 2**OCTAVE)).round())
        return Writer(self.proj, trained.proj.weight[:, None], trained.proj.bias, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, apart: Tensor) -> Tensor:
        """(windows, heads, T, size) int16 each, (windows, 1, T, T) of booleans -> (windows, heads, T, size) int16."""
        # Below 2^53: at most 512 channels of 2^14 * 2^14.
        products = (query.double() @ key.double().transpose(-2, -1)).long()
        scores = ((products + self.bias) >> self.shift).masked_fill(apart, UNSEEN)
        behind = scores.amax(-1, keepdim=True) - scores
        weights = self.powers[behind & (2**OCTAVE - 1)] >> (behind >> OCTAVE).clamp(max=31)
        # Below 2^53: T times 2^16 * 2^14. A weighted mean is no larger than the largest value, so 16 bits hold it.
        sums = (weights.double() @ value.double()).long()
        return divided(sums, weights.sum(-1, keepdim=True)).to(torch.int16)

    def _apart(self, height: int, width: int, device: torch.device) -> Tensor:
        """(windows, T, T): which positions are neighbours only because the picture was rolled."""
        rows, columns = (torch.arange(side, device=device) >= side - self.moved for side in (height, width))
        part = windows((2 * rows[:, None] + columns)[None, ..., None], self.window)  # windows, T, 1
        return part != part.transpose(1, 2)


class ExactPerceptron(nn.Module):
    """The perceptron of a tic.SwinBlock, (B, h, w, C) int16 in units of 2^-NORMED -> int32 in the stream's unit."""

    bump: Tensor  # (BUMP,) int32, ReLU(x) - GELU(x) where x is i or -i

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ExactConv(width, hidden, POINT, "signed", "signed")
        self.fc2 = ExactConv(hidden, width, POINT, "signed", "full")
        self.register_buffer("bump", torch.zeros(BUMP, dtype=torch.int32))

    def check(self) -> None:
        """Raises BadInput where a GELU could leave what layers read."""
        if int(self.bump.min()) < 0 or int(self.bump.max()) > LIMIT:
            raise BadInput("a GELU's table has entries that are too large to be computed exactly")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2.pointwise(gelu(self.fc1.pointwise(x.flatten(1, 2)), self.bump)).unflatten(1, x.shape[1:3])

    def derive(self, trained: Any, norm: nn.LayerNorm, ranges: Ranges) -> Writer:
        """Sets all but the second layer."""
        fc1, _, fc2 = trained
        weight, bias = _after(norm, fc1)
        finest = float(finest_step(weight * 2.0**-NORMED, bias).max())
        # With a unit finer than 2^-10, the table would end before a GELU is a ReLU.
        unit = _power_of_two(max(float(ranges(fc1)[1].max()) / USUAL_HIDDEN, finest, 2.0**-10))
        quantise_to(self.fc1, weight, bias, 2.0**-NORMED, torch.full(bias.shape, unit))
        size = torch.arange(BUMP).double() * unit
        self.bump.copy_((size * torch.special.ndtr(-size) / unit).round())
        return Writer(self.fc2, fc2.weight[:, None], fc2.bias, unit)


def cut_off(x: Tensor) -> Tensor:
    """int32 -> what the residual stream holds: sums of two are far from 32 bits."""
    return x.clamp(-STREAM, STREAM)


def narrowed(x: Tensor, bits: Tensor) -> Tensor:
    """A residual stream as convolutions read it, in a unit 2^bits times as large, rounded to nearest: int16."""
    return as_input((x + (1 << bits >> 1)) >> bits)


def normalised(x: Tensor, epsilon: Tensor) -> Tensor:
    """LayerNorm over the last dimension, without gain and bias: a residual stream -> int16 in units of 2^-NORMED.

    The deviation d of each channel times 2^NORMED over the root of their mean square, in integers: with C channels and
    4 more bits to either root, (d * root(2^28 C)) / root(2^8 sum(d^2 + epsilon)).
    """
    channels = x.shape[-1]
    x = x.long()
    deviation = x - divided(x.sum(-1, keepdim=True), torch.tensor(channels, device=x.device))
    # Below 2^52: the mean's rounding adds less than 1 / 4 to squares that without it sum to C STREAM^2 at most.
    power = (deviation * deviation + epsilon).sum(-1, keepdim=True)
    return as_input(divided(deviation * math.isqrt(channels << 2 * NORMED + 8), square_root(power << 8)))


def square_root(x: Tensor) -> Tensor:
    """The integer part of the square root of int64 below 2^60.

    In floating point it is within 1 of that on any machine: x was rounded to 53 bits, which moves the root by less than
    2^-22, and IEEE 754's square root is rounded correctly. Which of the candidates it is, integers decide.
    """
    root = x.double().sqrt().long()
    root = root - (root * root > x).long()
    return root + ((root + 1) * (root + 1) <= x)


def divided(x: Tensor, by: Tensor) -> Tensor:
    """int64 / positive int64 to the nearest integer, halves upwards. Twice either fits 64 bits."""
    return torch.div(2 * x + by, 2 * by, rounding_mode="floor")


def gelu(x: Tensor, bump: Tensor) -> Tensor:
    """int16 -> int16 in the same unit, the one that the table (n,) was made for."""
    x = x.int()
    return (x.clamp(min=0) - bump[x.abs().clamp(max=len(bump) - 1)]).to(torch.int16)


def windows(x: Tensor, side: int) -> Tensor:
    """(B, h, w, C) -> (B h w / side^2, side^2, C), all in raster order."""
    return x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def joined(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``windows``."""
    side = math.isqrt(x.shape[1])
    x = x.view(-1, height // side, width // side, side, side, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


# --- Making it from a trained network --------------------------------------------------------------------------------


def _after(norm: nn.LayerNorm, linear: Any) -> tuple[Tensor, Tensor]:
    """A linear layer that takes in its LayerNorm's gain and bias: weight (O, 1, C) and bias (O,)."""
    return (linear.weight * norm.weight)[:, None], linear.bias + linear.weight @ norm.bias


def _deconvolution(layer: ExactConv, trained: Any, given: float) -> Writer:
    return Writer(layer, deconv_phases(trained.weight), trained.bias.repeat(4), given)


def _stream_unit(writers: Iterable[Writer], ranges: Ranges, along: Iterable[nn.Module]) -> float:
    """What one is worth in a residual stream that these layers write, and whose values these modules give."""
    reached = max(_reached(module, ranges) for module in along)
    finest = max(float(finest_step(weight * given, bias).max()) for _, weight, bias, given in writers)
    return _power_of_two(max(reached / USUAL_STREAM, finest, 2.0**-20))


def _reached(module: nn.Module, ranges: Ranges) -> float:
    """The largest magnitude of a module's outputs."""
    return float(torch.stack(ranges(module)).abs().max())


def _power_of_two(size: float) -> float:
    """The least that is not smaller."""
    mantissa, exponent = math.frexp(size)
    return math.ldexp(1, exponent - (mantissa == 0.5))
