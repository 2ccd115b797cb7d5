"""``comneck weights import``: tiny checkpoints as publishers write them become artefacts, or are refused whole."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import Elic2022Chandelier, Elic2022Official
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR

from cloud_server.vision.neck import TransformNeck
from shared.codecs import ranges
from shared.codecs.artefact import read_artefact
from shared.codecs.elic import Elic, ElicConfig
from shared.codecs.tic import Tic, TicConfig
from shared.errors import BadInput, ComneckError, UnknownName, WeightsUnavailable
from shared.weights import digest
from shared.weights.catalogue import catalogue, find_artefact
from shared.weights.checkpoints import read_checkpoint
from shared.weights.cli import add_weights_command
from shared.weights.digest import load_tensors, read_metadata
from shared.weights.importing import import_checkpoint
from shared.weights.store import Store

SIZES = ElicConfig(N=8, M=24, groups=(4, 2, 18))
TIC = TicConfig(N=8, M=16, depths=(2, 1, 2, 3, 1, 2), heads=(2, 4, 2, 8, 4, 2), mlp_ratio=3)
PUBLISHED = [
    ("channel_context.", "cc_transforms."),
    ("spatial_context.", "context_prediction."),
    ("aggregation.", "ParamAggregation."),
    ("matrices.", "_matrix"),
    ("biases.", "_bias"),
    ("factors.", "_factor"),
]

Contents = dict[str, Any]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are made for one picture of 64x64, so that an import takes a fraction of a second."""
    monkeypatch.setattr(ranges, "PICTURES", 1)
    monkeypatch.setattr(ranges, "dead_leaves", lambda seed: noise(64))


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path / "home"))
    catalogue.cache_clear()
    yield tmp_path / "home"
    catalogue.cache_clear()


def elic_state(config: ElicConfig = SIZES, derived: bool = False) -> dict[str, Tensor]:
    """A random ELIC by its publisher's names, with what CompressAI's modules add where ``derived``."""
    torch.manual_seed(0)
    bottleneck = EntropyBottleneck(config.N)
    state = {name: value.clone() for name, value in Elic(config).state_dict().items()}
    state |= {f"entropy_bottleneck.{name}": value.detach() for name, value in bottleneck.named_parameters()}
    for ours, theirs in PUBLISHED:
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    if derived:
        bottleneck.update()
        gaussian = GaussianConditional([0.11, 1.0, 256.0])
        gaussian.update()
        for name, module in (("entropy_bottleneck", bottleneck), ("gaussian_conditional", gaussian)):
            state |= {f"{name}.{buffer}": value for buffer, value in module.named_buffers()}
        state |= {f"context_prediction.{k}.mask": torch.ones(8, 4, 5, 5) for k in range(3)}
    return state


def tic_state() -> dict[str, Tensor]:
    """A random TIC by its publisher's names, some buffers included."""
    torch.manual_seed(0)
    state = {f"entropy_bottleneck.{name}": value for name, value in EntropyBottleneck(TIC.N).state_dict().items()}
    for name, value in Tic(TIC).state_dict().items():
        name = name.replace(".blocks.", ".residual_group.blocks.")
        state[re.sub(r"^([gh]_[as])\.(\d)", r"\1\2", name)] = value
    state["g_a1.residual_group.blocks.1.attn_mask"] = torch.zeros(16, 64, 64)
    return state


def neck_state(channels: int = SIZES.M, grid: int = 4, width: int = 16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.detach() for name, value in TransformNeck(channels, grid, width, heads=2).state_dict().items()}


