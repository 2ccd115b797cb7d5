"""Every backend asked about one photo by one server: time to the first text, memory, and what they say, as a picture.

python -m benchmarks.backends [--rounds 5] [--picture docs/backends.png]

Each question is asked about a photo that the server has not seen, and again, when what CLIP has seen of it is kept.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from benchmarks.server import running_server, sample_photo
from edge_client.client import Client, Reply
from edge_client.encoder import Encoder
from edge_client.overlay import draw_box
from shared.bitstream import Bitstream
from shared.images import Photo, load_photo

PHOTO = "motorcycle_left.png"  # the Middlebury stereo benchmark of 2014 (Scharstein et al.), as scikit-image has it
EXAMPLES = {"motorcycle": "motorcycle_right.png", "cat": "chelsea.png", "cup": "coffee.png", "rocket": "rocket.jpg"}
CHOICES = ("a car", "a motorcycle", "a horse", "a boat")

Ask = Callable[..., Reply]


def classifying(encoder: Encoder) -> Ask:
    """A label comes in one piece: there is no text before the answer."""
    examples = {label: encoder.encode(sample_photo(name)) for label, name in EXAMPLES.items()}
    return lambda client, photo, on_text=None: client.classify(photo, examples)


def asking(prompt: str, **options: Any) -> Ask:
    return lambda client, photo, on_text=None: client.ask(photo, prompt, on_text=on_text, **options)


QUESTIONS = {
    "llama-adapter": ("describe this", asking("describe this", backend="llama-adapter")),
    "honeybee": (
        f"what is this? {', '.join(CHOICES)}",
        asking("what is this?", backend="honeybee", task="choice", choices=CHOICES),
    ),
    "shikra": ("where is the motorcycle?", asking("where is the motorcycle?", backend="shikra", task="box")),
    "v2l-tokenizer": (f"one example each of {', '.join(EXAMPLES)}", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="photos that each is asked about (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="file to draw the answers into")
    options = parser.parse_args()
    photo = load_photo(sample_photo(PHOTO))
    replies: dict[str, Reply] = {}
    with running_server() as server, Client(server.grpc, timeout=120) as client:
        memory = psutil.Process(server.pid).memory_info
        encoder = Encoder.for_server(client.profile())
        print(f"{'':<15}{'new photo':>11}{'seen before':>13}   ms to the first text, medians of {options.rounds}")
        print(f"{'models loaded':<39}   {memory().rss / 1e6:,.0f} MB")
        for number, name in enumerate(name for name in QUESTIONS if name in client.profile().backends):
            ask = QUESTIONS[name][1] or classifying(encoder)
            new, again = [], []
            for turn in range(options.rounds):
                other = encoder.encode(without_columns(photo, 1 + turn + number * options.rounds))
                for times in (new, again):
                    times.append(first_text(client, other, ask))
            replies[name] = ask(client, photo)
            shown = [f"{statistics.median(times):,.0f}" for times in (new, again)]
            print(f"{name:<15}{shown[0]:>11}{shown[1]:>13}   {memory().rss / 1e6:,.0f} MB   {replies[name].text!r}")
    if options.picture:
        draw(options.picture, photo, replies)


def without_columns(photo: Photo, columns: int) -> Photo:
    """Another photo of the same."""
    pixels = photo.pixels[:, columns:]
    return Photo(pixels, (pixels.shape[1], pixels.shape[0]))


def first_text(client: Client, photo: Bitstream, ask: Ask) -> float:
    """Milliseconds until there is text."""
    heard: list[float] = []
    begun = perf_counter()
    ask(client, photo, on_text=lambda text: heard.append(perf_counter()))
    return 1000 * ((heard[0] if heard else perf_counter()) - begun)


def draw(path: Path, photo: Photo, replies: dict[str, Reply]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(replies), figsize=(4 * len(replies), 4.2), squeeze=False)
    for axis, (name, reply) in zip(axes.flat, replies.items(), strict=True):
        asked = QUESTIONS[name][0]
        box = reply.answer.box
        axis.imshow((draw_box(photo, box, "") if box else photo).pixels)
        axis.set_title(f"{name}\n{textwrap.fill(asked, 44)}", fontsize=10)
        axis.set_xlabel(textwrap.fill(f"{reply.text}\n", 44) + f"\n{reply.receipt.bytes_payload:,} B", fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    main()
