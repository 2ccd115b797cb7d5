"""Shikra against the original's outputs: patches among words, prompts, boxes read and written, and their score."""

from __future__ import annotations

import hashlib

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cloud_server.backends.gated_attention import NAME
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.prompts import Format, prompt_format
from cloud_server.backends.shikra import AFTER, BEFORE, GROUP, Connector, box_text, parse_box, prompt_embeddings
from evaluation.metrics import box_overlaps, located
from shared.conversation import Box
from shared.images import Preparation

pytestmark = pytest.mark.golden
SQUARE = Preparation(256, 256, "pad")


class Numbers:
    """A tokenizer of texts that are tokens' numbers."""

    bos = None
    eos = 2
    size = 120

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


@torch.inference_mode()
def test_patches_among_words_give_the_originals_logits(golden) -> None:
    case = golden("shikra_tiny_splice")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=120,
        rms_norm_eps=1e-6,
        attn_implementation=NAME,
    )
    weights = case.weights()
    projector = {name: weights.pop(f"model.mm_projector.{name}") for name in ("weight", "bias")}
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    llm = LanguageModel(model, Numbers())
    connector = Connector(model, clip_width=1024)
    connector.mm_projector.load_state_dict(projector)
    connector.ends.copy_(llm.embed([111, 112]))

    visual = connector(case.input("vision_hidden_state_with_cls"))
    case.check("projected_patches", visual[:, 1:-1])
    tokens = case.input("text_ids") + 3
    prompts = []
    for row, own in zip(tokens.tolist(), visual, strict=True):
        before, after = (Numbers().decode(part) for part in (row[:6], row[6:]))
        prompts.append(prompt_embeddings(llm, Format(before), own, "text", after))
    logits = model(inputs_embeds=torch.stack(prompts)).logits
    assert logits.shape[1] == 274
    case.check("logits_first_7_positions", logits[:, :7])
    case.check("logits_positions_7_to_20", logits[:, 7:20])
    case.check("logits_last_10_positions", logits[:, -10:])
    assert logits[:, -1].argmax(-1).tolist() == case.case["facts"]["argmax_last"]


def test_the_prompt_is_the_originals_to_the_letter(facts) -> None:
    published = facts("prompts")["backends"]["shikra_rec"]
    format = prompt_format("vicuna-v1.1")
    image = f"<im_start>{'<im_patch>' * 256}<im_end>"
    written = {
        "prompt_with_question": f"{format.before}{{QUESTION}}{format.after}",
        "prompt_with_one_pinned_question": f"{format.before}{BEFORE}{{IMAGE}}{AFTER.format('{EXPR}')}{format.after}",
        "box_regex": GROUP.pattern,
    }
    for name, text in written.items():
        assert sha256(text) == published["string_hashes"][name]["sha256"]
    example = published["worked_example"]
    asked = AFTER.format(example["expression"])
    assert sha256(f"{format.before}{BEFORE}{image}{asked}{format.after}") == example["text_sha256"]


def test_a_box_is_read_where_the_original_reads_one_and_nowhere_else(facts) -> None:
    for row in facts("shikra_boxes")["parse_table"]:
        assert parse_box(row["text"]) == (row["box"] and tuple(row["box"])), row["text"]


def test_a_box_in_a_photo_is_written_as_the_original_writes_it(facts) -> None:
    for row in facts("shikra_boxes")["square_conversion"]:
        assert box_text(Box(*row["box_xyxy"]), tuple(row["image_wh"]), SQUARE) == row["target_string"]


def test_boxes_score_as_in_the_original(facts) -> None:
    scoring = facts("shikra_boxes")["iou_scoring"]
    pairs, together = scoring["pairs"], scoring["all_pairs_together"]
    found = [parse_box(pair["pred"]) for pair in pairs]
    wanted = [parse_box(pair["target"]) for pair in pairs]
    overlaps = box_overlaps(found, wanted)
    assert overlaps.tolist() == [pair["iou"] for pair in pairs]
    assert located(overlaps).tolist() == [pair["correct"] for pair in pairs]
    assert found.count(None) == together["failed"]
    assert located(overlaps).mean() == together["accuracy"]
    assert overlaps.mean() == pytest.approx(together["iou"], abs=1e-7)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
