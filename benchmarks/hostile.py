"""Hostile bitstreams against the shipped codec: refused by name, soon and in little memory, or real ones after all.

python -m benchmarks.hostile [--streams 100000] [--minutes 10] [--workers N]

Real streams of photos are mutated (benchmarks/mutation.py) and decoded on all cores. Then atheris fuzzes for a while
(benchmarks/fuzz.py); `pip install atheris` first, or say --minutes 0. The exit code is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.mutation import MUTATIONS, fate
from benchmarks.server import sample_photo
from shared.bitstream import MAX_PIXELS, UNIT, Bitstream
from shared.codecs.codec import Codec
from shared.errors import BadBitstream
from shared.images import Preparation, load_photo, prepare
from shared.weights.store import ensure

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
SIZES = ((64, 64), (128, 192), (256, 256))
MAX_SECONDS = 1.0  # of one core, for one stream
MAX_MEMORY = 64 * 2**20  # beyond what is decoded
CHUNK = 100
ANNOUNCED = 1000  # one stream of so many announces as many pixels as there may be, and has them
ON_MEMORY = 2000  # streams whose memory is measured


@dataclass
class Report:
    """What became of some streams.

    Attributes:
        fates: how many, by (mutation, fate).
        seconds: of one core, the longest, and the number of its stream.
        memory: bytes beyond the decoded size, the most, and the number of its stream.
        broken: promises, in words.
    """

    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: tuple[float, int] = (0.0, 0)
    memory: tuple[int, int] = (0, 0)
    broken: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.fates += other.fates
        self.seconds, self.memory = max(self.seconds, other.seconds), max(self.memory, other.memory)
        self.broken += other.broken


class Worker:
    """What each process has for itself."""

    codec: Codec
    real: dict[bytes, Tensor]
    streams: list[bytes]


def start(streams: list[bytes]) -> None:
    torch.set_num_threads(1)
    Worker.codec, Worker.streams = Codec.load(ensure("small-codec")), streams
    Worker.real = {data: Worker.codec.decode(Bitstream.parse(data)).y_hat for data in streams}


def attack(numbers: range) -> Report:
    """Decodes the streams of these numbers, each of which says how its stream is mutated."""
    report = Report()
    for number in numbers:
        random = Random(number)
        mutation = MUTATIONS[number % len(MUTATIONS)]
        name, data = mutation.__name__, mutation(random, Worker.streams)
        if number % ANNOUNCED == 0:
            name, data = "announce", announce(random, Worker.streams)
        before, begun = _memory(reset=True), time.process_time()
        try:
            outcome = fate(Worker.codec, data, Worker.real)
        except BaseException as problem:  # constriction's panics are no Exceptions
            if isinstance(problem, KeyboardInterrupt):
                raise
            outcome = "BROKEN"
            report.broken.append(f"stream {number}, {name}: {type(problem).__name__}: {problem}")
        seconds, memory = time.process_time() - begun, _memory() - before - decoded_size(data)
        report.fates[name, outcome] += 1
        report.seconds, report.memory = max(report.seconds, (seconds, number)), max(report.memory, (memory, number))
    return report


def announce(random: Random, streams: list[bytes]) -> bytes:
    """A stream of as many pixels as a decoder agrees to, whose payload decodes as far as its check value."""
    rows = random.choice((16, 17, 32, 64, 128, 255))
    header = bytearray(random.choice(streams)[:16])
    header[6:8] = rows, MAX_PIXELS // UNIT**2 // rows
    return bytes(header) + bytes(random.choice((0, 1, 1000, 60000)))


def decoded_size(data: bytes) -> int:
    """Bytes of the y_hat that a stream announces, in floating point; 0 for what is refused before."""
    try:
        bitstream = Bitstream.parse(data)
    except BadBitstream:
        return 0
    pixels = bitstream.pixels if bitstream.pixels <= MAX_PIXELS else 0
    return pixels // 256 * Worker.codec.M * 4


def _memory(reset: bool = False) -> int:
    """Resident bytes of this process: now, or the most since the last reset. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def real_streams() -> list[bytes]:
    codec = Codec.load(ensure("small-codec"))
    streams = []
    for name in PHOTOS:
        photo = load_photo(sample_photo(name))
        for size in SIZES:
            prepared = prepare(photo, Preparation(*size))
            streams += [bytes(codec.encode(prepared, "d1", quality)) for quality in codec.qualities]
    return streams


def run(streams: list[bytes], count: int, workers: int, what: str) -> Report:
    report = Report()
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, start, (streams,)) as pool, tqdm(total=count, desc=what) as bar:
        for chunk, done in zip(chunks, pool.map(attack, chunks), strict=True):
            report.add(done)
            bar.update(len(chunk))
    return report


@contextmanager
def returning_memory() -> Iterator[None]:
    """Processes started within give large blocks back at once: what each decode needs is seen, at a cost in time."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**18)
    yield
    del os.environ["MALLOC_MMAP_THRESHOLD_"]


def fuzz(minutes: float) -> list[str]:
    """Both targets of benchmarks/fuzz.py at once -> promises broken."""
    broken = []
    with tempfile.TemporaryDirectory() as folder:
        options = [f"-max_total_time={round(60 * minutes)}", "-timeout=60", "-print_final_stats=1"]
        runs = {}
        for target in ("raw", "sealed"):
            (Path(folder) / target).mkdir()
            command = [sys.executable, "-m", "benchmarks.fuzz", target, f"{folder}/{target}", *options]
            runs[target] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for target, process in runs.items():
            output, _ = process.communicate()
            units = re.search(r"number_of_executed_units: (\d+)", output)
            reached = re.findall(r"cov: (\d+) ft: (\d+)", output)
            print(f"fuzzing, {target}: {units[1] if units else 0} streams, branches and features {reached[-1:]}")
            if process.returncode:
                inputs = [file.read_bytes().hex() for file in (Path(folder) / target).glob("*-*")]
                broken.append(f"fuzzing, {target}, input {inputs}:\n{output[-3000:]}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=100_000, help="mutated streams (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="of fuzzing (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: %(default)s)")
    options = parser.parse_args()
    if options.minutes and find_spec("atheris") is None:
        parser.error("fuzzing needs atheris: pip install atheris, or --minutes 0")
    streams = real_streams()
    report = run(streams, options.streams, options.workers, "mutated streams")
    with returning_memory():
        memory = run(streams, min(ON_MEMORY, options.streams), 1, "memory").memory
    names = sorted({outcome for _, outcome in report.fates})
    print(f"\n{'':<12}" + "".join(f"{name:>17}" for name in names))
    for mutation in sorted({mutation for mutation, _ in report.fates}):
        print(f"{mutation:<12}" + "".join(f"{report.fates[mutation, name]:>17,}" for name in names))
    broken = report.broken
    longest = f"longest: {report.seconds[0]:.2f} s of one core, stream {report.seconds[1]}; limit {MAX_SECONDS} s"
    largest = (
        f"largest: {memory[0] >> 20} MiB beyond the decoded size, stream {memory[1]}; limit {MAX_MEMORY >> 20} MiB"
    )
    print(f"\n{longest}\n{largest}")
    broken += [longest] * (report.seconds[0] > MAX_SECONDS) + [largest] * (memory[0] > MAX_MEMORY)
    if options.minutes:
        broken += fuzz(options.minutes)
    print("\n".join(["", *broken, f"{len(broken)} promises broken"]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
