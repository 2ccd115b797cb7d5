"""Trains a LLaMA-Adapter connector on clean CLIP features: it never sees the codec or the neck, which is the claim.

loss = cross-entropy of the answer's tokens, the language model frozen
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cloud_server.backends import gated_attention
from cloud_server.backends.llama_adapter import Connector
from cloud_server.backends.prompts import Format, prompt_format
from cloud_server.backends.tokenizer import Tokenizer, load_tokenizer
from cloud_server.vision.clip import ClipTower
from shared.options import option
from shared.profiles import get_profile
from shared.weights.digest import Storage, save_tensors
from shared.weights.store import ensure
from training.features import Half, teacher_features
from training.loop import Losses, Schedule, generator, train
from training.photos import pixel_cache, read_photo_set
from training.samples import Sample, SampleSource


@dataclass(frozen=True)
class ConnectorTraining:
    """``comneck train connector``: a LLaMA-Adapter connector on clean features, resumable."""

    photos: Path = option("folder of photos with captions, labels or questions in its index.jsonl")
    out: Path = option("folder of the run: checkpoint, curve")
    cache: Path = option("folder for prepared photos and features, kept between runs")
    profile: str = option("profile whose CLIP and language model are connected", "small")
    width: int = option("channels of the connector", 384)
    heads: int = option("attention heads of the connector", 8)
    blocks: int = option("transformer blocks of the connector", 2)
    length: int = option("visual tokens per photo", 16)
    adapted_layers: int = option("how many of the language model's last layers are adapted", 24)
    steps: int = option("optimiser steps", 1000)
    batch: int = option("photos a step", 16)
    per_photo: int = option("exchanges a photo", 2)
    answer_tokens: int = option("longer answers are cut: a few long ones would make every batch slow", 20)
    rate: float = option("peak learning rate of the connector", 1e-3)
    gate_rate: float = option("peak learning rate of the gates, which start closed", 2e-2)
    seed: int = option("seed of weights and samples", 1)
    storage: Storage = option("of the trained weights: float16, int8 or float32", "int8")


@dataclass(frozen=True)
class Exchanges:
    """A batch: features (B, 1 + patches, projection), and B x per_photo exchanges as tokens (B x per_photo, T).

    ``targets`` holds the token to be predicted at each place, -100 where nothing is asked.
    """

    features: Tensor
    tokens: Tensor
    targets: Tensor


def run(options: ConnectorTraining) -> None:
    profile = get_profile(options.profile)
    backend = profile.backends[0]
    tower = ClipTower.load(profile.clip, ensure(profile.clip.weights))
    entries = [entry for entry in read_photo_set(options.photos) if entry.split == "train"]
    pixels = pixel_cache(entries, profile.preparation, options.cache)
    last = teacher_features(tower, pixels, profile.clip.weights, options.cache).last
    folder = ensure(backend.llm)
    tokenizer = load_tokenizer(folder)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=gated_attention.NAME)
    llm.eval().requires_grad_(False)
    torch.manual_seed(options.seed)
    connector = Connector(
        clip_width=profile.clip.projection,
        width=options.width,
        heads=options.heads,
        blocks=options.blocks,
        length=options.length,
        llm_width=llm.config.hidden_size,
        llm_layers=llm.config.num_hidden_layers,
        llm_heads=llm.config.num_attention_heads,
        adapted_layers=options.adapted_layers,
    )
    start_from_features(connector, tower, last)
    gates = [connector.cap_gate]
    others = [p for name, p in connector.named_parameters() if name != "cap_gate"]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": options.rate}, {"params": gates, "lr": options.gate_rate}], weight_decay=0.02
    )
    source = SampleSource(entries)
    format = prompt_format(backend.prompt)

    def batches(step: int) -> Iterator[Exchanges]:
        while True:
            samples = source.draw(options.batch, options.per_photo, generator(options.seed, step))
            photos = [sample.photo for sample in samples[:: options.per_photo]]
            with torch.inference_mode():
                features = tower.project(torch.from_numpy(np.stack([last[i] for i in photos])).float())
            yield Exchanges(features.clone(), *tokenise(samples, tokenizer, format, options.answer_tokens))
            step += 1

    def losses(batch: Exchanges, step: int) -> Losses:
        visual = connector(batch.features).repeat_interleave(options.per_photo, 0)
        adapters = connector.adapters(visual, llm.model.layers)
        hidden = llm.model(batch.tokens, adapters=adapters, use_cache=False).last_hidden_state
        asked = batch.targets >= 0
        loss = F.cross_entropy(llm.lm_head(hidden[asked]).float(), batch.targets[asked])
        return {"loss": loss, "gate": connector.cap_gate.tanh().abs().mean()}

    train(connector, optimizer, Schedule(options.steps, warmup=100), batches, losses, options.out)
    metadata = {"config": json.dumps(connector.config), "llm": backend.llm, "clip": profile.clip.weights}
    save_tensors(options.out / "connector.safetensors", connector.state_dict(), options.storage, metadata)


@torch.no_grad()
def start_from_features(connector: Connector, tower: ClipTower, last: Half, photos: int = 400) -> None:
    """Sets a connector up so that what sets photos apart is what it shows from the first step on.

    CLIP's tokens have a large part in common, which a random projection and LayerNorm would pass on as the signal:
    visual tokens would then differ between photos by an eighth of their size. ``clip_proj`` becomes the whitening
    projection onto the features' principal axes; the queries start small beside what they attend to, and the visual
    tokens at the size of the language model's own normalised states.
    """
    which = torch.linspace(0, len(last) - 1, min(photos, len(last))).long().tolist()
    features = tower.project(torch.from_numpy(np.stack([last[i] for i in which])).float()).flatten(0, 1)
    mean = features.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(features.T))  # ascending
    width = connector.clip_proj.out_features
    whitening = (axes[:, -width:] / variances[-width:].clamp(min=1e-6).sqrt()).T  # (width, clip_width)
    connector.clip_proj.weight.copy_(whitening)
    connector.clip_proj.bias.copy_(-whitening @ mean)
    nn.init.normal_(connector.visual_query.weight, std=0.02)
    nn.init.normal_(connector.cap_adapter_query.weight, std=0.1)
    nn.init.constant_(connector.visual_proj_norm.weight, 0.3)


def tokenise(samples: list[Sample], tokenizer: Tokenizer, format: Format, answer_tokens: int) -> tuple[Tensor, Tensor]:
    """Exchanges -> tokens and targets, (samples, T) each, padded on the right, where causal attention ignores it."""
    rows = []
    for sample in samples:
        prompt = format(tokenizer, sample.prompt)
        answer = [*tokenizer.encode(sample.answer), tokenizer.eos][:answer_tokens]
        rows.append((prompt + answer[:-1], [-100] * (len(prompt) - 1) + answer))
    longest = max(len(tokens) for tokens, _ in rows)
    tokens = torch.full((len(rows), longest), tokenizer.eos)
    targets = torch.full((len(rows), longest), -100)
    for i, (row, wanted) in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        targets[i, : len(wanted)] = torch.tensor(wanted)
    return tokens, targets
