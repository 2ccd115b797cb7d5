"""Draws a real exchange: a photo, the bytes that left the edge beside a JPEG's, the answer, where the time went.

python -m benchmarks.exchange docs/exchange.png
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.server import running_server, sample_photo
from edge_client.client import Client
from shared.images import Preparation, load_photo, prepare

PROMPT = "describe this"


def main() -> None:
    photo = sample_photo()
    with running_server() as server, Client(server.grpc) as client:
        client.ask(photo, PROMPT)  # loads the codec
        reply = client.ask(photo, PROMPT)
    receipt, timings = reply.receipt, asdict(reply.answer.timings)
    stages = {"encode": receipt.encode, "network": receipt.network, **timings}
    figure, (picture, sizes, times) = plt.subplots(
        1, 3, figsize=(12, 3.4), gridspec_kw={"width_ratios": [1, 1.2, 1.5], "wspace": 0.45}
    )
    picture.imshow(prepare(load_photo(photo), Preparation()).pixels)
    picture.axis("off")
    picture.set_title(f'"{PROMPT}"')
    jpeg = receipt.bytes_jpeg75 or 0
    bars = sizes.barh(["JPEG 75", "comneck"], [jpeg, receipt.bytes_payload], color=["#bbbbbb", "#1f77b4"])
    sizes.bar_label(bars, labels=[f"{jpeg:,} B", f"{receipt.bytes_payload:,} B"], padding=4)
    sizes.set_xlim(0, jpeg * 1.35)
    sizes.set_title("what is sent")
    sizes.xaxis.set_visible(False)
    sizes.spines[["top", "right", "bottom"]].set_visible(False)
    start = 0.0
    for place, (stage, value) in enumerate(stages.items()):
        times.barh(len(stages) - place, value, left=start, color="#1f77b4")
        times.text(start + value, len(stages) - place, f" {stage} {value:.0f} ms", va="center", fontsize=9)
        start += value
    times.set_xlim(0, start * 1.5)
    times.yaxis.set_visible(False)
    times.spines[["top", "right", "left"]].set_visible(False)
    times.set_title("\n".join(textwrap.wrap(f"“{reply.text.strip()}”", 44)), fontweight="bold")
    figure.savefig(Path(sys.argv[1]), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