def release() -> Contents:
    """All that a training run of the authors' saves."""
    neck = [torch.nn.Parameter(value) for value in neck_state().values()]
    optimizer = Adam(neck)
    schedule = MultiStepLR(optimizer, [20], 0.1)
    return {
        "epoch": 59,
        "state_dict": elic_state(),
        "adapter": neck_state(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
    }


def write(folder: Path, contents: Any, name: str = "d1_2.pth.tar", **options: Any) -> Path:
    torch.save(contents, folder / name, **options)
    return folder / name


def everything_in(home: Path) -> list[str]:
    """Files below the cache folder, without its locks."""
    return sorted(path.name for path in home.rglob("*") if path.is_file() and path.suffix != ".lock")


def refusal(path: Path, home: Path, **options: Any) -> str:
    """Why a file is not imported, which is one line; and nothing is left of the attempt."""
    before = everything_in(home)
    with pytest.raises(BadInput) as caught:
        import_checkpoint(path, **options)
    assert everything_in(home) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- a release of the authors --------------------------------------------------------------------------------------


def test_a_release_becomes_a_codec_and_a_neck_that_load(tmp_path: Path) -> None:
    made = import_checkpoint(write(tmp_path, release()))
    assert made.names == ["comneck-codec-d1-2", "comneck-neck-d1-2"]
    store = Store()
    artefact = read_artefact(store.path(made.codec))
    assert isinstance(artefact.network, Elic)
    assert artefact.network.config == SIZES
    assert artefact.network.family == "elic-chandelier"
    assert artefact.digest == made.codec_digest
    assert artefact.qualities == (2,)
    assert torch.equal(artefact.gains, torch.ones(1, SIZES.M))
    assert torch.equal(artefact.inverse_gains, torch.ones(1, SIZES.M))
    state = elic_state()
    trained = artefact.network.state_dict()
    assert torch.equal(trained["g_a.0.weight"], state["g_a.0.weight"])
    assert torch.equal(trained["aggregation.2.4.bias"], state["ParamAggregation.2.4.bias"])
    assert torch.equal(artefact.bottleneck["quantiles"], state["entropy_bottleneck.quantiles"])
    assert torch.equal(artefact.bottleneck["matrices.0"], state["entropy_bottleneck._matrix0"])

    neck = TransformNeck(SIZES.M, grid=4, width=16, heads=2)
    neck.load_state_dict(load_tensors(store.path("comneck-neck-d1-2")))
    assert torch.equal(neck.class_embedding, neck_state()["class_embedding"])
    assert load_file(store.path("comneck-neck-d1-2"))["class_embedding"].dtype == torch.float32
    assert read_metadata(store.path("comneck-neck-d1-2")) == {"scenario": "d1", "quality": "2"}


@pytest.mark.parametrize("prefix", ["module.", "base_coder.", "module.base_coder."])
def test_what_wrappers_and_compressai_add_to_a_release_is_left_out(tmp_path: Path, prefix: str) -> None:
    contents = release()
    contents["state_dict"] = {f"{prefix}{name}": value for name, value in elic_state(derived=True).items()}
    contents["adapter"] = {f"module.{name}": value for name, value in neck_state().items()}
    plain, wrapped = (read_checkpoint(write(tmp_path, each, "d1_2.pth.tar")) for each in (release(), contents))
    for part in (lambda one: one.network.state_dict(), lambda one: one.bottleneck, lambda one: one.neck):
        assert part(wrapped).keys() == part(plain).keys()
        assert all(torch.equal(tensor, part(plain)[name]) for name, tensor in part(wrapped).items())


@pytest.mark.parametrize(("channels", "grid", "width"), [(24, 4, 16), (24, 3, 8)])
def test_a_necks_sizes_are_those_of_its_tensors(tmp_path: Path, channels: int, grid: int, width: int) -> None:
    neck = neck_state(channels, grid, width)
    checkpoint = read_checkpoint(write(tmp_path, release() | {"adapter": neck}))
    assert checkpoint.neck.keys() == neck.keys()
    assert all(torch.equal(checkpoint.neck[name], neck[name]) for name in neck)


def test_a_file_in_the_format_before_torch_1_6_and_in_half_precision_is_read(tmp_path: Path) -> None:
    contents = {"state_dict": {name: value.half() for name, value in elic_state().items()}, "adapter": neck_state()}
    path = write(tmp_path, contents, _use_new_zipfile_serialization=False)
    tensors = read_checkpoint(path).network.state_dict()
    assert torch.equal(tensors["g_a.0.weight"], elic_state()["g_a.0.weight"].half().float())


@pytest.mark.parametrize(
    ("name", "options", "made"),
    [
        ("d3_4.pth.tar", {}, ["comneck-codec-d3-4", "comneck-neck-d3-4"]),
        ("d2_1 (1).tar", {}, ["comneck-codec-d2-1", "comneck-neck-d2-1"]),
        ("mine.pth", {"scenario": "d2", "quality": 7}, ["comneck-codec-d2-7", "comneck-neck-d2-7"]),
        ("d1_2.pth.tar", {"scenario": "d3"}, ["comneck-codec-d3-2", "comneck-neck-d3-2"]),
    ],
)
def test_scenario_and_quality_are_as_said_else_as_the_file_name_says(
    tmp_path: Path, name: str, options: dict[str, Any], made: list[str]
) -> None:
    assert import_checkpoint(write(tmp_path, release(), name), **options).names == made


# --- a codec alone -------------------------------------------------------------------------------------------------


def test_a_codec_alone_becomes_an_artefact_of_the_name_given(tmp_path: Path) -> None:
    made = import_checkpoint(write(tmp_path, elic_state(derived=True), "lambda_0.016.pth"), name="elic-16")
    assert made.names == ["elic-16"]
    assert read_artefact(Store().path("elic-16")).qualities == (1,)


@pytest.mark.parametrize(
    ("kind", "family"), [(Elic2022Chandelier, "elic-chandelier"), (Elic2022Official, "elic-official")]
)
@torch.inference_mode()
def test_compressais_elics_are_told_apart_and_compute_the_same_as_there(tmp_path: Path, kind: Any, family: str) -> None:
    torch.manual_seed(0)
    theirs = kind(N=8, M=136).eval()
    for name, parameter in theirs.named_parameters():
        if name.startswith("g_a"):
            parameter *= 2  # latents large enough for symbols other than 0
    checkpoint = read_checkpoint(write(tmp_path, {"state_dict": theirs.state_dict(), "loss": torch.tensor(1.0)}))
    ours = checkpoint.network
    assert (ours.family, ours.describe()) == (family, {"N": 8, "M": 136, "groups": [16, 16, 32, 64, 8]})
    pixels = torch.rand(1, 3, 128, 64)
    y = ours.g_a(pixels)
    z = ours.h_a(y)
    median = checkpoint.bottleneck["quantiles"][:, 0, 1, None, None]
    y_hat = ours.walk((z - median).round() + median, lambda step: (y[:, step.channels] - step.mean).round() + step.mean)
    assert (y_hat - y).abs().max() > 0.4
    torch.testing.assert_close(ours.g_s(y_hat), theirs(pixels)["x_hat"], atol=1e-4, rtol=1e-4)


def test_a_tic_alone_is_known_by_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "dead_leaves", lambda seed: noise(Tic.stride))
    import_checkpoint(write(tmp_path, {"state_dict": tic_state()}, "base_codec_3.pth.tar"), name="tic", quality=3)
    artefact = read_artefact(Store().path("tic"))
    assert isinstance(artefact.network, Tic)
    assert artefact.network.config == TIC
    assert artefact.qualities == (3,)
    assert torch.equal(artefact.network.g_a[0].weight, tic_state()["g_a0.weight"])


