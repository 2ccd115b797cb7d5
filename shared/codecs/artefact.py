"""A codec's artefact: one safetensors file with everything that an encoder or a decoder needs, as data.

    g_a.* h_a.* g_s.*        transforms, floating point
    exact.*                  the entropy path, integers
    tables.{z,y}.*           probability tables, integers; tables.thresholds: which of y's table a scale takes
    gains, inverse_gains     (qualities, M): y is multiplied by one before it is coded, y_hat by the other after
    network.*, bottleneck.*  the entropy path as it was trained, for training on; may be left out

The digest covers what gives a bitstream its meaning: exact, tables, inverse gains and sizes. It is the same whether g_a
is stored in single or half precision, and whether a machine has g_s or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.codecs import codecs
from shared.codecs.entropy import TOTAL, Tables
from shared.codecs.exact import Checked
from shared.codecs.interface import SCALE_UNIT, EntropyPath, Network
from shared.codecs.ranges import measured_ranges
from shared.errors import BadInput, WeightsUnavailable
from shared.weights.digest import Storage, load_tensors, read_metadata, save_tensors, tensors_digest
from shared.weights.folders import differences

TRANSFORMS = ("g_a", "h_a", "g_s")
SCALES = np.exp(np.linspace(np.log(0.11), np.log(256), 64))  # CompressAI's table
ESCAPE = 2**-16  # a table's probability for symbols outside it, at least
REACH = 6.5  # standard deviations that a table of y covers to either side


@dataclass(frozen=True)
class Artefact:
    """What ``read_artefact`` gives.

    Attributes:
        network: in eval mode; without its entropy path where the artefact has none.
        path: the entropy path.
        z_tables: one per channel of z.
        y_tables: one per scale.
        thresholds: (T - 1,) int32 in units of SCALE_UNIT; a scale takes the table whose number of them it reaches.
        gains, inverse_gains: (qualities, M).
        qualities: the rate points that it can encode, ascending.
        bottleneck: CompressAI's state of the probability model of z, as trained; empty where it is left out.
        digest: SHA-256 in hex over what decoding depends on.
    """

    network: Network
    path: EntropyPath
    z_tables: Tables
    y_tables: Tables
    thresholds: Tensor
    gains: Tensor
    inverse_gains: Tensor
    qualities: tuple[int, ...]
    bottleneck: dict[str, Tensor]
    digest: str


def read_artefact(path: Path) -> Artefact:
    """Reads an artefact that ``write_artefact`` wrote.

    Raises:
        WeightsUnavailable: no such file, or a damaged one.
        UnknownName: a codec that is not registered.
        BadInput: tensors missing, left over or misshapen; integers that could not be computed exactly.
    """
    tensors = load_tensors(path)
    metadata = read_metadata(path)
    if "codec" not in metadata:
        raise BadInput(f"{path} is no codec: its metadata name none")
    config = json.loads(metadata["config"])
    digest = hashlib.sha256(_decoding_digest(tensors, metadata).encode()).hexdigest()
    with torch.device("meta"):
        network = codecs.get(metadata["codec"])(config)
    prior = _take(tensors, "network.")
    bottleneck = _take(tensors, "bottleneck.")
    transforms = {name: tensors.pop(name).float() for name in list(tensors) if _is_transform(name)}
    expected = {name: value.shape for name, value in network.state_dict().items()}
    if not prior:
        expected = {name: shape for name, shape in expected.items() if _is_transform(name)}
    given = transforms | {name: value.float() for name, value in prior.items()}
    check_tensors(path.name, expected, given)
    network.load_state_dict(given, strict=False, assign=True)
    entropy_path = network.entropy_path()
    exact = _take(tensors, "exact.")
    check_tensors(path.name, {name: value.shape for name, value in entropy_path.state_dict().items()}, exact)
    entropy_path.load_state_dict(exact)
    for module in entropy_path.modules():
        if isinstance(module, Checked):
            module.check()
    return Artefact(
        network=network.eval().requires_grad_(False),
        path=entropy_path.eval(),
        z_tables=_read_tables(tensors, "z"),
        y_tables=_read_tables(tensors, "y"),
        thresholds=tensors["tables.thresholds"],
        gains=tensors["gains"].float(),
        inverse_gains=tensors["inverse_gains"].float(),
        qualities=tuple(json.loads(metadata["qualities"])),
        bottleneck=bottleneck,
        digest=digest,
    )


def write_artefact(
    path: Path,
    network: Network,
    bottleneck: Mapping[str, Tensor],
    qualities: Mapping[int, tuple[Tensor, Tensor]],
    *,
    storage: Storage = "float16",
    trainable: bool = False,
) -> None:
    """Makes an artefact of a trained codec: its entropy path in integers, its tables as data.

    Nothing is trained again and no photo is needed (ranges.py). All of it is computed in double precision from the
    weights as they are stored, so that machines that make the artefact of one checkpoint get the same digest.

    Args:
        network: trained; its weights are rounded to ``storage``.
        bottleneck: state of CompressAI's EntropyBottleneck for z.
        qualities: gain and inverse gain (M,) of y for each rate point.
        trainable: whether the entropy path is kept in floating point too, to train on.

    Raises:
        BadInput: weights that 8 and 32 bits cannot hold.
        WeightsUnavailable: CompressAI is not installed, which evaluates the probability model of z.
    """
    stored = network.state_dict()
    if storage == "float16":
        stored = {name: value.half().float() for name, value in stored.items()}
    double = codecs.get(network.family)(network.describe()).double()
    double.load_state_dict(stored)
    double.eval().requires_grad_(False)
    z_tables, medians = _bottleneck_tables(bottleneck, network.N)
    exact = network.entropy_path()
    ordered = sorted(qualities.items())
    exact.derive(double, medians, measured_ranges(double, medians, (gain for _, (gain, _) in ordered)))
    middles = np.sqrt(SCALES[:-1] * SCALES[1:])
    tensors = {name: value for name, value in stored.items() if _is_transform(name)}
    if trainable:
        tensors |= {f"network.{name}": value for name, value in stored.items() if not _is_transform(name)}
        tensors |= {f"bottleneck.{name}": value for name, value in bottleneck.items()}
    tensors |= {f"exact.{name}": value for name, value in exact.state_dict().items()}
    for name, tables in (("z", z_tables), ("y", _gaussian_tables())):
        for part in ("frequencies", "lengths", "offsets"):
            tensors[f"tables.{name}.{part}"] = torch.from_numpy(getattr(tables, part))
    tensors["tables.thresholds"] = torch.from_numpy(np.rint(middles / SCALE_UNIT).astype(np.int32))
    tensors["gains"] = torch.stack([gain for _, (gain, _) in ordered])
    tensors["inverse_gains"] = torch.stack([inverse for _, (_, inverse) in ordered])
    metadata = {
        "codec": network.family,
        "config": json.dumps(network.describe(), sort_keys=True),
        "qualities": json.dumps([quality for quality, _ in ordered]),
    }
    save_tensors(path, tensors, storage, metadata)


def check_tensors(what: str, expected: Mapping[str, Any], given: Mapping[str, Tensor]) -> None:
    """Raises BadInput with the list of what is wrong unless the tensors have the names and shapes expected."""
    wrong = differences(expected, given)
    if wrong:
        raise BadInput(f"{what} does not hold this codec, {len(wrong)} tensors are wrong: {'; '.join(wrong)}")


def _is_transform(name: str) -> bool:
    return name.split(".")[0] in TRANSFORMS


def _decoding_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    decoding = {
        name: value
        for name, value in tensors.items()
        if name.startswith(("exact.", "tables.")) or name == "inverse_gains"
    }
    return "\0".join((tensors_digest(decoding), *(metadata[key] for key in ("codec", "config", "qualities"))))


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _read_tables(tensors: Mapping[str, Tensor], name: str) -> Tables:
    parts = ("frequencies", "lengths", "offsets")
    tables = Tables(*(tensors[f"tables.{name}.{part}"].int().numpy() for part in parts))
    tables.check()
    return tables


def _gaussian_tables() -> Tables:
    """One table per scale: the normal distribution over integers, around zero."""
    rows = []
    for scale in SCALES:
        reach = int(np.ceil(REACH * scale))
        edges = torch.arange(-reach, reach + 2, dtype=torch.float64) - 0.5
        rows.append((-reach, torch.special.ndtr(edges / scale).diff().numpy()))
    return _as_tables(rows)


def _bottleneck_tables(state: Mapping[str, Tensor], channels: int) -> tuple[Tables, Tensor]:
    """One table per channel of z from the trained probability model, and the medians (N,)."""
    try:
        from compressai.entropy_models import EntropyBottleneck
    except ModuleNotFoundError as problem:
        raise WeightsUnavailable("making a codec takes CompressAI: pip install 'comneck[train]'") from problem
    bottleneck = EntropyBottleneck(channels, filters=(3, 3, 3, 3)).double().eval()
    bottleneck.load_state_dict({name: value.double() for name, value in state.items()}, strict=False)
    medians = bottleneck.quantiles[:, 0, 1].detach()
    reach = 64
    while True:
        symbols = torch.arange(-reach, reach + 1, dtype=torch.float64)
        with torch.no_grad():
            _, mass = bottleneck((symbols + medians[:, None])[None], training=False)
        mass = mass[0].numpy()  # (N, 2 reach + 1)
        if mass.sum(1).min() > 1 - ESCAPE or reach >= 1024:
            break
        reach *= 2
    rows = []
    for row in mass:
        likely = np.flatnonzero(row > 2**-20)
        first, last = (likely[0], likely[-1]) if len(likely) else (reach, reach)
        rows.append((int(first) - reach, row[first : last + 1]))
    return _as_tables(rows), medians


def _as_tables(rows: list[tuple[int, np.ndarray]]) -> Tables:
    """From (first symbol, probabilities); what they lack of 1 goes to the escape."""
    frequencies = []
    for _, mass in rows:
        whole = np.append(mass, max(1 - mass.sum(), ESCAPE))
        spare = TOTAL - len(whole)
        row = 1 + np.floor(whole / whole.sum() * spare).astype(np.int64)
        row[np.argmax(row)] += TOTAL - row.sum()
        frequencies.append(row)
    return Tables(
        np.concatenate(frequencies).astype(np.int32),
        np.array([len(row) for row in frequencies], np.int32),
        np.array([first for first, _ in rows], np.int32),
    )
