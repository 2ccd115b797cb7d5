"""One ``send``, stage by stage, and the server's memory: medians and spread over repeated questions about one photo.

python -m benchmarks.send [--count 20]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict

import psutil

from benchmarks.server import running_server, sample_photo
from edge_client.client import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="questions (default: %(default)s)")
    count = parser.parse_args().count
    photo = sample_photo()
    with running_server() as server, Client(server.grpc) as client:
        loaded = psutil.Process(server.pid).memory_info().rss
        replies = [client.ask(photo, "describe this") for _ in range(count + 1)]
        busy = psutil.Process(server.pid).memory_info().rss
    first, *rest = replies
    stages: dict[str, list[float]] = {}
    for reply in rest:
        receipt, timings = reply.receipt, asdict(reply.answer.timings)
        for stage, value in {"encode": receipt.encode, "network": receipt.network, **timings}.items():
            stages.setdefault(stage, []).append(value)
    print(f"answer: {first.text!r}, {first.answer.tokens} tokens, {first.receipt.bytes_payload} B")
    print(f"client loads its codec once: {first.receipt.load:.0f} ms\n")
    print(f"{'stage':<12}{'median':>9}{'min':>9}{'max':>9}   ms over {count} questions")
    for stage, values in stages.items():
        print(f"{stage:<12}{statistics.median(values):>9.1f}{min(values):>9.1f}{max(values):>9.1f}")
    total = [sum(values) for values in zip(*stages.values(), strict=True)]
    print(f"{'total':<12}{statistics.median(total):>9.1f}{min(total):>9.1f}{max(total):>9.1f}\n")
    print(f"server memory: {loaded / 1e6:,.0f} MB loaded, {busy / 1e6:,.0f} MB after {count + 1} answers")


if __name__ == "__main__":
    main()
