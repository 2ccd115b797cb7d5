"""Checkpoints of published models: what is said of one, and what an import makes of it. The models are tiny."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared import memory
from shared.errors import BadInput, UnknownName, WeightsUnavailable
from shared.weights import importing, models
from shared.weights.catalogue import catalogue, find_artefact, read_catalogue
from shared.weights.cli import add_weights_command
from shared.weights.codebook import Codebook
from shared.weights.convert import shikra_from_delta
from shared.weights.digest import load_tensors, read_metadata
from shared.weights.folders import TensorFolder, listed
from shared.weights.models import (
    LLAMA_ADAPTER,
    LLAMA_TOKENS,
    MODELS,
    PublishedModel,
    check,
    count_tokens,
    llama,
    llama_adapter,
)
from shared.weights.store import Store

WIDTH = 4


def tiny(name: str, rows: int = LLAMA_TOKENS, **more: tuple[int, ...]) -> PublishedModel:
    shapes = llama(tokens=rows, width=WIDTH, hidden=6, layers=1) | more
    return PublishedModel(name, "llm", name.capitalize(), "MIT", shapes, config={"num_attention_heads": 2})


TINY = tiny("llama-7b")
SHIKRA = tiny(
    "shikra-7b", LLAMA_TOKENS + 3, **{"model.mm_projector.weight": (WIDTH, 5), "model.mm_projector.bias": (4,)}
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path / "home"))
    for model in (TINY, SHIKRA):
        monkeypatch.setitem(MODELS, model.name, model)
    catalogue.cache_clear()
    yield tmp_path / "home"
    catalogue.cache_clear()


def random(model: PublishedModel, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape).half() for name, shape in model.shapes.items()}


def write(folder: Path, tensors: dict[str, Tensor], tokens: int = LLAMA_TOKENS, **config: Any) -> Path:
    """A Hugging Face folder with a tokenizer of so many tokens, the last of them an added one; 0: without any."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 2, **config}))
    if tokens:
        vocabulary = {str(token): token for token in range(tokens - 1)}
        tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": tokens - 1}]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


# --- check ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_as_it_should_be_has_no_problems(tmp_path: Path) -> None:
    tensors = random(TINY) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    report = check(TINY, write(tmp_path, tensors))
    assert report.problems == []
    assert (report.tokens, report.tensors) == (32000, 13)
    assert report.parameters == sum(tensor.numel() for tensor in random(TINY).values())
    assert report.size == (tmp_path / "model.safetensors").stat().st_size


def test_all_that_is_wrong_is_found_at_once(tmp_path: Path) -> None:
    tensors = random(TINY) | {"model.norm.bias": torch.ones(4), "lm_head.weight": torch.zeros(5, 4)}
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(4, dtype=torch.int8)
    assert check(TINY, write(tmp_path, tensors, tokens=32001, num_attention_heads=4)).problems == [
        "lm_head.weight is (5, 4) instead of (32000, 4)",
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.norm.bias is not known",
        "model.norm.weight is of int8, no floating-point type",
        "its configuration has num_attention_heads 4 instead of 2",
        "the tokenizer has 32,001 tokens instead of 32,000: it is another model's",
    ]


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, random(TINY))
    monkeypatch.setattr(TensorFolder, "__getitem__", lambda self, name: pytest.fail(f"{name} is read"))
    assert check(TINY, tmp_path).problems == []


def test_another_shape_that_is_as_good_is_taken(tmp_path: Path) -> None:
    other = tiny("llama-7b", **{"pos_emb": (1, 4, 2)})
    model = PublishedModel(**{**vars(other), "others": {"pos_emb": (1, 5, 2)}})
    for positions, problems in ((4, []), (5, []), (6, ["pos_emb is (1, 6, 2) instead of (1, 4, 2)"])):
        tensors = random(model) | {"pos_emb": torch.ones(1, positions, 2)}
        assert check(model, write(tmp_path, tensors)).problems == problems


@pytest.mark.parametrize(("tokens", "fits"), [(31999, False), (32000, True), (32003, True), (32004, False)])
def test_a_tokenizer_has_llamas_tokens_and_at_most_as_many_as_there_are_embeddings(
    tmp_path: Path, tokens: int, fits: bool
) -> None:
    problems = check(SHIKRA, write(tmp_path, random(SHIKRA), tokens)).problems
    assert problems == (
        [] if fits else [f"the tokenizer has {tokens:,} tokens instead of 32,000 to 32,003: it is another model's"]
    )