# --- what is refused -----------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_codec_and_neck_is_listed_at_once(tmp_path: Path, home: Path) -> None:
    contents = release()
    del contents["state_dict"]["g_a.0.bias"]
    del contents["adapter"]["ln_pre.weight"]
    contents["state_dict"]["context_prediction.1.bias"] = torch.zeros(5)
    contents["adapter"]["positional_embedding"] = torch.zeros(18, 16)
    contents["state_dict"]["g_a.15.weight"] = torch.zeros(1)
    contents["adapter"]["proj"] = torch.zeros(1)
    said = refusal(write(tmp_path, contents), home)
    for wrong in (
        "6 tensors are wrong",
        "g_a.0.bias is missing",
        "adapter.ln_pre.weight is missing",
        "spatial_context.1.bias is (5,) instead of (4,)",
        "adapter.positional_embedding is (18, 16) instead of (17, 16)",
        "g_a.15.weight is not known",
        "adapter.proj is not known",
    ):
        assert wrong in said


@pytest.mark.parametrize(
    "name", ["g_a.13.bias", "h_a.0.weight", "entropy_bottleneck.quantiles", "ParamAggregation.2.4.bias"]
)
def test_one_missing_tensor_is_the_only_one_reported(tmp_path: Path, home: Path, name: str) -> None:
    contents = release()
    del contents["state_dict"][name]
    assert ", 1 tensors are wrong" in refusal(write(tmp_path, contents), home)


