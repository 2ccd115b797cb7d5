"""Convolutions in integer arithmetic: the same integers on every machine, whatever it computes with.

A learned codec's two sides must agree on every probability table. Floating-point networks do not: another number of
threads, another library, another device, and sums are rounded in another order. So what tables depend on is computed
in integers, and the integers are the specification (docs/bitstream.md):

    accumulator = sum over taps and channels of x * weight      x of 15 bits with its sign, weights of 8
    y = clamp((accumulator + bias) >> shift)                    bias of 32 bits, a shift for each output channel

Units are chosen so that hardly any x needs more than 8 bits; products are of 8-bit digits, and the high digits only
where there are any. How an accumulator is computed is a kernel's business, and there are several. Each is exact by
construction, proves itself on this machine before it is used, and the fastest that holds is taken:

    int8      8-bit products, 32-bit sums, where PyTorch has such a matrix product
    float32   integers held in floats: exact while no partial sum reaches 2^24, so inputs are split until none can
    float64   likewise below 2^53, which nothing here comes near

Tensors are channels-last, (B, h, w, C), so that a position is a row and a convolution a matrix product over patches.
"""

from __future__ import annotations

import time
from functools import cache, lru_cache
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from shared.errors import BadInput

FRACTION = 7
ONE = 1 << FRACTION  # latents and their means are integers in units of 1 / ONE
LIMIT = 2**14 - 1  # of what enters a layer; latents are cut off here at 128 quantisation steps
_LARGEST = LIMIT + 512  # no sum of digits is as large as if every input were this
PATCH_ELEMENTS = 2**20  # of one matrix of patches; more positions are taken in turns

Taps = tuple[tuple[int, int], ...]
Positions = Literal["all", "anchors", "rest"]
Range = Literal["unsigned", "signed", "full"]
_RANGES: dict[Range, tuple[int, int, torch.dtype]] = {
    "unsigned": (0, LIMIT, torch.int16),  # after a ReLU
    "signed": (-LIMIT, LIMIT, torch.int16),
    "full": (-(2**31), 2**31 - 1, torch.int32),
}
_USUAL: dict[Range, int] = {"unsigned": 255, "signed": 127}  # what fits one digit


class Kernel(Protocol):
    """A way to multiply a matrix of 8-bit integers with weights, exactly."""

    name: str

    def prepare(self, weight: Tensor) -> list[Tensor]:
        """(K, O) int8 -> whatever ``multiply`` wants of it."""
        ...

    def multiply(self, x: Tensor, prepared: list[Tensor]) -> Tensor:
        """(R, K) int8 or uint8 -> (R, O) int32."""
        ...


class Int8:
    """PyTorch's 8-bit matrix product with 32-bit sums."""

    name = "int8"

    def prepare(self, weight: Tensor) -> list[Tensor]:
        return [weight.contiguous()]

    def multiply(self, x: Tensor, prepared: list[Tensor]) -> Tensor:
        return torch._int_mm(x, prepared[0])


class Float32:
    """Single precision, the inputs in as many parts as keep every partial sum below 2^24."""

    name = "float32"

    def prepare(self, weight: Tensor) -> list[Tensor]:
        size = weight.abs().int()
        parts = 1
        while max(255 * int(part.sum(0).max()) for part in size.tensor_split(parts)) >= 2**24:
            parts += 1
        return [part.float() for part in weight.tensor_split(parts)]

    def multiply(self, x: Tensor, prepared: list[Tensor]) -> Tensor:
        sums: Tensor | None = None
        first = 0
        for part in prepared:
            partial = (x[:, first : first + len(part)].float() @ part).int()
            sums = partial if sums is None else sums.add_(partial)
            first += len(part)
        assert sums is not None
        return sums


class Float64:
    """Double precision: slow, and exact anywhere."""

    name = "float64"

    def prepare(self, weight: Tensor) -> list[Tensor]:
        return [weight.double()]

    def multiply(self, x: Tensor, prepared: list[Tensor]) -> Tensor:
        return (x.double() @ prepared[0]).int()


KERNELS: tuple[Kernel, ...] = (Int8(), Float32(), Float64())


