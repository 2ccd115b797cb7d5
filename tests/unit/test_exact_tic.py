"""TIC's entropy path in integers: the same on every machine, near the network's, and out of range nowhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from slow_decoder import Artefact, decode, tic_parameters
from torch import Tensor, nn

from shared.bitstream import Bitstream
from shared.codecs.artefact import read_artefact, write_artefact
from shared.codecs.codec import Codec
from shared.codecs.entropy import LARGEST_SYMBOL
from shared.codecs.exact import KERNELS, LIMIT, ONE, ExactConv, Kernel, deconv_phases, depth_to_space
from shared.codecs.exact_tic import (
    LIFT,
    NORMED,
    OCTAVE,
    STREAM,
    ExactAttention,
    ExactGroup,
    ExactPerceptron,
    ExactTic,
    divided,
    gelu,
    normalised,
    square_root,
)
from shared.codecs.interface import SCALE_UNIT, ExactPass
from shared.codecs.ranges import measured_ranges
from shared.codecs.tic import Tic, TicConfig
from shared.errors import BadInput
from shared.images import Photo
from shared.weights.digest import load_tensors, read_metadata, save_tensors

TINY = TicConfig(N=8, M=16, depths=(1, 1, 1, 1, 2, 2), heads=(2, 2, 2, 4, 4, 4))
GAIN = 2.0 ** (torch.arange(TINY.M) % 3 - 1)


def trained() -> tuple[Tic, EntropyBottleneck]:
    """Random weights, of which every kind has a part in what comes out."""
    torch.manual_seed(0)
    tic, bottleneck = Tic(TINY).eval(), EntropyBottleneck(TINY.N)
    with torch.no_grad():
        for module in tic.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        for block in (*tic.h_s[0].blocks, *tic.h_s[2].blocks):
            block.attn.relative_position_bias_table.normal_()
        tic.g_a[-2].weight.mul_(8)  # latents large enough to be worth sending
        bottleneck.quantiles[:, 0, 1].normal_()
    return tic, bottleneck


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tic") / "tic.safetensors"
    tic, bottleneck = trained()
    write_artefact(path, tic, bottleneck.state_dict(), {2: (GAIN, 1 / GAIN)}, trainable=True)
    return path


@pytest.fixture(scope="module")
def exact(artefact: Path) -> ExactTic:
    path = read_artefact(artefact).path
    assert isinstance(path, ExactTic)
    return path


@pytest.fixture
def z() -> Tensor:
    return torch.randint(-3, 4, (4, 4, 8, TINY.N), generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.fixture(scope="module")
def photo() -> Photo:
    rows, columns = np.mgrid[:256, :512]
    pixels = np.stack([rows, columns % 256, (rows * columns) % 256], -1).astype(np.uint8)
    return Photo(pixels, (1024, 512))


@torch.inference_mode()
def parameters(exact: ExactTic, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale of every symbol, (B, h w, M) int32 each."""
    passes: list[ExactPass] = []

    def code(step: ExactPass) -> Tensor:
        passes.append(step)
        return torch.zeros_like(step.mean)

    exact.walk(z, code)
    (only,) = passes
    assert only.channels == slice(0, TINY.M)
    assert only.at.tolist() == list(range(16 * z.shape[1] * z.shape[2]))
    return only.mean, only.scale


def use(exact: nn.Module, kernel: Kernel) -> None:
    for module in exact.modules():
        if isinstance(module, ExactConv):
            module.use(kernel)


# --- What it is near to ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_means_and_scales_are_near_the_networks(artefact: Path, exact: ExactTic, z: Tensor) -> None:
    network = read_artefact(artefact).network
    z_hat = z + exact.medians / ONE
    wanted = [each.permute(0, 2, 3, 1).flatten(1, 2) for each in network.h_s(z_hat.permute(0, 3, 1, 2))]
    # Weights of 8 bits are off by 1 % of their spread in each of a dozen layers, independently of one another.
    for given, unit, near in zip(parameters(exact, z), (1 / ONE, SCALE_UNIT), wanted, strict=True):
        difference = given * unit - near
        assert difference.std() < 0.02 * near.std()
        assert difference.abs().max() < 0.1 * near.std()