def test_a_neck_of_another_codec_is_refused(tmp_path: Path, home: Path) -> None:
    said = refusal(write(tmp_path, release() | {"adapter": neck_state(channels=32)}), home)
    assert "adapter.trans_latent_dim.weight is (16, 32) instead of (16, 24)" in said


@pytest.mark.parametrize(
    ("part", "theirs", "ours", "value"),
    [
        ("state_dict", "h_s.2.weight", "h_s.2.weight", float("nan")),
        ("state_dict", "entropy_bottleneck._bias2", "bottleneck.biases.2", float("inf")),
        ("adapter", "ln_pre.bias", "adapter.ln_pre.bias", -float("inf")),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_its_tensors_name(
    tmp_path: Path, home: Path, part: str, theirs: str, ours: str, value: float
) -> None:
    contents = release()
    contents[part][theirs].view(-1)[-1] = value
    assert f"d1_2.pth.tar: {ours} have values that are not finite" in refusal(write(tmp_path, contents), home)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("convert", [Tensor.int, Tensor.to_sparse], ids=["integers", "sparse"])
def test_tensors_of_another_kind_are_refused_by_name(
    tmp_path: Path, home: Path, convert: Callable[[Tensor], Tensor]
) -> None:
    contents = release()
    contents["state_dict"]["h_s.0.bias"] = convert(contents["state_dict"]["h_s.0.bias"])
    assert "h_s.0.bias are not dense tensors" in refusal(write(tmp_path, contents), home)


def test_shapes_that_the_file_is_too_small_for_are_refused(tmp_path: Path, home: Path) -> None:
    contents = release()
    contents["state_dict"]["g_a.0.weight"] = torch.zeros(1).expand(10**6, 10**6)
    assert "its tensors claim 4,000,0" in refusal(write(tmp_path, contents), home)


def test_a_tensor_with_and_without_a_prefix_is_refused(tmp_path: Path, home: Path) -> None:
    contents = release()
    contents["state_dict"]["module.g_a.0.bias"] = torch.zeros(8)
    assert "its state_dict has 1 tensors twice" in refusal(write(tmp_path, contents), home)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("new", [True, False])
def test_a_file_with_code_is_refused_and_never_run(tmp_path: Path, home: Path, new: bool) -> None:
    contents = release() | {"epoch": Command(f"touch {tmp_path / 'ran'}")}
    said = refusal(write(tmp_path, contents, _use_new_zipfile_serialization=new), home)
    assert re.search(r"to read it would run \w+\.system, and", said)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, home: Path, new: bool, kept: float) -> None:
    path = write(tmp_path, release(), _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    assert "d1_2.pth.tar cannot be read as a checkpoint of PyTorch" in refusal(path, home)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n and so on", "cannot be read as a checkpoint"),
        ([1, 2], "it holds a list instead of a dictionary"),
        ({"epoch": 3}, "it is no dictionary of tensors"),
        ({"state_dict": {"g_a.0.weight": [1.0]}}, "its state_dict is no dictionary of tensors"),
        ({"state_dict": 3}, "its state_dict is no dictionary of tensors"),
        (release() | {"adapter": {"ln_pre.bias": 1}}, "its adapter is no dictionary of tensors"),
        ({"conv1.weight": torch.zeros(3)}, "holds no ELIC and no TIC codec, and only these are known"),
        ({}, "holds no ELIC and no TIC codec"),
    ],
)
def test_what_is_no_codecs_checkpoint_is_refused(tmp_path: Path, home: Path, contents: Any, reason: str) -> None:
    path = tmp_path / "d1_2.pth.tar"
    path.write_bytes(contents) if isinstance(contents, bytes) else write(tmp_path, contents)
    assert reason in refusal(path, home)