def test_a_sentencepiece_tokenizer_counts_with_the_tokens_that_were_added_to_it(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    sentences = iter(["a photo of a dog", "a photo of two cats"])
    prefix = tmp_path / "tokenizer"
    SentencePieceTrainer.train(sentence_iterator=sentences, model_prefix=prefix, vocab_size=15, minloglevel=2)
    assert count_tokens(tmp_path) == 15
    (tmp_path / "added_tokens.json").write_text('{"<im_patch>": 15, "<im_end>": 17}')
    assert count_tokens(tmp_path) == 18


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.model", "nonsense", "tokenizer.model describes no tokenizer"),
        ("tokenizer.json", "nonsense", "tokenizer.json is no JSON"),
        ("tokenizer.json", '{"model": {}}', "tokenizer.json describes no tokenizer"),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [3]}', "tokenizer.json describes no tokenizer"),
        ("README.md", "", "there is no tokenizer in"),
    ],
)
def test_a_tokenizer_that_is_missing_or_damaged_is_said_so(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=reason):
        count_tokens(tmp_path)


def test_a_long_list_is_cut_with_a_count() -> None:
    assert listed([str(i) for i in range(5)], most=3) == "0; 1; 2; and 2 more"
    assert listed(["a", "b"]) == "a; b"


def test_free_memory_is_what_the_machine_and_the_container_have(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:      64 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", tmp_path / "memory.max")
    assert memory.free_memory() == 65536
    (tmp_path / "memory.max").write_text("4096\n")
    assert memory.free_memory() == 4096
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory() == 65536
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "nothing")
    assert memory.free_memory() > 2**20


# --- import --------------------------------------------------------------------------------------------------------


def test_a_model_is_used_where_it_lies(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "7B", random(TINY))
    name = importing.import_model("llama-7b", folder)
    store = Store()
    status = store.status(name)
    assert (status.state, status.path, status.origin) == ("imported", folder, "import 7B")
    assert status.size == sum(path.stat().st_size for path in folder.iterdir())
    assert len(store.digest(name)) == 64
    store.verify(name)
    assert [path.name for path in (home / "catalogues").iterdir() if not path.name.startswith(".")] == [
        "llama-7b.imported.toml"
    ]


def test_a_model_that_has_changed_or_gone_since_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path / "7B", random(TINY))
    importing.import_model("llama-7b", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsUnavailable, match=r"model\.safetensors has changed; import 7B again"):
        Store().verify("llama-7b")
    (folder / "tokenizer.json").write_text("{}")
    assert Store().status("llama-7b").state == "damaged"
    for path in folder.iterdir():
        path.unlink()
    assert Store().status("llama-7b").state == "missing"
    with pytest.raises(WeightsUnavailable, match=r"model\.safetensors is missing: import 7B again"):
        Store().path("llama-7b")


def test_importing_again_takes_the_other_folder_and_leaves_the_first_alone(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, random(TINY, seed)) for seed, name in enumerate(("first", "second")))
    importing.import_model("llama-7b", first)
    digest = Store().digest("llama-7b")
    importing.import_model("llama-7b", second)
    assert Store().path("llama-7b") == second
    assert Store().digest("llama-7b") != digest
    assert (first / "model.safetensors").exists()


def test_a_model_of_several_files_has_one_digest_of_all(tmp_path: Path) -> None:
    tensors = random(TINY)
    folder = write(tmp_path / "7B", tensors)
    (folder / "model.safetensors").unlink()
    names = [*tensors]
    places = {}
    for file, part in (("model-1.safetensors", names[:5]), ("model-2.safetensors", names[5:])):
        save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    importing.import_model("llama-7b", folder)
    digest = Store().digest("llama-7b")
    tensors["lm_head.weight"] += 1
    save_file({name: tensors[name] for name in names[:5]}, folder / "model-1.safetensors")
    importing.import_model("llama-7b", folder)
    assert Store().digest("llama-7b") != digest


def test_what_is_another_model_is_not_imported(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "7B", random(TINY) | {"extra": torch.ones(1)})
    with pytest.raises(BadInput, match="7B is not Llama-7b: extra is not known"):
        importing.import_model("llama-7b", folder)
    with pytest.raises(
        UnknownName, match=r"llama-7b is not on this machine: .*`comneck weights import llama-7b FOLDER`"
    ):
        find_artefact("llama-7b", catalogue())
    assert not home.exists()


# --- Shikra --------------------------------------------------------------------------------------------------------