@pytest.mark.parametrize("size", [2**8, 2**13, STREAM // 4])
@pytest.mark.parametrize("channels", [8, 128, 256])
def test_layer_norm_is_near_its_definition(channels: int, size: int) -> None:
    source = torch.Generator().manual_seed(2)
    x = (torch.randn(300, channels, generator=source) * size).clamp(-STREAM, STREAM).int()
    x += (torch.randn(300, 1, generator=source) * size / 4).int()
    epsilon = min(size**2 // 4, 2**31 - 1)
    wanted = nn.functional.layer_norm(x.double(), (channels,), eps=epsilon) * 2**NORMED
    spread = (x.double().var(-1, correction=0, keepdim=True) + epsilon).sqrt()
    # Half a unit from rounding the result, half a unit of the mean, 1 / 16 of the root; roots have 16 bits or more.
    near = 0.5 + 2**NORMED * (1 / 2 + 1 / 16) / spread + wanted.abs() * 2**-15 + 2**-8
    assert ((normalised(x, torch.tensor(epsilon)) - wanted).abs() <= near).all()


def test_a_layer_norm_of_equal_channels_is_zero() -> None:
    x = torch.tensor([0, 1, -STREAM, STREAM], dtype=torch.int32)[:, None].expand(4, 128)
    assert not normalised(x, torch.tensor(1)).any()


def test_a_layer_norms_largest_output_fits_what_layers_read() -> None:
    x = torch.full((1, 256), -STREAM, dtype=torch.int32)
    x[0, 0] = STREAM
    assert normalised(x, torch.tensor(1))[0, 0] == round(255**0.5 * 2**NORMED) < LIMIT


@torch.inference_mode()
def test_attention_is_near_its_definition() -> None:
    source = torch.Generator().manual_seed(3)
    attention = ExactAttention(width=24, heads=3, window=4, shift=2)
    attention.shift.fill_(6)
    attention.bias.copy_(torch.randint(-(2**15), 2**15, attention.bias.shape, generator=source))
    attention.powers.copy_((2**16 * 2.0 ** (-torch.arange(2**OCTAVE) / 2**OCTAVE)).round())
    query, key, value = torch.randint(-300, 300, (3, 5, 3, 16, 8), generator=source, dtype=torch.int16)
    apart = torch.rand(5, 1, 16, 16, generator=source) < 0.3
    apart &= ~torch.eye(16, dtype=torch.bool)
    logits = (query.double() @ key.double().transpose(-2, -1) + attention.bias) * math.log(2) / 2 ** (6 + OCTAVE)
    wanted = logits.masked_fill(apart, -torch.inf).softmax(-1) @ value.double()
    # Half a unit from rounding, and of each value 0.14 % from half a step of its score: twice that where they oppose.
    assert (attention._attend(query, key, value, apart) - wanted).abs().max() < 0.5 + 0.0028 * 300


@pytest.mark.parametrize("most", [0.5, 7, 60])
def test_gelu_is_within_a_unit_of_its_definition(most: float) -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).double().requires_grad_(False)
    norm = nn.LayerNorm(8).double().requires_grad_(False)
    reached = torch.zeros(16), torch.full((16,), most)
    perceptron = ExactPerceptron(8, 16)
    given = perceptron.derive(layers, norm, lambda _: reached).given
    x = torch.arange(-LIMIT, LIMIT + 1, dtype=torch.int16)
    wanted = nn.functional.gelu(x.double() * given) / given
    assert most / given <= LIMIT
    assert (gelu(x, perceptron.bump) - wanted).abs().max() <= 0.5


def test_a_3x3_deconvolution_is_its_four_phases() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, bias=False)
    x = torch.randn(2, 6, 3, 5)
    phases = deconv_phases(layer.weight).view(16, 2, 2, 6).permute(0, 3, 1, 2)
    out = nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), phases).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(depth_to_space(out, 3, 5).permute(0, 3, 1, 2), layer(x))


def test_ranges_of_linear_layers_are_those_of_their_channels() -> None:
    tic = trained()[0].double()
    ranges = measured_ranges(tic, torch.zeros(TINY.N), [torch.ones(TINY.M)])
    block = tic.h_s[0].blocks[0]
    for layer, channels in ((block.attn.qkv, 24), (block.mlp.fc2, 8), (tic.h_s[1], 8), (tic.h_s[0], 8)):
        least, most = ranges(layer)
        assert least.shape == most.shape == (channels,)
    least, most = ranges(block.mlp.act)
    assert -0.2 < least.min() < most.max()