def test_a_folder_and_nothing_at_all_are_refused(tmp_path: Path, home: Path) -> None:
    assert "is no file" in refusal(tmp_path, home)
    assert "is no file" in refusal(tmp_path / "d1_2.pth.tar", home)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("best.pth", {}, "does not tell scenario and quality, .* --scenario d1 --quality 2"),
        ("best.pth", {"scenario": "d1"}, "does not tell scenario and quality"),
        ("d4_2.pth.tar", {}, "does not tell scenario and quality"),
        ("d1_20.pth.tar", {}, "does not tell scenario and quality"),
        ("d1_2.pth.tar", {"scenario": "d4"}, "scenario 'd4' is none of d1, d2, d3"),
        ("d1_2.pth.tar", {"quality": 0}, "quality 0 is none of 1 to 15"),
        ("d1_2.pth.tar", {"quality": 16}, "quality 16 is none of 1 to 15"),
        ("d1_2.pth.tar", {"name": "mine"}, "leave out --name"),
    ],
)
def test_a_release_is_refused_where_its_names_are_not_clear(
    tmp_path: Path, home: Path, name: str, options: dict[str, Any], reason: str
) -> None:
    assert re.search(reason, refusal(write(tmp_path, release(), name), home, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "say what to call it with --name NAME"),
        ({"name": "../../etc/passwd"}, "--name '../../etc/passwd' cannot be"),
        ({"name": "a b"}, "--name 'a b' cannot be"),
        ({"name": ".hidden"}, "--name '.hidden' cannot be"),
        ({"name": "mine\n"}, "--name 'mine\\\\n' cannot be"),
        ({"name": "a" * 101}, "cannot be"),
        ({"name": "comneck-codec-d1-2"}, "no comneck- at the start"),
        ({"name": "mine", "scenario": "d1"}, "leave out --scenario"),
        ({"name": "small-codec"}, "the name small-codec is taken in the catalogue comneck"),
    ],
)
def test_a_codec_alone_is_refused_without_a_name_of_its_own(
    tmp_path: Path, home: Path, options: dict[str, Any], reason: str
) -> None:
    assert re.search(reason, refusal(write(tmp_path, elic_state()), home, **options))


def test_a_name_that_a_user_has_catalogued_is_refused_with_the_place(tmp_path: Path, home: Path) -> None:
    path = home / "catalogues" / "mine.toml"
    path.parent.mkdir(parents=True)
    path.write_text(
        '[[artefact]]\nname = "comneck-neck-d1-2"\nkind = "neck"\nsummary = ""\nlicence = ""\ninstalls = ["a"]\n'
        '[[artefact.source]]\nkind = "package"\nfiles = [{ name = "a", size = 1, sha256 = "00" }]\n'
    )
    said = refusal(write(tmp_path, release()), home)
    assert said == f"the name comneck-neck-d1-2 is taken in the catalogue {path}: delete it there first"


# --- installing ----------------------------------------------------------------------------------------------------


def test_imported_artefacts_are_pinned_and_a_changed_byte_is_found(tmp_path: Path, home: Path) -> None:
    made = import_checkpoint(write(tmp_path, release()))
    store = Store()
    for name in made.names:
        status = store.status(name)
        assert (status.state, status.origin) == ("imported", "import d1_2.pth.tar")
        assert status.artefact.licence == "unknown; see where it came from"
        assert store.ensure(name) == store.pull(name) == status.path
        assert f".{store.digest(name)[:12]}." in store.path(name).name
        store.verify(name)
    path = store.path(made.codec)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        WeightsUnavailable, match=r"has changed; import d1_2\.pth\.tar again \(`comneck weights import`\)"
    ):
        store.verify(made.codec)
    path.unlink()
    with pytest.raises(WeightsUnavailable, match=r"was imported, but .* is missing: import d1_2\.pth\.tar again"):
        store.path(made.codec)


def test_what_is_imported_is_readable_by_whom_the_catalogue_is(tmp_path: Path) -> None:
    made = import_checkpoint(write(tmp_path, release()))
    modes = {path.stat().st_mode for path in [made.catalogue, *map(Store().path, made.names)]}
    assert len(modes) == 1


def test_importing_again_replaces_and_leaves_nothing_over(tmp_path: Path, home: Path) -> None:
    first = import_checkpoint(write(tmp_path, release()))
    old = {name: Store().path(name) for name in first.names}
    contents = release()
    contents["state_dict"]["ParamAggregation.0.4.bias"] += 1
    second = import_checkpoint(write(tmp_path, contents))
    assert second.names == first.names
    assert second.codec_digest != first.codec_digest
    new = {name: Store().path(name) for name in second.names}
    assert new[first.codec] != old[first.codec]
    assert read_artefact(new[first.codec]).digest == second.codec_digest
    assert everything_in(home) == sorted(["comneck-d1-2.imported.toml", *(path.name for path in new.values())])
    for name in second.names:
        Store().verify(name)


