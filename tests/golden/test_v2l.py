"""V2L-Tokenizer against the originals: a photo's words, the prompt in both modes, which tokens are allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloud_server.backends.v2l_tokenizer import LAYOUTS, nearest, union_table
from shared.weights.codebook import Codebook

pytestmark = pytest.mark.golden

PUBLISHED_PLACES = 16  # of an answer


def test_a_photos_words_are_the_originals(golden) -> None:
    case = golden("v2l_lookup")
    scale = (1 + 0.35 * np.sin(0.9 * np.arange(500) + case.case["seed"])).astype(np.float32)
    places = case.input("codebook_base") * torch.from_numpy(scale)[:, None]
    mixed = [4 * places[(37 * b + 11) % 500] + 3 * places[(53 * b + 101) % 500] for b in range(4)]
    features = 0.15 * case.input("features") + 9 * torch.stack(mixed)
    codebook = Codebook(tuple(map(str, range(500))), places)
    distances, indices = nearest(codebook, features)
    np.testing.assert_array_equal(indices.numpy(), case.arrays["indices21"])
    np.testing.assert_allclose(distances.numpy(), case.arrays["distances21"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("mode", ["fixed", "leak"])
def test_the_prompt_is_the_originals_segment_by_segment(facts, mode: str) -> None:
    prompts = facts("v2l_fewshot_prompt")
    names = prompts["input"]["class_names_of_six_images_query_last"]
    words = ["".join(f"t{n}" if n % 3 else f"a t{n}" for n in indices) for indices in prompts["input"]["indices"]]
    photos = list(zip(words, names, strict=True))
    examples = photos if mode == "leak" else photos[:-1]
    layout = LAYOUTS["plain"]
    ours = ["<BOS>", *layout.before(examples), *layout.after(words[-1])]
    assert ours == prompts["results"][mode]["segments"]


def test_the_tokens_allowed_are_the_originals_place_by_place(facts) -> None:
    prompts = facts("v2l_fewshot_prompt")
    labels = sorted(set(prompts["input"]["class_names_of_six_images_query_last"]))
    chunked = [[*(label[i : i + 3] for i in range(0, len(label), 3)), "<EOS>"] for label in labels]
    chunks = sorted({chunk for label in chunked for chunk in label})
    table = union_table([[chunks.index(chunk) for chunk in label] for label in chunked], len(chunks))
    ours = [[chunks[token] for token in row.nonzero().flatten()] for row in table]
    wanted = prompts["results"]["fixed"][
        "allowed_tokens_per_output_position_with_a_toy_tokenizer_of_3_character_chunks"
    ]
    assert ours + [[]] * (PUBLISHED_PLACES - len(ours)) == wanted