def proves_itself(kernel: Kernel, device: torch.device) -> bool:
    """Whether a kernel gives the right integers on this machine, on vectors made to overflow what is not exact."""
    source = torch.Generator().manual_seed(1)
    for rows, depth, out in ((64, 1408, 96), (17, 5600, 40), (1, 320, 8)):
        x = torch.randint(0, 256, (rows, depth), generator=source, dtype=torch.uint8)
        weight = torch.randint(-127, 128, (depth, out), generator=source, dtype=torch.int8)
        x[0], weight[:, 0], weight[:, 1] = 255, 127, -127  # the largest sums that there can be
        weight[::2, 2], weight[1::2, 2] = 127, -127  # sums that cancel: pairs saturate where pairs are added in 16 bits
        for given in (x, (x ^ 128).view(torch.int8)):
            wanted = (given.long()[:, :, None] * weight.long()[None]).sum(1) if rows == 1 else _reference(given, weight)
            try:
                sums = kernel.multiply(given.to(device), kernel.prepare(weight.to(device)))
            except RuntimeError:  # no such product on this device
                return False
            if not torch.equal(sums.cpu().long(), wanted):
                return False
    return True


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    """The product in 64-bit integers, which PyTorch computes without any library."""
    return x.long() @ weight.long()


@cache
def best_kernel(device: torch.device) -> Kernel:
    """The fastest kernel that proves itself on this device."""
    x = torch.full((512, 1024), 255, dtype=torch.uint8, device=device)
    weight = torch.full((1024, 256), -127, dtype=torch.int8, device=device)

    def duration(kernel: Kernel) -> float:
        prepared = kernel.prepare(weight)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            kernel.multiply(x, prepared)[0, 0].item()
            times.append(time.perf_counter() - start)
        return min(times)

    return min((kernel for kernel in KERNELS if proves_itself(kernel, device)), key=duration)


@runtime_checkable
class Checked(Protocol):
    """A module whose integers may turn out to be too large."""

    def check(self) -> None:
        """Raises BadInput where something could not be computed exactly, from its buffers as they are."""
        ...