def test_an_import_repairs_what_a_damaged_catalogue_of_its_own_had(tmp_path: Path, home: Path) -> None:
    made = import_checkpoint(write(tmp_path, release()))
    made.catalogue.write_text("[[artefact")
    import_checkpoint(write(tmp_path, release()))
    Store().verify(made.codec)


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_import_that_ends_early_leaves_everything_as_it_was(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    import_checkpoint(write(tmp_path, release()))
    before = everything_in(home)
    contents = release()
    contents["state_dict"]["ParamAggregation.0.4.bias"] += 1
    path = write(tmp_path, contents)

    def fail(*arguments: Any) -> None:
        raise problem

    monkeypatch.setattr(digest, "save_tensors", fail)  # the neck's; the codec is written by then
    with pytest.raises((WeightsUnavailable, KeyboardInterrupt)):
        import_checkpoint(path)
    assert everything_in(home) == before
    for name in ("comneck-codec-d1-2", "comneck-neck-d1-2"):
        Store().verify(name)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_said_in_one_line(tmp_path: Path, home: Path) -> None:
    import resource

    path = write(tmp_path, release())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WeightsUnavailable, match=r"cannot be written: .*COMNECK_HOME"):
            import_checkpoint(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything_in(home) == []


def test_what_a_killed_import_left_does_not_disturb_the_next(tmp_path: Path, home: Path) -> None:
    left = home / "catalogues" / ".import.new"
    left.mkdir(parents=True)
    (left / "comneck-codec-d1-2").write_bytes(b"half")
    made = import_checkpoint(write(tmp_path, release()))
    assert not left.exists()
    Store().verify(made.codec)


def test_a_file_may_be_called_anything(tmp_path: Path) -> None:
    path = write(tmp_path, elic_state(), 'd1 "x" \\ \x7f \U0001f600 é\n.pth')
    import_checkpoint(path, name="odd")
    assert Store().status("odd").origin == 'import d1 "x" \\ ? \U0001f600 é?.pth'


# --- the command ---------------------------------------------------------------------------------------------------


def weights(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_weights_command(parser.add_subparsers())
    args = parser.parse_args(["weights", *arguments])
    args.run(args)


def test_the_command_says_what_it_does_what_came_of_it_and_what_is_next(tmp_path: Path, capsys) -> None:
    weights("import", str(write(tmp_path, release())))
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == "d1_2.pth.tar: elic-chandelier N=8 M=24, and its neck"
    assert any(line.startswith("comneck-codec-d1-2: making its entropy path") for line in said.err.splitlines())
    _, codec, neck, named, then = said.out.splitlines()
    assert codec.split()[:2] == ["comneck-codec-d1-2", "codec"]
    assert neck.split()[:2] == ["comneck-neck-d1-2", "neck"]
    assert re.fullmatch("codec digest [0-9a-f]{8}", named)
    assert then == "next: cloud-server serve --profile vit-l-14"


def test_the_command_speaks_json(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, elic_state(), "elic.pth")
    weights("import", str(path), "--name", "mine", "--quality", "3", "--json")
    said = json.loads(capsys.readouterr().out)
    (row,) = said["artefacts"]
    assert (row["name"], row["state"], row["summary"]) == ("mine", "imported", "elic-chandelier N=8 M=24, quality 3")
    artefact = read_artefact(Path(row["path"]))
    assert said["codec_digest"] == artefact.digest
    assert artefact.qualities == (3,)


def test_without_a_profile_for_it_the_command_says_to_write_one(tmp_path: Path, home: Path, capsys) -> None:
    weights("import", str(write(tmp_path, elic_state(), "elic.pth")), "--name", "mine")
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"next: name mine in a profile of your own, in {home / 'profiles'}"
    )


@pytest.mark.parametrize("kind", ["codec", "neck"])
def test_a_release_that_is_not_here_is_answered_with_the_command_that_imports_it(kind: str) -> None:
    with pytest.raises(UnknownName, match=r"download d1_2\.pth\.tar .* `comneck weights import d1_2\.pth\.tar`"):
        find_artefact(f"comneck-{kind}-d1-2", {})
    with pytest.raises(ComneckError, match="there are: "):
        find_artefact("comneck-codec-d1", {})
