"""``edge-client``: sends a photo as a few hundred bytes and prints what a server says about it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.command import Parser, run
from shared.conversation import Generation
from shared.errors import BadInput
from shared.wire import GRPC_PORT

if TYPE_CHECKING:
    from edge_client.client import Reply


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="edge-client", description="Asks a comneck server about photos.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    send = commands.add_parser(
        "send",
        help="send a photo and a question, print the answer",
        description="Encodes a photo as the server expects it, sends it with a question, prints the answer as it is "
        "written, then a line that says what it cost: bytes, bits per pixel, time.",
    )
    send.add_argument("image", metavar="IMAGE", type=Path, help="a picture file: JPEG, PNG, WebP, AVIF, ...")
    send.add_argument("prompt", metavar="PROMPT", help='what to say about it: "describe this"')
    defaults = Generation()
    send.add_argument(
        "--server", metavar="HOST:PORT", default=f"127.0.0.1:{GRPC_PORT}", help="gRPC address (default: %(default)s)"
    )
    send.add_argument("--backend", metavar="NAME", default="", help="who is to answer (default: the server's choice)")
    send.add_argument(
        "--max-tokens", metavar="N", type=int, default=defaults.max_tokens, help="length (default: %(default)s)"
    )
    send.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=defaults.temperature,
        help="above 0, words are drawn (default: %(default)g)",
    )
    send.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=defaults.top_p,
        help="draw from the likeliest tokens that together have this probability (default: %(default)g)",
    )
    send.add_argument("--seed", metavar="N", type=int, default=defaults.seed, help="of the draw (default: %(default)s)")
    send.add_argument("--timeout", metavar="S", type=float, default=60.0, help="seconds allowed (default: %(default)g)")
    send.add_argument("--json", action="store_true", help="print answer and receipt as one JSON object")
    send.set_defaults(run=_send)
    return run(parser, argv)


def _send(arguments: argparse.Namespace) -> None:
    if not arguments.prompt.strip():
        raise BadInput('the prompt is empty; ask something: "describe this"')

    from edge_client.client import Client
    from shared.images import load_photo

    photo = load_photo(arguments.image)  # before the server is asked anything
    generation = Generation(arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    with Client(arguments.server, timeout=arguments.timeout) as client:
        if arguments.json:
            reply = client.ask(photo, arguments.prompt, backend=arguments.backend, generation=generation)
            print(json.dumps(as_json(reply)))
            return
        written: list[str] = []

        def write(text: str) -> None:
            written.append(text)
            print(text, end="", flush=True)

        try:
            reply = client.ask(photo, arguments.prompt, on_text=write, backend=arguments.backend, generation=generation)
        finally:
            if written:
                print()
        print(receipt_line(reply))


def as_json(reply: Reply) -> dict[str, Any]:
    """What ``--json`` prints."""
    answer, receipt = reply.answer, reply.receipt
    return {
        "answer": answer.text,
        "finish": answer.finish,
        "tokens": answer.tokens,
        "backend": answer.backend,
        "profile": answer.profile,
        "bytes_payload": receipt.bytes_payload,
        "bytes_wire": receipt.bytes_wire,
        "bpp": round(receipt.bpp, 4),
        "bytes_jpeg75": receipt.bytes_jpeg75,
        "timings_ms": {name: round(value, 1) for name, value in _timings(reply).items()},
        "model_digests": answer.digests,
    }


def receipt_line(reply: Reply) -> str:
    """What ``send`` prints below the answer."""
    receipt = reply.receipt
    sizes = f"{receipt.bytes_payload:,} B sent ({receipt.bytes_wire:,} B on the wire), {receipt.bpp:.3f} bpp"
    if receipt.bytes_jpeg75:
        ratio = receipt.bytes_jpeg75 / receipt.bytes_payload
        sizes += f", {ratio:.{0 if ratio >= 10 else 1}f}x smaller than JPEG 75 ({receipt.bytes_jpeg75:,} B)"
    labels = {"decode": "decode+neck"}
    times = [
        f"{labels.get(name, name)} {value:,.0f} ms"
        for name, value in _timings(reply).items()
        if name not in ("load", "queue") or value >= 1
    ]
    return f"{sizes} | {', '.join(times)}"


def _timings(reply: Reply) -> dict[str, float]:
    receipt = reply.receipt
    return {
        "load": receipt.load,
        "encode": receipt.encode,
        "network": receipt.network,
        **asdict(reply.answer.timings),
    }


if __name__ == "__main__":
    raise SystemExit(main())
