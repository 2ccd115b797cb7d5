"""What training promises: resuming changes nothing, samples say what users say, a neck starts near CLIP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cloud_server.vision.clip import ClipTower
from cloud_server.vision.neck import TransformNeck
from shared.codecs.artefact import read_artefact
from shared.codecs.codec import Codec
from shared.errors import BadInput
from shared.images import Photo, Preparation, load_photo, prepare
from shared.profiles import ClipSpec
from training.codec import CodecTraining
from training.codec import run as train_codec
from training.features import latents, teacher_features
from training.loop import Losses, Schedule, generator, train
from training.neck import channel_variance, relative_error, start_from_clip
from training.photos import Entry, Question, Thing, pixel_cache, read_photo_set
from training.samples import CAPTION_PROMPTS, Sample, SampleSource, tidy, with_article


def fit(out: Path, steps: int, total: int = 12) -> Tensor:
    """Trains a line for ``steps`` of ``total`` steps in ``out`` and returns its weights."""
    torch.manual_seed(0)
    line = nn.Linear(3, 1)

    def batches(step: int) -> Iterator[Tensor]:
        while True:
            yield torch.rand(4, 3, generator=generator(7, step))
            step += 1

    class Enough(Exception):
        pass

    def losses(batch: Tensor, step: int) -> Losses:
        if step == steps:
            raise Enough
        return {"loss": (line(batch) - batch.sum(1, keepdim=True)).square().mean()}

    try:
        optimizer = torch.optim.Adam(line.parameters(), 0.1)
        train(
            line, optimizer, Schedule(total, warmup=2), batches, losses, out, save_every=4, log_every=2, precision=None
        )
    except Enough:
        pass
    return torch.cat([parameter.detach().flatten() for parameter in line.parameters()])


def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 12)
    fit(tmp_path / "cut", 6)
    assert torch.equal(fit(tmp_path / "cut", 12), whole)
    curves = [(tmp_path / name / "curve.csv").read_text().splitlines() for name in ("whole", "cut")]
    losses = [[row.split(",")[1] for row in curve] for curve in curves]
    assert losses[0] == losses[1]
    assert (tmp_path / "cut" / "curve.png").stat().st_size > 1000


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 12)
    other = nn.Linear(5, 1)
    with pytest.raises(BadInput, match="another model"):
        train(other, torch.optim.Adam(other.parameters()), Schedule(12), iter, lambda batch, step: {}, tmp_path)


def test_a_folder_of_pictures_needs_no_index(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (200, 300), "blue").save(tmp_path / "sub" / "b.jpg")
    entries = read_photo_set(tmp_path)
    assert [entry.path.name for entry in entries] == ["a.png", "b.jpg"]
    pixels = pixel_cache(entries, Preparation(64, 128), tmp_path / "cache")
    assert pixels.shape == (2, 64, 128, 3)
    assert pixels[0].reshape(-1, 3).mean(0).tolist() == [255, 0, 0]


def test_a_broken_index_line_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "index.jsonl").write_text(json.dumps({"file": "a.png"}) + '\n{"split": "train"}\n')
    with pytest.raises(BadInput, match="line 2"):
        read_photo_set(tmp_path)


def test_an_unreadable_photo_of_the_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"a\.png"):
        pixel_cache(read_photo_set(tmp_path), Preparation(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A man , a dog .", "A man, a dog."),
        ('A sign says " stop " .', "A sign says stop."),
        ("Two dogs run", "Two dogs run."),
    ],
)
def test_captions_are_written_as_people_write(raw: str, clean: str) -> None:
    assert tidy(raw) == clean


@pytest.mark.parametrize(
    ("label", "said"), [("tench", "a tench"), ("abacus", "an abacus"), ("faces", "faces"), ("harp_seal", "a harp seal")]
)
def test_labels_carry_their_article(label: str, said: str) -> None:
    assert with_article(label) == said


def test_samples_are_drawn_from_what_each_photo_has() -> None:
    entries = [
        Entry(Path("a"), captions=("A dog .", "The dog .")),
        Entry(Path("b"), label="tench", wnid="n01440764"),
        Entry(Path("c"), label="abacus", wnid="n02666196"),
        Entry(Path("d"), questions=(Question("how many ?", ("2",)),)),
    ]
    shares = {"captions": 0.8, "labels": 0.13, "questions": 0.07, "phrases": 0.5}
    samples = SampleSource(entries, shares).draw(300, 2, generator(1))
    assert [sample.photo for sample in samples[::2]] == [sample.photo for sample in samples[1::2]]
    said = {photo: {(s.prompt, s.answer) for s in samples if s.photo == photo} for photo in range(4)}
    assert {prompt for prompt, _ in said[0]} == set(CAPTION_PROMPTS)
    assert {answer for _, answer in said[0]} == {"A dog.", "The dog."}
    assert any("animal" in prompt for prompt, _ in said[1])
    assert not any("animal" in prompt for prompt, _ in said[2])
    assert said[3] == {("how many?", "2")}


def test_photos_with_nothing_to_teach_are_refused() -> None:
    with pytest.raises(BadInput, match="captions"):
        SampleSource([Entry(Path("a"))], {"captions": 1})


def test_things_are_named_counted_and_sought_as_their_boxes_say() -> None:
    dogs = [Thing(("dog",), (0.1, 0.1, 0.2, 0.2), False)] * 2
    entries = [
        Entry(Path("a"), source="coco", things=(*dogs, Thing(("knife",), (0, 0, 1, 1), True))),
        Entry(Path("b"), source="flickr8k", things=(Thing(("a man", "a tall man"), (0, 0, 1, 1), True),)),
        Entry(Path("c"), source="coco", things=(Thing(("cup",), (0, 0, 1, 1), True),)),
    ]

    def drawn(kind: str) -> list[Sample]:
        return SampleSource(entries, {kind: 1}).draw(200, 1, generator(2))

    assert {s.answer for s in drawn("things") if s.photo == 1} == {
        f"{article}{name}" for article in ("", "a ") for name in ("man", "tall man")
    }
    counted = {(s.prompt.split()[2], s.answer) for s in drawn("counts")}
    assert counted == {("dogs", "2"), ("knives", "1"), ("cups", "1")}
    asked = {(s.photo, s.prompt.split()[3].strip("?"), s.answer) for s in drawn("presence") if s.prompt[:2] == "Is"}
    assert asked == {
        (photo, name, "yes" if photo == (2 if name == "cup" else 0) else "no")
        for photo in (0, 2)
        for name in ("dog", "knife", "cup")
    }
    sought = {(s.photo, s.prompt, s.task, s.thing.box) for s in drawn("phrases") if s.thing}
    assert sought == {
        (photo, prompt, "box", (0, 0, 1, 1))
        for photo, prompt in ((0, "the knife"), (1, "a man"), (1, "a tall man"), (2, "the cup"))
    }


SPEC = ClipSpec(weights="none", patch=16, width=32, layers=3, heads=2, projection=8, image=64)


def test_features_that_were_cut_short_are_continued(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = ClipTower(SPEC).eval().requires_grad_(False)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    whole = np.array(teacher_features(tower, pixels, "key", tmp_path / "whole", batch=2).last)
    teacher_features(tower, pixels, "key", tmp_path / "cut", batch=2)
    (progress,) = (tmp_path / "cut").glob("*/done.json")
    progress.write_text('{"photos": 2}')
    np.lib.format.open_memmap(progress.parent / "last.npy", "r+")[2:] = 0
    assert np.array_equal(teacher_features(tower, pixels, "key", tmp_path / "cut", batch=2).last, whole)


def test_a_neck_starts_nearer_to_clip_than_its_mean() -> None:
    torch.manual_seed(0)
    tower = ClipTower(SPEC).eval().requires_grad_(False)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (8, 64, 64, 3), np.uint8)
    # Latents from which the patch embedding can be computed exactly: the pixels of each 16x16 patch, in part.
    y_hat = (
        pixels.reshape(8, 4, 16, 4, 16, 3).transpose(0, 2, 4, 5, 1, 3).reshape(8, 768, 4, 4).astype(np.float16) / 255
    )
    chunk = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    entry = tower.blocks(tower.embed(chunk), 0, 1).numpy().astype(np.float16)
    neck = TransformNeck(768, SPEC.grid, SPEC.width, SPEC.heads)
    given, wanted = torch.from_numpy(y_hat).float(), torch.from_numpy(entry).float()
    untrained = float(relative_error(neck(given), wanted, channel_variance(wanted)).detach())
    start_from_clip(neck, tower, y_hat, pixels, entry)
    started = float(relative_error(neck(given), wanted, channel_variance(wanted)).detach())
    assert started < 0.5 < untrained


def test_relative_error_is_one_for_the_mean_and_zero_for_the_truth() -> None:
    teacher = torch.randn(4, 10, 6) * 3 + 1
    teacher[..., 0] *= 1000  # counts for no more than another channel
    mean = teacher.mean((0, 1), keepdim=True).expand_as(teacher)
    assert float(relative_error(teacher, teacher, channel_variance(teacher))) == 0
    assert float(relative_error(mean, teacher, channel_variance(teacher))) == pytest.approx(1)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> CodecTraining:
    """A codec of two qualities, trained for two steps on noise."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    options = CodecTraining(
        photos=folder, out=folder / "run", cache=folder / "cache", N=8, M=12, groups=(4, 4, 4), lmbdas=(0.001, 0.01),
        steps=2, batch=2, crop=64,
    )  # fmt: skip
    train_codec(options)
    return options