class ExactConv(nn.Module):
    """A convolution of stride 1 over integers.

    Args:
        channels, out: C and O.
        taps: the offsets (row, column) that it reads, in the order of its weights.
        given: range of its input, ``unsigned`` or ``signed``.
        range: of its output; ``unsigned`` is a ReLU.
    """

    weight: Tensor  # (T C, O) int8, tap by tap
    bias: Tensor  # (O,) int32, half a step included, so that the shift rounds to nearest
    shift: Tensor  # (O,) int32

    def __init__(self, channels: int, out: int, taps: Taps, given: Range, range: Range) -> None:
        super().__init__()
        self.taps, self.given, self.range = taps, given, range
        self.register_buffer("weight", torch.zeros(len(taps) * channels, out, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(out, dtype=torch.int32))
        self.register_buffer("shift", torch.zeros(out, dtype=torch.int32))
        self._kernel: Kernel = KERNELS[-1]
        self._prepared: dict[int, list[Tensor]] = {}

    def use(self, kernel: Kernel) -> None:
        """Computes with ``kernel`` from now on."""
        self._kernel, self._prepared = kernel, {}

    def check(self) -> None:
        """Raises BadInput where a sum could leave 32 bits, from the weights as they are."""
        bound = _LARGEST * self.weight.long().abs().sum(0) + self.bias.long().abs()
        if int(bound.max()) >= 2**31 or int(self.shift.min()) < 0 or int(self.shift.max()) > 30:
            raise BadInput("a layer's weights are too large to be computed exactly in 32 bits")

    def forward(self, x: Tensor, positions: Positions = "all") -> Tensor:
        """(B, h, w, C) -> (B, n, O), n the positions asked for, in raster order."""
        height, width, channels = x.shape[1:]
        reach = max(max(abs(row), abs(column)) for row, column in self.taps)
        low, high = (pad(digit, (0, 0, reach, reach, reach, reach)).flatten(1, 2) for digit in self._digits(x))
        index = _tap_index(height, width, reach, self.taps, positions, x.device)
        chunks = index.split(max(1, PATCH_ELEMENTS // (len(self.taps) * channels)))
        photos = zip(low, high, _busy(high), strict=True)
        rows = [self._finish(self._sums(*photo, chunk)) for photo in photos for chunk in chunks]
        return torch.cat(rows).unflatten(0, (len(x), -1))

    def pointwise(self, x: Tensor, absent: int = 0) -> Tensor:
        """(B, n, C - absent) -> (B, n, O) for a convolution of one tap, its first ``absent`` input channels zero."""
        rows = []
        for part in x.flatten(0, 1).split(max(1, PATCH_ELEMENTS // x.shape[2])):
            low, high = self._digits(part)
            rows.append(self._finish(self._sums(low, high, _busy(high), None, absent)))
        return torch.cat(rows).unflatten(0, x.shape[:2])

    def _digits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integers as 256 * high + low; the high one is zero for what is usual."""
        if self.given == "unsigned":
            return x.to(torch.uint8), (x >> 8).to(torch.int8)
        return x.to(torch.int8), ((x + 128) >> 8).to(torch.int8)

    def _sums(self, low: Tensor, high: Tensor, busy: Tensor, index: Tensor | None, absent: int = 0) -> Tensor:
        """Accumulators (n, O) int32 of the rows (N, C), or of patches of them by an index (n, T)."""
        if absent not in self._prepared:
            self._prepared[absent] = self._kernel.prepare(self.weight[absent:])
        prepared = self._prepared[absent]
        if index is None:
            sums = self._kernel.multiply(low, prepared)
        else:
            sums = self._kernel.multiply(low.index_select(0, index.flatten()).view(len(index), -1), prepared)
            busy = busy[index].any(1)
        self._add_high(sums, high, busy, index, prepared)
        return sums

    # Where a size depends on data, torch.compile of PyTorch 2.14 gets sums wrong: benchmarks/exactness.py found it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _add_high(self, sums: Tensor, high: Tensor, busy: Tensor, index: Tensor | None, prepared: list[Tensor]) -> None:
        """Adds what the high digits contribute to the rows that have any."""
        rows = busy.nonzero().flatten()
        if len(rows):
            more = high[rows] if index is None else high.index_select(0, index[rows].flatten()).view(len(rows), -1)
            sums.index_add_(0, rows, self._kernel.multiply(more, prepared), alpha=256)

    def _finish(self, sums: Tensor) -> Tensor:
        low, high, dtype = _RANGES[self.range]
        scaled = sums.add_(self.bias).bitwise_right_shift_(self.shift)
        return scaled if self.range == "full" else scaled.clamp_(low, high).to(dtype)


def _busy(high: Tensor) -> Tensor:
    """(..., C) -> (...): which rows have a high digit at all."""
    return high.abs().sum(-1, dtype=torch.int32) != 0  # three times as fast as ``any``


def square(side: int) -> Taps:
    """The taps of a ``side`` x ``side`` convolution in raster order."""
    reach = side // 2
    return tuple((row, column) for row in range(-reach, reach + 1) for column in range(-reach, reach + 1))


PHASE_TAPS: dict[int, Taps] = {3: tuple((row, column) for row in (0, 1) for column in (0, 1)), 5: square(3)}
"""What a transposed convolution of stride 2 reads for a position's four phases, by the side of its kernel."""

ANCHOR_TAPS = tuple((row, column) for row, column in square(5) if (row + column) % 2)


def depth_to_space(x: Tensor, height: int, width: int) -> Tensor:
    """(B, h w, 4 O), the four phases of a doubled picture one after the other -> (B, 2 h, 2 w, O)."""
    x = x.view(len(x), height, width, 2, 2, -1).transpose(2, 3)
    return x.reshape(len(x), 2 * height, 2 * width, -1)


def as_input(latents: Tensor) -> Tensor:
    """Latents in units of 1 / ONE, int32 -> what layers read, int16."""
    return latents.clamp(-LIMIT, LIMIT).to(torch.int16)


@lru_cache(maxsize=32)
def positions_of(height: int, width: int, which: Positions, device: torch.device) -> Tensor:
    """(n,) flat positions of a picture, in raster order; anchors are those of even row + column."""
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    parity = (rows + columns).flatten() % 2
    keep = torch.ones_like(parity, dtype=torch.bool) if which == "all" else parity == (which == "rest")
    return keep.nonzero().flatten()


@lru_cache(maxsize=32)
def _tap_index(height: int, width: int, reach: int, taps: Taps, which: Positions, device: torch.device) -> Tensor:
    """(n, T): where each position's taps lie in the padded picture."""
    at = positions_of(height, width, which, device)
    padded = width + 2 * reach
    centre = (at // width + reach) * padded + at % width + reach
    offsets = torch.tensor([row * padded + column for row, column in taps], device=device)
    return (centre[:, None] + offsets).int()


# --- Making exact layers from trained ones ---------------------------------------------------------------------------


def latent_units(channels: int) -> Tensor:
    """(C,) what an integer latent is worth."""
    return torch.full((channels,), 1 / ONE, dtype=torch.float64)


def quantise(
    layer: ExactConv, weight: Tensor, bias: Tensor, given: Tensor, reached: tuple[Tensor, Tensor], tied: int = 1
) -> Tensor:
    """Sets an exact layer from a trained one's weights; its outputs' units are such that ``reached`` fits a digit.

    An integer is worth its channel's unit: value = integer * unit. Weights are rounded to 8 bits, an output channel at
    a time; the units of inputs and outputs are absorbed by them, so that between layers nothing is ever multiplied: an
    accumulator is shifted, and that is all.

    Args:
        weight: (O, T, C).
        bias: (O,).
        given: (C,) units of the input.
        reached: (O,) each, the least and the largest output to be expected. LIMIT cuts off what is 60 times larger.
        tied: so many runs of outputs share their units, channel by channel (the phases of a deconvolution).

    Returns:
        (O,) units of the output.
    """
    scaled = weight.double() * given  # (O, T, C)
    least, most = (bound.double() for bound in reached)
    # A ReLU that no drawn picture opened may open for a photo.
    size = torch.maximum(most, (most - least) / 8) if layer.range == "unsigned" else torch.maximum(most, -least)
    size, finest = (each.view(tied, -1).amax(0).repeat(tied) for each in (size, finest_step(scaled, bias)))
    unit = torch.maximum(size / _USUAL[layer.range], finest)
    shift = (unit / finest).log2().floor().clamp(max=24)
    _fill(layer, scaled, bias, unit * 2**-shift, shift)
    return unit


def quantise_to(layer: ExactConv, weight: Tensor, bias: Tensor, given: Tensor | float, unit: Tensor) -> None:
    """Like ``quantise``, with the outputs' units given: (O,)."""
    scaled = weight.double() * given
    shift = (unit.double() / finest_step(scaled, bias)).log2().floor().clamp(max=24)
    if shift.min() < 0:
        raise BadInput("an entropy layer's weights are too large for 8 bits")
    _fill(layer, scaled, bias, unit.double() * 2**-shift, shift)


def finest_step(scaled: Tensor, bias: Tensor) -> Tensor:
    """(O,) the finest step that 8 bits of weight, 28 of bias and 31 of sums allow; weights (O, T, C)."""
    size = scaled.abs().flatten(1)
    bounds = (size.amax(1) / 127, bias.double().abs() / 2**28, size.sum(1) * _LARGEST / 2**30)
    return torch.stack(bounds).amax(0).clamp(min=1e-30)


def _fill(layer: ExactConv, scaled: Tensor, bias: Tensor, step: Tensor, shift: Tensor) -> None:
    out = len(step)
    rounded = (scaled / step[:, None, None]).round().clamp(-127, 127)
    half = torch.where(shift > 0, 2 ** (shift - 1), torch.zeros_like(shift))
    layer.weight.copy_(rounded.reshape(out, -1).T)
    layer.bias.copy_((bias.double() / step).round() + half)
    layer.shift.copy_(shift)
    layer.check()


def conv_taps(weight: Tensor) -> Tensor:
    """A convolution's weight (O, C, k, k) -> (O, T, C), taps in raster order."""
    return weight.permute(0, 2, 3, 1).flatten(1, 2)


def anchor_taps(weight: Tensor) -> Tensor:
    """Of a 5x5 convolution that sees anchors only: (O, C, 5, 5) -> (O, 12, C) in the order of ANCHOR_TAPS."""
    return torch.stack([weight[:, :, row + 2, column + 2] for row, column in ANCHOR_TAPS], 1)


def deconv_phases(weight: Tensor) -> Tensor:
    """A transposed convolution of stride 2 as a convolution to its four phases: (C, O, k, k) -> (4 O, T, C), k 3 or 5.

    Output row 2 i + a reads input row i + d through the kernel's row a + k // 2 - 2 d, if it has it; columns likewise.
    """
    channels, out, kernel = weight.shape[:3]
    taps = PHASE_TAPS[kernel]
    phases = weight.new_zeros(2, 2, out, len(taps), channels)
    for a in range(2):
        for b in range(2):
            for tap, (row, column) in enumerate(taps):
                r, c = a + kernel // 2 - 2 * row, b + kernel // 2 - 2 * column
                if 0 <= r < kernel and 0 <= c < kernel:
                    phases[a, b, :, tap] = weight[:, :, r, c].T
    return phases.flatten(0, 2)
