"""The example of docs/backends.md, taken out of the page and run: package, catalogue, profile, question, answer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scripted import CODEC_DIGEST, SETTINGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cloud_server.backends import Question, backends
from cloud_server.engine import Engine
from cloud_server.pipeline import Pipeline
from cloud_server.vision.clip import ClipTower
from cloud_server.vision.neck import TransformNeck
from shared.bitstream import Bitstream
from shared.codecs.codec import Codec, Latents
from shared.conversation import Conversation, Generation
from shared.errors import BadInput
from shared.profiles import ClipSpec, get_profile
from shared.weights.catalogue import HubSource, catalogue
from shared.weights.digest import save_tensors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
WIDTH, LLM_WIDTH, TOKENS = 32, 48, 4
SIZES = {"width": WIDTH, "layers": 4, "heads": 2, "projection": 16}  # of the tiny CLIP


def block(language: str, text: str) -> str:
    """The one block of the page in that language that has that text."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if text in code]
    return found


@dataclass
class ScriptedCodec:
    """Decodes every bitstream to latents drawn by its payload's length."""

    M: int = 192
    qualities: tuple[int, ...] = (1, 2, 3, 4)
    digest: str = "c0dec"
    digest_bytes: bytes = bytes.fromhex(CODEC_DIGEST)

    def decode_all(self, bitstreams: Sequence[Bitstream]) -> list[Latents]:
        seeds = (torch.Generator().manual_seed(len(one.payload)) for one in bitstreams)
        return [Latents(torch.randn(1, self.M, 16, 16, generator=seed), (256, 256)) for seed in seeds]


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """That of a server on a machine where the page was followed, all its models tiny and random."""
    home, package = tmp_path / "home", tmp_path / "package"
    monkeypatch.setenv("COMNECK_HOME", str(home))
    monkeypatch.setattr(Codec, "load", lambda path: ScriptedCodec())
    monkeypatch.syspath_prepend(package)
    caches: list[Any] = [
        catalogue.cache_clear,
        get_profile.cache_clear,
        lambda: backends.__dict__.pop("_entries", None),
    ]
    for forget in caches:
        forget()
    torch.manual_seed(0)
    write_package(package)
    write_profile_and_catalogues(home)
    install_base_models(home / "weights")
    yield Pipeline.load("mine", "cpu")
    forget()
    sys.modules.pop("comneck_prefix", None)


def forget() -> None:
    """What processes keep of catalogues, profiles and entry points."""
    catalogue.cache_clear()
    get_profile.cache_clear()
    backends.__dict__.pop("_entries", None)


def write_package(folder: Path) -> None:
    """As pip would have installed it."""
    info = folder / "comneck_prefix-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / "comneck_prefix.py").write_text(block("python", "class Prefix(Backend)"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: comneck-prefix\nVersion: 0.1\n")
    declared = re.search(r'(\w+) = "(.*)"', block("toml", "entry-points"))
    assert declared
    (info / "entry_points.txt").write_text(f"[comneck.backends]\n{declared[1]} = {declared[2]}\n")