def test_a_trained_codec_has_a_quality_for_each_lambda(tiny_run: CodecTraining) -> None:
    codec = Codec.load(tiny_run.out / "codec.safetensors")
    assert codec.qualities == (1, 2)
    photo = prepare(load_photo(tiny_run.photos / "0.png"), Preparation())
    assert len(codec.encode(photo, "d1", 1)) != len(codec.encode(photo, "d1", 2))
    assert (tiny_run.out / "curve.csv").read_text().startswith("step,loss,bpp1,psnr1,bpp2,psnr2")


def test_a_codec_trained_on_keeps_its_g_a_when_told_to(tiny_run: CodecTraining, tmp_path: Path) -> None:
    start = tiny_run.out / "codec.safetensors"
    train_codec(replace(tiny_run, start=start, keep_g_a=True, rate=0.5, out=tmp_path / "more"))
    before, after = read_artefact(start), read_artefact(tmp_path / "more" / "codec.safetensors")
    for one, other in zip(before.network.g_a.parameters(), after.network.g_a.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(before.network.h_a[0].weight, after.network.h_a[0].weight)


def test_a_batch_that_does_not_divide_among_the_qualities_is_refused(tiny_run: CodecTraining) -> None:
    with pytest.raises(BadInput, match="3 crops does not divide among 2 qualities"):
        train_codec(replace(tiny_run, batch=3))


def test_necks_are_trained_on_what_a_decoder_gets_at_each_quality_in_turn(
    tiny_run: CodecTraining, tmp_path: Path
) -> None:
    codec = Codec.load(tiny_run.out / "codec.safetensors")
    pixels = np.stack([load_photo(tiny_run.photos / f"{i}.png").pixels for i in range(4)])
    y_hat = latents(codec, pixels, (2, 1), tmp_path, batch=3)
    for i, quality in enumerate((2, 1, 2, 1)):
        stream = codec.encode(Photo(pixels[i], (256, 256)), "d1", quality)
        decoded = codec.decode(stream).y_hat[0].numpy()
        np.testing.assert_allclose(y_hat[i], decoded, atol=2e-3, rtol=2e-3)  # kept in half precision
