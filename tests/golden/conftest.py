"""Golden cases: outputs of the original implementations, rebuilt from formulas in MANIFEST.json.

The folder is ``COMNECK_GOLDEN``, or ``../shared/golden`` beside the checkout; where neither is there, these tests skip.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("COMNECK_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))


@dataclass(frozen=True)
class Golden:
    """One case: formula weights and inputs, recorded outputs and their tolerances."""

    case: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The original's state_dict, by formula; ``prefix`` is stripped and what lacks it left out."""
        return {
            spec["name"].removeprefix(prefix): torch.from_numpy(formula(spec, self.case["seed"]))
            for spec in self.case["tensors"]
            if spec["name"].startswith(prefix)
        }

    def input(self, name: str) -> Tensor:
        (spec,) = (spec for spec in self.case["inputs"] if spec["name"] == name)
        if spec["stored"]:
            return torch.from_numpy(self.arrays[spec["stored"]])
        return torch.from_numpy({"feature": feature, "image": image}[spec["rule"]](spec))

    def check(self, name: str, ours: Tensor) -> None:
        """Compares with the recorded output, element by element, at the strict tolerance."""
        (spec,) = (spec for spec in self.case["outputs"] if spec["name"] == name)
        assert list(ours.shape) == spec["shape"]
        values = ours.detach().float().numpy()
        wanted = self.arrays[name]
        given = values if spec["stride"] == 1 else values.reshape(-1)[:: spec["stride"]]
        np.testing.assert_allclose(given, wanted, rtol=0, atol=spec["strict_atol"])
        assert abs(values.sum(dtype=np.float64) - spec["sum"]) <= 1e-4 * spec["abs_sum"]


def formula(spec: dict[str, Any], seed: float) -> np.ndarray:
    """MANIFEST's weight formula: w[i] = b + s sin(0.7311 j + 0.5371 (j^2 mod 100003) + 0.1237 k + seed)."""
    j = np.arange(int(np.prod(spec["shape"])), dtype=np.int64) % 100003
    theta = 0.7311 * j + 0.5371 * ((j * j) % 100003) + (0.1237 * spec["k"] + seed)
    if spec["rule"] == "quantiles":  # (C, 1, 3): one median a channel, and as far to either side
        median = spec["s"] * np.sin(theta[: len(theta) // 3])
        return np.stack([median - spec["b"], median, median + spec["b"]], 1)[:, None].astype(np.float32)
    offset = {"scaled_sin": 0.0, "one_plus": 1.0}.get(spec["rule"], spec["b"])
    weights = (offset + spec["s"] * np.sin(theta)).astype(np.float32)
    np.testing.assert_allclose(weights[:2], spec["first2"][: len(weights)], rtol=1e-6)
    return weights.reshape(spec["shape"])


def feature(spec: dict[str, Any]) -> np.ndarray:
    """MANIFEST's input formula of rule ``feature``."""
    return input_of(spec, spec["amp"] * texture(spec))


def image(spec: dict[str, Any]) -> np.ndarray:
    """MANIFEST's input formula of rule ``image``, in 0..1."""
    channels, height, width = spec["shape"][1:]
    i = np.arange(int(np.prod(spec["shape"])), dtype=np.int64)
    c = i // (height * width) % channels
    waves = np.sin(spec["a"] * (i % 9973) + 0.31 * c + spec["seed"])
    return input_of(spec, 0.5 + 0.35 * waves + 0.15 * texture(spec))


def texture(spec: dict[str, Any]) -> np.ndarray:
    """What MANIFEST's input formulas share: sin(0.9 j + q j^2 + seed), flat."""
    j = np.arange(int(np.prod(spec["shape"])), dtype=np.int64) % 9973
    return np.sin(0.9 * j + spec["q"] * (j * j % 9973) + spec["seed"])


def input_of(spec: dict[str, Any], values: np.ndarray) -> np.ndarray:
    """Flat values in an input's type and shape, checked against its first four."""
    values = values.astype(np.float32)
    np.testing.assert_allclose(values[:4], spec["first4"], rtol=1e-6)
    return values.reshape(spec["shape"])


@pytest.fixture(scope="session")
def folder() -> Path:
    """That of the golden cases; skips where it is absent."""
    if not (FOLDER / "MANIFEST.json").exists():
        pytest.skip(f"no golden cases: {FOLDER} is absent; set COMNECK_GOLDEN to their folder")
    return FOLDER


@pytest.fixture(scope="session")
def golden(folder: Path):
    """Loads a case by name."""

    def load(name: str) -> Golden:
        cases = json.loads((folder / "MANIFEST.json").read_text())["cases"]
        (case,) = (case for case in cases if case["case"] == name)
        with np.load(folder / case["file"]) as arrays:
            return Golden(case, dict(arrays))

    return load


@pytest.fixture(scope="session")
def facts(folder: Path):
    """Loads one of the files that hold texts and boxes instead of arrays, by name."""

    def load(name: str) -> Any:
        return json.loads((folder / f"{name}.json").read_text())

    return load
