"""LLaVA through our path against transformers' own path, on a tiny random LLaVA of the same classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from cloud_server.backends import Question, language_model, llava
from cloud_server.backends.llava import Llava, check_clip, last_block
from cloud_server.generation import whole
from cloud_server.vision.clip import MEAN, STD, ClipTower
from shared.conversation import Generation
from shared.errors import BadInput, WeightsUnavailable
from shared.profiles import BackendSpec, ClipSpec, get_profile
from shared.weights.convert import openai_clip_layout

IMAGE, EOS = 300, 2
CLIP = ClipSpec("tiny-clip", patch=14, width=32, layers=5, heads=2, projection=16, image=336)
PUBLISHED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nwhat is this? ASSISTANT:"
)
EXACT = {"atol": 1e-5, "rtol": 1e-5}


class Bytes:
    """A tokenizer whose tokens are the bytes of a text; each token has a character of its own."""

    bos: int | None = 1
    eos = EOS
    size = 259

    def encode(self, text: str) -> list[int]:
        return [3 + byte for byte in text.encode()]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(0x4E00 + token) for token in tokens)


@pytest.fixture(scope="module")
def clip() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=CLIP.width,
        intermediate_size=4 * CLIP.width,
        num_hidden_layers=CLIP.layers,
        num_attention_heads=CLIP.heads,
        projection_dim=CLIP.projection,
        image_size=CLIP.image,
        patch_size=CLIP.patch,
        initializer_factor=3.0,  # so that blocks change their tokens
    )
    return CLIPVisionModelWithProjection(config).eval()


@pytest.fixture(scope="module")
def model(clip: CLIPVisionModelWithProjection) -> LlavaForConditionalGeneration:
    torch.manual_seed(1)
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    made = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=clip.config, text_config=text, image_token_index=IMAGE)
    )
    made.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    return made.eval()


@pytest.fixture(scope="module")
def tower(clip: CLIPVisionModelWithProjection) -> ClipTower:
    made = ClipTower(CLIP).eval()
    made.visual.load_state_dict(openai_clip_layout(clip.state_dict()))
    return made


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Of one photo, in 0..1."""
    return torch.rand(1, 3, CLIP.image, CLIP.image, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(model: LlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as its publisher lays it out, in several files."""
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    monkeypatch.setattr(llava, "ensure", Path)
    monkeypatch.setattr(llava, "digest_of", lambda name: f"digest of {Path(name).name}")
    monkeypatch.setattr(language_model, "load_tokenizer", lambda folder: Bytes())
    return tmp_path


def load(folder: Path, clip: ClipSpec = CLIP) -> Llava:
    profile: Any = SimpleNamespace(clip=clip)
    return Llava.load(BackendSpec("llava", str(folder), prompt="vicuna-v1.1"), profile, torch.device("cpu"))


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(folder: Path, part: str) -> None:
    """Takes the tensors with ``part`` in their names out of the folder's files."""
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"] = {name: file for name, file in table["weight_map"].items() if part not in name}
    index.write_text(json.dumps(table))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor for name, tensor in tensors.items() if part not in name}, path, {"format": "pt"})


@pytest.fixture
def backend(folder: Path) -> Llava:
    return load(folder)


@pytest.fixture
def photo(tower: ClipTower, pixels: Tensor, backend: Llava) -> Tensor:
    """What the backend is given of the photo where the neck gives CLIP's true tokens."""
    with torch.inference_mode():
        true = tower.blocks(tower.embed(pixels), 0, CLIP.entry_block - 1)[0]
        sight = {CLIP.entry_block - 1: true}
        tower.see([sight], backend.needs.last_block)
        return tower.read(sight, backend.needs)


