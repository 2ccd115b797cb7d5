"""The loop that every training command shares: steps, schedule, progress, curves, checkpoints.

A run lives in one folder:

    checkpoint.pt   module, optimiser, step and random state; written atomically, read with ``weights_only=True``
    curve.csv       one row per logged step
    curve.png       the same, drawn

Starting a run in a folder that holds a checkpoint continues it.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared.errors import BadInput

Batch = Any
Losses = dict[str, Tensor]  # "loss" is minimised; everything else is only logged


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a cosine down to ``floor`` times the peak."""

    steps: int
    warmup: int = 200
    floor: float = 0.02

    def scale(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batches: Callable[[int], Iterator[Batch]],
    losses: Callable[[Batch, int], Losses],
    out: Path,
    *,
    log_every: int = 50,
    save_every: int = 250,
    clip: float = 1.0,
    precision: torch.dtype | None = torch.bfloat16,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Runs ``schedule.steps`` optimiser steps on ``module``, resuming from ``out`` when it holds a checkpoint.

    ``batches(step)`` yields the batches from that step on, so that a resumed run sees the data it would have seen.
    ``losses(batch, step)`` returns named scalars, ``"loss"`` among them. A step whose gradient is not finite is skipped
    and counted in the curve, rather than allowed to destroy the weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    curve = Curve(out / "curve.csv")
    peaks = [group["lr"] for group in optimizer.param_groups]
    device = next(module.parameters()).device
    step = _resume(out / "checkpoint.pt", module, optimizer, device)
    curve.rewind(step)
    module.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums: dict[str, float] = {}
    spent = curve.rows[-1]["seconds"] if curve.rows else 0.0
    since, started, skipped = step, clock() - spent, 0
    bar = tqdm(total=schedule.steps, initial=step, desc=out.name, unit="step", mininterval=5.0, dynamic_ncols=True)
    source = batches(step)
    while step < schedule.steps:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule.scale(step)
        with autocast(device, precision):
            values = losses(next(source), step)
        optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        step += 1
        bar.update()
        if step % log_every == 0 or step == schedule.steps:
            row = {name: total / (step - since) for name, total in sums.items()}
            row |= {"lr": optimizer.param_groups[0]["lr"], "skipped": skipped, "seconds": clock() - started}
            curve.add(step, row)
            bar.set_postfix_str(" ".join(f"{name} {value:.4g}" for name, value in row.items() if name in sums))
            sums, since = {}, step
        if step % save_every == 0 or step == schedule.steps:
            _save(out / "checkpoint.pt", module, optimizer, step)
            curve.draw(out / "curve.png")
    bar.close()
    module.eval()


def autocast(device: torch.device, precision: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision where the device has it in hardware worth using, else plain float32."""
    if precision is None:
        return nullcontext()
    return torch.autocast(device.type, precision)


def generator(*seeds: int) -> torch.Generator:
    """A random source fixed by ``seeds`` alone: the same step of the same run draws the same numbers."""
    value = 0
    for seed in seeds:
        value = (value * 1_000_003 + seed + 0x9E3779B9) % (2**63)
    return torch.Generator().manual_seed(value)


class Curve:
    """A learning curve as a CSV file, one row per logged step, and its picture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        if path.exists():
            with path.open(newline="") as lines:
                self.rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(lines)]

    def rewind(self, step: int) -> None:
        """Forgets what was logged after the checkpoint that training resumes from."""
        self.rows = [row for row in self.rows if row["step"] <= step]

    def add(self, step: int, row: dict[str, float]) -> None:
        self.rows.append({"step": float(step), **row})
        partial = self.path.with_suffix(".tmp")
        with partial.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, fieldnames=list(self.rows[-1]))
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)

    def draw(self, path: Path) -> None:
        if not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        names = [name for name in self.rows[-1] if name not in ("step", "lr", "skipped", "seconds")]
        columns = min(4, len(names))
        rows = -(-len(names) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
        steps = [row["step"] for row in self.rows]
        for axis, name in zip(axes.flat, names, strict=False):
            axis.plot(steps, [row[name] for row in self.rows], linewidth=1)
            axis.set_title(name)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in module.named_parameters()} - trained
    state = {name: value for name, value in module.state_dict().items() if name not in frozen}
    partial = path.with_suffix(".tmp")
    torch.save({"step": step, "module": state, "optimizer": optimizer.state_dict()}, partial)
    os.replace(partial, path)


def _resume(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    try:
        result = module.load_state_dict(state["module"], strict=False)
    except RuntimeError as problem:
        raise BadInput(f"{path} is of another model than the one asked for: {problem}") from problem
    if result.unexpected_keys:
        raise BadInput(f"{path} is of another model: it holds {result.unexpected_keys[0]}, which this one has not")
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