def shikra(tmp_path: Path) -> tuple[Path, Path, dict[str, Tensor], dict[str, Tensor]]:
    base, delta = random(TINY, 1), random(SHIKRA, 2)
    needless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    config = {"model_type": "shikra", "architectures": ["ShikraLlamaForCausalLM"], "mm_hidden_size": 5}
    folders = write(tmp_path / "llama", base, tokens=0), write(tmp_path / "delta", delta | needless, 32003, **config)
    return *folders, base, delta


@pytest.mark.parametrize("shard", [1 << 30, 300_000, 1])
def test_shikra_is_llama_and_the_delta_added_and_the_rest_the_deltas(tmp_path: Path, shard: int) -> None:
    base_folder, delta_folder, base, delta = shikra(tmp_path)
    (tmp_path / "made").mkdir()
    shikra_from_delta(base_folder, delta_folder, tmp_path / "made", shard)
    made = TensorFolder(tmp_path / "made")
    assert made.keys() == delta.keys()
    assert len(made.files) == {1 << 30: 1, 300_000: 2, 1: len(delta)}[shard]
    for name, theirs in delta.items():
        assert made[name].dtype == torch.float16
        rows = base.get(name, theirs[:0])
        assert torch.equal(made[name][: len(rows)], theirs[: len(rows)] + rows)
        assert torch.equal(made[name][len(rows) :], theirs[len(rows) :])
    assert made.config["model_type"] == "llama"
    assert made.config["mm_hidden_size"] == 5
    assert check(SHIKRA, tmp_path / "made").problems == []


def test_imported_shikra_is_an_artefact_that_may_move_with_the_cache_folder(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta, *_ = shikra(tmp_path)
    for _ in range(2):  # again, over itself
        name = importing.import_shikra(base, delta)
        store = Store()
        store.verify(name)
        assert store.path(name).parent == home / "catalogues"
    assert len([path for path in (home / "catalogues").iterdir() if path.is_dir()]) == 1
    digest = store.digest(name)
    home.rename(tmp_path / "moved")
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path / "moved"))
    catalogue.cache_clear()
    Store().verify(name)
    assert Store().digest(name) == digest


def test_another_delta_replaces_what_the_first_one_made(tmp_path: Path, home: Path) -> None:
    base, delta, *_ = shikra(tmp_path)
    importing.import_shikra(base, delta)
    first = Store().path("shikra-7b")
    write(delta, random(SHIKRA, 3), 32003)
    importing.import_shikra(base, delta)
    assert Store().path("shikra-7b") != first
    assert not first.exists()


@pytest.mark.parametrize("wrong", ["base", "delta"])
def test_a_wrong_base_or_delta_is_refused_and_nothing_is_left(tmp_path: Path, home: Path, wrong: str) -> None:
    base, delta, *_ = shikra(tmp_path)
    model = TINY if wrong == "base" else SHIKRA
    folder = base if wrong == "base" else delta
    write(folder, {**random(model), "model.norm.weight": torch.zeros(5)}, 32003)
    with pytest.raises(BadInput, match=rf"{folder} is not {model.summary}: model.norm.weight is \(5,\)"):
        importing.import_shikra(base, delta)
    assert not home.exists()


def test_a_sum_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path: Path, home: Path) -> None:
    base, delta, tensors, _ = shikra(tmp_path)
    write(base, {**tensors, "model.norm.weight": torch.full((4,), torch.inf).half()}, tokens=0)
    with pytest.raises(BadInput, match=r"model\.norm\.weight of .* adds up to values that are not finite"):
        importing.import_shikra(base, delta)
    assert [path.name for path in (home / "catalogues").iterdir()] == [".import.lock"]