def install_base_models(weights: Path) -> None:
    """Puts a tiny CLIP and a tiny language model where the store would have put the real ones."""
    clip, llm = weights / "clip-vit-b-16", weights / "smollm2-135m-instruct"
    for folder in (clip, llm):
        folder.mkdir(parents=True)
    tower = ClipTower(ClipSpec("clip-vit-b-16", patch=16, image=256, **SIZES))
    save_file(tower.visual.state_dict(), clip / "model.safetensors")

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(llm)
    config = LlamaConfig(
        hidden_size=LLM_WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=300,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(llm)
    for folder in (clip, llm):
        write_receipt(folder)


def write_receipt(folder: Path) -> None:
    source = catalogue()[folder.name].sources[0]
    assert isinstance(source, HubSource)
    receipt = {
        "artefact": folder.name,
        "source": str(source),
        "fetched": {file.name: file.sha256 for file in source.files},
        "installed": "",
        "files": [{"name": path.name, **pins(path)} for path in folder.iterdir()],
    }
    (folder / "receipt.json").write_text(json.dumps(receipt))


def pins(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_profile_and_catalogues(home: Path) -> None:
    for name in ("profiles", "catalogues"):
        (home / name).mkdir(parents=True)
    small = (ROOT / "shared" / "profiles" / "small.toml").read_text().split("[[backends]]")[0]
    small = small.replace('name = "small"', 'name = "mine"').replace("small-neck-d1", "tiny-neck")
    for name, size in SIZES.items():
        small = re.sub(rf"(\[clip\].*?\n{name} = )\d+", rf"\g<1>{size}", small, flags=re.DOTALL)
    (home / "profiles" / "mine.toml").write_text(small + block("toml", "[[backends]]"))

    catalogues = home / "catalogues"
    save_tensors(catalogues / "tiny-neck.safetensors", TransformNeck(192, 16, WIDTH, 2).state_dict(), "float32")
    prefix = torch.nn.Linear(WIDTH, TOKENS * LLM_WIDTH)
    save_tensors(catalogues / "my-prefix.safetensors", prefix.state_dict(), "float32")
    entry = block("toml", "[[artefact]]")
    for name in ("tiny-neck", "my-prefix"):
        pin = pins(catalogues / f"{name}.safetensors")
        own = entry.replace("my-prefix", name).replace("size = 1", f"size = {pin['size']}")
        (catalogues / f"{name}.toml").write_text(own.replace("the file's", pin["sha256"]))


@pytest.fixture
def engine(pipeline: Pipeline) -> Engine:
    return Engine(pipeline, SETTINGS)


def conversation(*parts: str | Bitstream, **fields: Any) -> Conversation:
    return Conversation(parts, generation=Generation(max_tokens=12), **fields)


async def test_the_answer_is_what_transformers_writes_after_the_prefix(
    pipeline: Pipeline, engine: Engine, bitstream: Bitstream
) -> None:
    backend: Any = pipeline.backend("prefix")
    assert type(backend).__module__ == "comneck_prefix"
    tokenizer = backend.llm.tokenizer
    with torch.inference_mode():
        tokens = pipeline.tower.blocks(pipeline.enter([bitstream]), 2, SIZES["layers"] - 2)  # (1, 257, D)
        prefix = backend.projection(tokens[:, 1:].mean(1)).view(1, TOKENS, LLM_WIDTH)
        prompt = backend.llm.embed(backend.format(tokenizer, "what is this?"))[None]
        whole = torch.cat([prefix, prompt], 1)
        mask = torch.ones(whole.shape[:2], dtype=torch.long)
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.eos, "pad_token_id": 0}
        written = backend.llm.model.generate(inputs_embeds=whole, attention_mask=mask, **settings)[0]
    answer = await engine.answer(conversation(bitstream, "what is this?"))
    assert answer.text == tokenizer.decode(written.tolist())
    assert len(answer.text) > 3
    assert (answer.backend, answer.profile, answer.task) == ("prefix", "mine", "text")
    weights = Path(os.environ["COMNECK_HOME"], "catalogues", "my-prefix.safetensors")
    assert answer.digests["connector"] == pins(weights)["sha256"]


async def test_the_answer_is_about_the_photo(engine: Engine, bitstream: Bitstream) -> None:
    other = replace(bitstream, payload=b"another photo")
    first, second = [await engine.answer(conversation(photo, "what is this?")) for photo in (bitstream, other)]
    assert first.text != second.text


async def test_a_choice_reaches_the_model_and_is_found_in_its_answer(
    pipeline: Pipeline, engine: Engine, bitstream: Bitstream
) -> None:
    choices = ("a cat", "a dog")
    answer = await engine.answer(conversation(bitstream, "what is this?", task="choice", choices=choices))
    assert answer.task == "choice"
    assert answer.text != (await engine.answer(conversation(bitstream, "what is this?"))).text
    backend, question = pipeline.backend("prefix"), Question(("what is this?",), "choice", choices)
    assert [backend.find(text, question).choice for text in (" A dog.", "a cat", "a horse")] == [1, 0, None]


async def test_what_the_example_cannot_do_is_refused(engine: Engine, bitstream: Bitstream) -> None:
    for parts, task, told in (
        (("hello",), "text", "there is no photo"),
        ((bitstream, " "), "text", "the prompt is empty"),
        ((bitstream, "where?"), "box", "box"),
    ):
        with pytest.raises(BadInput, match=told):
            await engine.answer(conversation(*parts, task=task))