def normalised(pixels: Tensor) -> Tensor:
    """As transformers' LLaVA is given them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def published_tokens(prompt: str = PUBLISHED) -> Tensor:
    """Tokens of a prompt as the authors make them: each side of <image> by itself, and 576 in its place."""
    before, after = (Bytes().encode(text) for text in prompt.split("<image>"))
    return torch.tensor([[1, *before, *[IMAGE] * 576, *after]])


@torch.inference_mode()
def test_photos_become_the_visual_tokens_that_transformers_makes_of_them(
    model: LlavaForConditionalGeneration, backend: Llava, photo: Tensor, pixels: Tensor
) -> None:
    (theirs,) = model.get_image_features(normalised(pixels)).pooler_output
    assert theirs.shape == (576, 48)
    assert theirs.std() > 0.01
    torch.testing.assert_close(backend.project(photo), theirs, **EXACT)


@torch.inference_mode()
def test_a_whole_prompt_has_the_logits_that_transformers_gives_it(
    model: LlavaForConditionalGeneration, backend: Llava, photo: Tensor, pixels: Tensor
) -> None:
    theirs = model(published_tokens(), normalised(pixels)).logits
    prompt = backend.embed(Question((photo, "what is this?")))
    ours = backend.llm.model(inputs_embeds=prompt[None]).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_greedy_answer_has_the_tokens_that_transformers_writes(
    model: LlavaForConditionalGeneration, backend: Llava, photo: Tensor, pixels: Tensor
) -> None:
    tokens = published_tokens()
    theirs = model.generate(tokens, pixel_values=normalised(pixels), max_new_tokens=24, eos_token_id=EOS)
    answer = theirs[0, tokens.shape[1] :].tolist()
    assert len(set(answer)) > 4
    (text,), _ = whole(backend.write([Question((photo, "what is this?"))], Generation(max_tokens=24)))
    assert text == Bytes().decode([token for token in answer if token != EOS])


def test_questions_side_by_side_are_answered_as_each_alone(backend: Llava, photo: Tensor) -> None:
    questions = [
        Question((photo, "what is this?")),
        Question(("how many people are there?", photo.flip(0))),
        Question(("good morning",)),
    ]
    generation = Generation(max_tokens=12)
    texts, _ = whole(backend.write(questions, generation))
    assert texts == [whole(backend.write([question], generation))[0][0] for question in questions]
    assert len(set(texts)) == 3


@torch.inference_mode()
def test_a_question_without_a_photo_is_the_prompt_without_its_place(
    model: LlavaForConditionalGeneration, backend: Llava
) -> None:
    tokens = [1, *Bytes().encode(PUBLISHED.replace("<image>\n", ""))]
    assert torch.equal(backend.embed(Question(("what is this?",))), model.get_input_embeddings()(torch.tensor(tokens)))


@pytest.mark.parametrize(
    ("layer", "strategy", "block", "tokens"), [(-2, "default", 3, 576), (-1, "full", 4, 577), (3, "default", 2, 576)]
)
def test_the_checkpoints_config_says_what_is_read_of_clip(
    model: LlavaForConditionalGeneration,
    tower: ClipTower,
    pixels: Tensor,
    folder: Path,
    layer: int,
    strategy: str,
    block: int,
    tokens: int,
) -> None:
    configure(folder, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    backend = load(folder)
    assert backend.needs.last_block == block
    with torch.inference_mode():
        ours = backend.project(tower.blocks(tower.embed(pixels), 0, block)[0])
        (theirs,) = model.get_image_features(
            normalised(pixels), vision_feature_layer=layer, vision_feature_select_strategy=strategy
        ).pooler_output
    assert len(ours) == tokens
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("layer", [0, 6, -6, [-2, -5]])
def test_a_layer_that_is_no_block_of_clip_is_refused(folder: Path, layer: int | list[int]) -> None:
    configure(folder, vision_feature_layer=layer)
    with pytest.raises(BadInput, match=r"vision_feature_layer is .* not one of CLIP's 5 blocks"):
        load(folder)


def test_llava_as_published_fits_the_profile_that_is_made_for_it() -> None:
    published = LlavaConfig()  # transformers' defaults are LLaVA-1.5-7B's
    check_clip("llava-1.5-7b", published, get_profile("vit-l-14-336").clip)
    assert last_block(published) == 22
    with pytest.raises(BadInput, match=r"24 patches a side; clip-vit-l-14 has .* 16 patches a side"):
        check_clip("llava-1.5-7b", published, get_profile("vit-l-14").clip)


def test_the_checkpoints_own_vision_tower_is_not_needed(folder: Path, backend: Llava, photo: Tensor) -> None:
    question = Question((photo, "what is this?"))
    whole_prompt = backend.embed(question)
    drop(folder, "vision_tower.")
    assert torch.equal(load(folder).embed(question), whole_prompt)
    assert backend.digests == {"llm": f"digest of {folder.name}"}


def test_a_folder_without_the_projectors_tensors_is_refused(folder: Path) -> None:
    drop(folder, "multi_modal_projector.linear_1.")
    with pytest.raises(WeightsUnavailable, match=r"linear_1\.bias is missing; .*linear_1\.weight is missing"):
        load(folder)


def test_a_folder_without_one_of_the_language_models_tensors_is_refused(folder: Path) -> None:
    drop(folder, "layers.1.mlp.up_proj")
    with pytest.raises(WeightsUnavailable, match=r"language_model\.model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(folder)


def test_another_model_is_no_llava(folder: Path) -> None:
    configure(folder, model_type="llama")
    with pytest.raises(BadInput, match=r"is no llava: its config\.json has model_type 'llama'"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": 224}, "of 5 blocks of 32 channels, 24 patches a side; tiny-clip has .* 16 patches a side"),
        ({"layers": 12}, "tiny-clip has 12 blocks"),
        ({"entry_block": 4}, "reads block 3 of CLIP; the neck's tokens enter 4"),
    ],
)
def test_a_profile_with_another_clip_is_refused(folder: Path, change: dict[str, int], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        load(folder, replace(CLIP, **change))