def test_a_disk_without_room_for_shikra_is_said_before_anything_is_written(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, delta, *_ = shikra(tmp_path)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    with pytest.raises(WeightsUnavailable, match=r"shikra-7b takes 0\.0 GB, and the disk of .* free some space"):
        importing.import_shikra(base, delta)
    assert [path.name for path in (home / "catalogues").iterdir()] == [".import.lock"]


# --- connectors ----------------------------------------------------------------------------------------------------


def test_llama_adapters_release_becomes_a_connector_with_its_gates_stacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = LLAMA_ADAPTER | {"clip_width": 6, "width": 4, "llm_width": 8, "llm_layers": 4, "llm_heads": 2}
    small |= {"length": 3, "adapted_layers": 2}
    for name, value in small.items():
        monkeypatch.setitem(LLAMA_ADAPTER, name, value)
    published = MODELS["llama-adapter-caption-vit-l"]
    model = PublishedModel(**{**vars(published), "shapes": llama_adapter(**small)})
    monkeypatch.setitem(MODELS, model.name, model)
    tensors = random(model)
    other = {"adapter_query.weight": torch.ones(6, 8), "layers.2.attention.gate": torch.ones(1)}
    torch.save(tensors | other, tmp_path / "caption.pth")

    name = importing.import_llama_adapter(tmp_path / "caption.pth")
    path = Store().path(name)
    made = load_tensors(path)
    assert made.keys() == {name for name in tensors if not name.endswith("cap_gate")} | {"cap_gate"}
    gates = [tensors[f"layers.{i}.attention.cap_gate"] for i in (2, 3)]
    assert torch.equal(made["cap_gate"], torch.stack(gates).float())
    assert torch.equal(made["visual_blocks.1.mlp.fc1.bias"], tensors["visual_blocks.1.mlp.fc1.bias"].float())
    assert json.loads(read_metadata(path)["config"]) == small | {"heads": 16}


def test_v2ls_codebook_becomes_a_connector(tmp_path: Path) -> None:
    import numpy as np

    words, places = [f"word {i}" for i in range(30)], torch.randn(30, 5)
    np.save(tmp_path / "vocabulary.npy", np.array(words))
    torch.save(places, tmp_path / "embedding.pth")
    name = importing.import_v2l(tmp_path / "vocabulary.npy", tmp_path / "embedding.pth")
    codebook = Codebook.load(Store().path(name))
    assert (name, codebook.words) == ("v2l-codebook", tuple(words))
    assert torch.equal(codebook.places, places)


# --- the command ---------------------------------------------------------------------------------------------------


def weights(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_weights_command(parser.add_subparsers())
    args = parser.parse_args(["weights", *arguments])
    args.run(args)


def test_check_prints_what_it_found_and_fails_where_something_is_wrong(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("shared.weights.cli.free_memory", lambda device: 16_200_000_000)
    folder = write(tmp_path / "7B", random(TINY))
    weights("check", "llama-7b", str(folder))
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: 12 tensors, 0.0 GB",
        "tokenizer: 32,000 tokens",
        "memory to load it: 0.0 GB in float32, 0.0 GB in float16 or bfloat16; free: 16.2 GB on cpu",
    ]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="7B is not Llama-7b as it was published"):
        weights("check", "llama-7b", str(folder), "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["tensors"], report["tokens"], len(report["problems"])) == (12, None, 1)
    parameters = sum(tensor.numel() for tensor in random(TINY).values())
    assert report["memory"] == {"float32": 4 * parameters, "float16": 2 * parameters, "bfloat16": 2 * parameters}


def test_check_cuts_a_long_list_and_says_how_much_it_leaves_out(tmp_path: Path, capsys) -> None:
    with pytest.raises(BadInput):
        weights("check", "honeybee-7b", str(write(tmp_path / "7B", random(TINY))))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("wrong: ")]) == 20
    assert re.fullmatch(r"and [\d,]+ more \(--json lists all\)", lines[-1])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["shikra", "--base", "llama"], "importing shikra needs --delta"),
        (["llama-7b"], "importing llama-7b needs PATH"),
        (["llama-7b", "7B", "--quality", "2"], "importing llama-7b takes no --quality"),
        (["v2l", "codebooks"], "importing v2l takes no PATH"),
        (["d1_2.pth.tar", "7B"], r"importing d1_2\.pth\.tar takes no PATH"),
        (["llama-adapter", "a.pth", "--base", "b"], "importing llama-adapter takes no --base"),
    ],
)
def test_an_import_with_other_arguments_than_it_takes_is_refused(arguments: list[str], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        weights("import", *arguments)


def test_import_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, delta, *_ = shikra(tmp_path)
    weights("import", "shikra", "--base", str(base), "--delta", str(delta))
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["shikra-7b", "llm"]
    weights("import", "llama-7b", str(write(base, random(TINY))), "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["state"], row["path"]) == ("llama-7b", "imported", str(base))


def test_every_model_has_a_recipe_that_names_its_import() -> None:
    for name in models.MODELS:
        with pytest.raises(UnknownName, match="`comneck weights import "):
            find_artefact(name, {})


def test_a_users_catalogue_with_the_name_of_a_model_is_named(tmp_path: Path, home: Path) -> None:
    folder = write(tmp_path / "7B", random(TINY))
    importing.import_model("llama-7b", folder)
    path = home / "catalogues" / "llama-7b.imported.toml"
    path.rename(path.with_name("mine.toml"))
    assert [artefact.name for artefact in read_catalogue(path.with_name("mine.toml"))] == ["llama-7b"]
    with pytest.raises(BadInput, match=r"the name llama-7b is taken in the catalogue .*mine\.toml"):
        importing.import_model("llama-7b", folder)
