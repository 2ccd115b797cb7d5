"""How answers are judged: CIDEr for captions, naming for labels, overlap for boxes, bootstrap for how sure that is."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
Corners = tuple[float, float, float, float]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """CIDEr-D of each candidate against its references, times 100: the mean is the figure that papers report.

    pycocoevalcap's own scorer, with idf from these references. Its Java tokeniser is replaced by ``words``, which does
    the same on plain English: lower case, punctuation dropped.
    """
    from pycocoevalcap.cider.cider import Cider

    given = {i: [" ".join(words(text))] for i, text in enumerate(candidates)}
    wanted = {i: [" ".join(words(text)) for text in texts] for i, texts in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):
        _, scores = Cider().compute_score(wanted, given)
    return np.asarray(scores, np.float64) * 100


def words(text: str) -> list[str]:
    """Lower-case words of a text, without punctuation."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def names(answer: str, label: str) -> bool:
    """Whether the answer has the label's last word, its noun, as a word of its own.

    "A sandpiper on a beach." names "red-backed sandpiper". A plain plural counts as its singular, in either.
    """
    noun = _singular(words(label.replace("_", " "))[-1])
    return noun in {_singular(word) for word in words(answer)}


def box_overlaps(found: Sequence[Corners | None], wanted: Sequence[Corners]) -> Scores:
    """Intersection over union of each box that was found with the one that was wanted; 0 where none was found.

    As Shikra's authors compute it: coordinates, fractions of the padded picture, times 1000 in float32.
    """
    import torch
    from torchvision.ops import box_iou

    ours, true = torch.tensor([box or (0.0, 0.0, 0.0, 0.0) for box in found]), torch.tensor(wanted)
    return box_iou(1000 * ours.view(-1, 1, 4), 1000 * true.view(-1, 1, 4)).flatten().double().numpy()


def located(overlaps: Scores) -> Scores:
    """1 where a box is right, with an overlap above one half: the mean is the accuracy that papers report (REC)."""
    return (overlaps > 0.5).astype(np.float64)


def _singular(word: str) -> str:
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def interval(scores: Scores, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    random = np.random.default_rng(seed)
    means = scores[random.integers(len(scores), size=(draws, len(scores)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def kept_interval(through: Scores, pixels: Scores, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of mean(through) / mean(pixels), the same photos drawn for both."""
    random = np.random.default_rng(seed)
    drawn = random.integers(len(pixels), size=(draws, len(pixels)))
    ratios = through[drawn].mean(1) / np.maximum(pixels[drawn].mean(1), 1e-9)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