# --- The same everywhere ---------------------------------------------------------------------------------------------


def test_the_integer_square_root_is_exact() -> None:
    source = np.random.default_rng(4)
    roots = [0, 1, 2, 3, 2**26 - 1, 2**26, 2**30 - 1, *map(int, source.integers(0, 2**30, 2000))]
    squares = [max(0, root * root + near) for root in roots for near in (-1, 0, 1)]
    assert square_root(torch.tensor(squares)).tolist() == [math.isqrt(square) for square in squares]


def test_division_rounds_to_nearest_and_halves_upwards() -> None:
    x, by = torch.tensor([5, -5, 7, -7, 2**61, -(2**61)]), torch.tensor([2, 2, 4, 4, 3, 3])
    assert divided(x, by).tolist() == [3, -2, 2, -2, (2**61 + 1) // 3, -((2**61 + 1) // 3)]


@pytest.mark.parametrize("size", [3, 200, LARGEST_SYMBOL])
def test_means_and_scales_are_what_the_definition_says(exact: ExactTic, size: int) -> None:
    z = torch.randint(-size, size + 1, (4, 8, TINY.N), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    mean, scale = parameters(exact, z[None])
    wanted = by_definition(exact, z)
    np.testing.assert_array_equal(torch.cat([mean, scale], -1)[0].numpy(), wanted)


def test_any_integers_that_pass_the_check_stay_in_range() -> None:
    exact = random_path()
    z = torch.randint(-3, 4, (4, 4, TINY.N), generator=torch.Generator().manual_seed(6), dtype=torch.int32)
    z[0, 0], z[1, 1], z[2, 2, ::2] = LARGEST_SYMBOL, -LARGEST_SYMBOL, LARGEST_SYMBOL
    mean, scale = parameters(exact, z[None])
    wanted = by_definition(exact, z)
    np.testing.assert_array_equal(torch.cat([mean, scale], -1)[0].numpy(), wanted)
    assert STREAM in np.abs(wanted)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_gives_the_same_integers(exact: ExactTic, z: Tensor, kernel: Kernel) -> None:
    wanted = parameters(exact, z)
    use(exact, kernel)
    try:
        assert all(map(torch.equal, parameters(exact, z), wanted))
    finally:
        use(exact, KERNELS[-1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.filterwarnings("ignore:TF32")
def test_threads_and_libraries_change_nothing(exact: ExactTic, z: Tensor, threads: int, mkldnn: bool) -> None:
    wanted = parameters(exact, z)
    with on_threads(threads), torch.backends.mkldnn.flags(enabled=mkldnn):
        assert all(map(torch.equal, parameters(exact, z), wanted))


def test_what_else_is_in_a_batch_changes_nothing(exact: ExactTic, z: Tensor) -> None:
    together = parameters(exact, z)
    for i in range(len(z)):
        for all_of_them, alone in zip(together, parameters(exact, z[i : i + 1]), strict=True):
            assert torch.equal(all_of_them[i : i + 1], alone)


def test_windows_taken_in_turns_are_the_same(exact: ExactTic, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = parameters(exact, z)
    monkeypatch.setattr("shared.codecs.exact_tic.TURN", 1)
    assert all(map(torch.equal, parameters(exact, z), wanted))


# --- As a codec ------------------------------------------------------------------------------------------------------


def test_decoding_gives_the_latents_that_encoding_quantised(artefact: Path, photo: Photo) -> None:
    codec = Codec.load(artefact)
    y = codec.analyse(photo)
    bitstream = Bitstream.parse(bytes(codec.encode(photo, "d1", 2, y)))
    y_hat = codec.decode(bitstream).y_hat
    assert y_hat.abs().max() > 3
    assert ((y_hat - y) * GAIN[:, None, None]).abs().max() <= 0.5 + 1e-4
    assert codec.reconstruct(codec.decode(bitstream)).pixels.shape == (256, 512, 3)


def test_the_slow_decoder_reads_it(artefact: Path, photo: Photo) -> None:
    codec = Codec.load(artefact)
    bitstream = codec.encode(photo, "d1", 2)
    decoded = decode(Artefact(artefact), bytes(bitstream))
    np.testing.assert_array_equal(decoded.values, codec.decode(bitstream).y_hat[0].numpy(), strict=True)


def test_a_stream_of_one_kernel_is_read_with_any_other(artefact: Path, photo: Photo) -> None:
    codecs = [Codec(read_artefact(artefact), kernel=kernel) for kernel in KERNELS]
    streams = [codec.encode(photo, "d1", 2) for codec in codecs]
    assert len({bytes(stream) for stream in streams}) == 1
    latents = [codec.decode(replace(streams[0])).y_hat for codec in codecs]
    assert all(torch.equal(each, latents[0]) for each in latents)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lift", LIFT + 1),
        ("lift", -1),
        ("medians", 2**31 - 1),
        ("medians", -(2**31)),
        ("swin0.epsilon", 0),
        ("swin2.narrow", 21),
        ("swin2.blocks.1.attn.shift", 31),
        ("swin2.blocks.0.attn.powers", 0),
        ("swin2.blocks.0.attn.powers", 2**16 + 1),
        ("swin0.blocks.0.mlp.bump", -1),
        ("swin0.blocks.0.mlp.bump", LIMIT + 1),
        ("up3.shift", -1),
        ("up3.bias", -(2**31)),
    ],
)
def test_an_artefact_that_could_leave_its_bounds_is_refused(
    artefact: Path, tmp_path: Path, name: str, value: int
) -> None:
    tensors = load_tensors(artefact)
    tensors[f"exact.{name}"].fill_(value)
    save_tensors(tmp_path / "bad.safetensors", tensors, metadata=read_metadata(artefact))
    with pytest.raises(BadInput, match="exactly"):
        read_artefact(tmp_path / "bad.safetensors")


def test_weights_too_large_for_the_stream_are_refused() -> None:
    tic, bottleneck = trained()
    tic.h_s[0].blocks[0].mlp.fc2.weight.data.mul_(1e7)
    ones = torch.ones(TINY.M)
    with pytest.raises(BadInput, match="too large"):
        write_artefact(Path("unwritten"), tic, bottleneck.state_dict(), {1: (ones, ones)}, storage="float32")


def test_a_network_wider_than_its_sums_is_refused() -> None:
    with pytest.raises(BadInput, match="528 channels"):
        Tic(TicConfig(N=528, M=16, depths=(1, 1, 1, 1, 1, 1))).entropy_path()


# --- Helpers ---------------------------------------------------------------------------------------------------------


def random_path() -> ExactTic:
    """Integers as extreme as the checks allow, and in their midst some that leave room for others to have an effect."""
    source = torch.Generator().manual_seed(7)
    exact = ExactTic(TINY)
    for module in exact.modules():
        if isinstance(module, ExactConv):
            module.weight.copy_(torch.randint(-1, 2, module.weight.shape, generator=source) * 127)
            module.bias.copy_(torch.randint(-(2**20), 2**20, module.bias.shape, generator=source))
            module.bias[::8] = 2**30
            module.shift.copy_(torch.randint(6, 14, module.shift.shape, generator=source))
        if isinstance(module, ExactAttention):
            module.bias.copy_(torch.randint(-(2**24), 2**24, module.bias.shape, generator=source))
            module.bias[:, ::5] *= 2**7
            module.shift.copy_(torch.randint(0, 24, (), generator=source))
            module.powers.copy_(torch.randint(1, 2**16 + 1, module.powers.shape, generator=source))
            module.powers[0] = 1
        if isinstance(module, ExactGroup):
            module.epsilon.fill_(2**31 - 1)
            module.narrow.fill_(9)  # so that a convolution reads all of the stream
        if isinstance(module, ExactPerceptron):
            module.bump.copy_(torch.randint(0, LIMIT + 1, module.bump.shape, generator=source))
        if hasattr(module, "check"):
            module.check()
    exact.lift.fill_(LIFT)
    exact.medians.copy_(torch.randint(-(2**9), 2**9, exact.medians.shape, generator=source))
    return exact.eval()


def by_definition(exact: ExactTic, z: Tensor) -> np.ndarray:
    """z's symbols (h / 4, w / 4, N) -> mean and scale (h w, 2 M) by docs/bitstream.md, in Python's own integers."""
    tensors = {f"exact.{name}": tensor.numpy().astype(object) for name, tensor in exact.state_dict().items()}
    return tic_parameters(tensors, Tic(TINY).describe(), z.numpy().astype(object)).reshape(-1, 2 * TINY.M)


@contextmanager
def on_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
