"""``edge-client``: encodes photos into a few hundred bytes, looks into them, sends them and prints the answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.bitstream import SUFFIX, Bitstream
from shared.command import Parser, run
from shared.conversation import Answer, Generation, Task
from shared.errors import BadInput
from shared.profiles import DEFAULT_PROFILE
from shared.wire import GRPC_PORT

if TYPE_CHECKING:
    from edge_client.client import Client, ImageSource, Options, Reply
    from shared.images import Photo

TASKS: tuple[Task, ...] = ("text", "choice", "box")  # one for a label needs examples, too
IMAGE = "a picture file: JPEG, PNG, WebP, AVIF, ..."
IMAGE_OR_STORED = f"{IMAGE}, or what `encode` wrote ({SUFFIX})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="edge-client", description="Encodes photos and asks a comneck server about them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_send(commands)
    _add_classify(commands)
    _add_encode(commands)
    _add_inspect(commands)
    _add_decode(commands)
    return run(parser, argv)


def _add_send(commands: Any) -> None:
    send = commands.add_parser(
        "send",
        help="send a photo and a question, print the answer",
        description="Encodes a photo as the server expects it, sends it with a question, prints the answer as it is "
        "written, then a line that says what it cost: bytes, bits per pixel, time.",
    )
    send.add_argument("image", metavar="IMAGE", type=Path, help=IMAGE_OR_STORED)
    send.add_argument("prompt", metavar="PROMPT", help='what to say about it: "describe this"')
    defaults = Generation()
    _add_server(send)
    send.add_argument(
        "--task",
        choices=TASKS,
        help="kind of answer (default: choice with --choice, box with --overlay, else what the backend is made for)",
    )
    send.add_argument(
        "--choice", metavar="TEXT", action="append", default=[], help="that may be the answer; give two or more"
    )
    send.add_argument(
        "--overlay",
        metavar="PICTURE",
        type=Path,
        help="file to write: the photo with the answer's box drawn into it (.png, .jpg, .webp, ...)",
    )
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
    _add_reply(send)
    send.set_defaults(run=_send)


def _add_classify(commands: Any) -> None:
    classify = commands.add_parser(
        "classify",
        help="label a photo as in examples, print the label",
        description="Encodes a photo and an example of each label, sends them in one request and prints the photo's "
        "label, then a line that says what it cost.",
    )
    classify.add_argument("image", metavar="IMAGE", type=Path, help=IMAGE_OR_STORED)
    classify.add_argument(
        "--example",
        metavar="LABEL=IMAGE",
        dest="examples",
        action="append",
        required=True,
        help="a label and a photo that has it; give two or more",
    )
    _add_server(classify)
    _add_reply(classify)
    classify.set_defaults(run=_classify)


def _add_encode(commands: Any) -> None:
    encode = commands.add_parser(
        "encode",
        help="encode a photo into a file",
        description=f"Encodes a photo into a bitstream ({SUFFIX}), for `send` or another machine, and prints a line "
        "that says how large it is. No server is needed.",
    )
    encode.add_argument("image", metavar="IMAGE", type=Path, help=IMAGE)
    encode.add_argument("-o", "--out", metavar=f"FILE{SUFFIX}", type=Path, required=True, help="file to write")
    encode.add_argument(
        "--profile", metavar="NAME", default=DEFAULT_PROFILE, help="of the server it is for (default: %(default)s)"
    )
    encode.add_argument("--backend", metavar="NAME", default="", help="that it is for (default: the profile's first)")
    _add_quality(encode, "the profile's own")
    encode.set_defaults(run=_encode)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="tell what is in a bitstream",
        description="Prints every field of a bitstream's header, its bytes by part, and whether this machine decodes "
        "it, or why not.",
    )
    _add_file(inspect)
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)


def _add_decode(commands: Any) -> None:
    decode = commands.add_parser(
        "decode",
        help="decode a bitstream into a picture",
        description="Decodes a bitstream into the picture that its codec makes of it, in the size that was encoded. "
        "Servers never do this: they answer from the latents.",
    )
    _add_file(decode)
    decode.add_argument(
        "-o", "--out", metavar="PICTURE", type=Path, required=True, help="file to write: .png, .jpg, .webp, ..."
    )
    decode.add_argument(
        "--profile", metavar="NAME", help="whose codec decodes it (default: the one on this machine that does)"
    )
    decode.set_defaults(run=_decode)


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server", metavar="HOST:PORT", default=f"127.0.0.1:{GRPC_PORT}", help="gRPC address (default: %(default)s)"
    )
    _add_quality(parser, "the server's choice")
    parser.add_argument("--backend", metavar="NAME", default="", help="who is to answer (default: the server's choice)")


def _add_reply(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=60.0, help="seconds allowed (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print answer and receipt as one JSON object")


def _add_quality(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--quality", metavar="N", type=int, help=f"1 to 15; more is larger and better (default: {default})"
    )
    parser.add_argument(
        "--max-bytes",
        metavar="N",
        type=int,
        help="size of the bitstream: the best quality that fits is taken, up to --quality if that is given",
    )


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar=f"FILE{SUFFIX}", type=Path, help="a bitstream, as `encode` writes it")


def _send(arguments: argparse.Namespace) -> None:
    if not arguments.prompt.strip():
        raise BadInput('the prompt is empty; ask something: "describe this"')

    from edge_client.client import Client
    from edge_client.overlay import Overlay

    path, out = arguments.image, arguments.overlay
    image = _read(path)  # before the server is asked anything
    overlay = Overlay.plan(out, image, path) if out else None
    task: Task | None = arguments.task or ("choice" if arguments.choice else "box" if overlay else None)
    if overlay and task != "box":
        raise BadInput(f"{out} would show a box, and the answer is to be a {task}: leave out one of the two")
    options: Options = {
        "backend": arguments.backend,
        "generation": Generation(arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.seed),
        "quality": arguments.quality,
        "max_bytes": arguments.max_bytes,
        "task": task,
        "choices": arguments.choice,
    }
    with Client(arguments.server, timeout=arguments.timeout) as client:
        if arguments.json:
            reply = client.ask(image, arguments.prompt, **options)
            print(json.dumps(as_json(reply)))
        else:
            reply = _say(client, image, arguments.prompt, options)
            for line in (*found_lines(reply.answer, arguments.choice), receipt_line(reply)):
                print(line)
    if overlay:
        overlay.write(reply.answer.box, arguments.prompt)


def _say(client: Client, image: ImageSource, prompt: str, options: Options) -> Reply:
    """Asks, and prints the answer as it is written."""
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        print(text, end="", flush=True)

    try:
        return client.ask(image, prompt, on_text=write, **options)
    finally:
        if written:
            print()


def _classify(arguments: argparse.Namespace) -> None:
    from edge_client.client import Client

    examples = []
    for example in arguments.examples:
        label, equals, path = example.partition("=")
        if not equals:
            raise BadInput(f"the example {example!r} is no LABEL=IMAGE such as cat=cat.jpg")
        examples.append((label, _read(Path(path))))
    image = _read(arguments.image)
    options: Options = {
        "backend": arguments.backend,
        "quality": arguments.quality,
        "max_bytes": arguments.max_bytes,
    }
    with Client(arguments.server, timeout=arguments.timeout) as client:
        reply = client.classify(image, examples, **options)
    print(json.dumps(as_json(reply)) if arguments.json else f"{reply.text}\n{receipt_line(reply)}")


def _read(path: Path) -> Photo | Bitstream:
    from edge_client.stored import is_stored, read_bitstream
    from shared.images import load_photo

    return read_bitstream(path) if is_stored(path) else load_photo(path)


def _encode(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix.lower() != SUFFIX:
        raise BadInput(f"{arguments.out} does not end in {SUFFIX}, by which a bitstream is known")

    from edge_client.encoder import Encoder, jpeg_size
    from shared.files import write_file

    encoder = Encoder(arguments.profile)
    photo = encoder.prepare(arguments.image, arguments.backend)
    bitstream = encoder.encode(photo, arguments.quality, arguments.max_bytes)
    write_file(arguments.out, bytes(bitstream), arguments.image)
    figures = _figures(len(bitstream), bitstream.bpp, (bitstream.quality,), jpeg_size(photo))
    print(f"{len(bitstream):,} B, {figures}")


def _inspect(arguments: argparse.Namespace) -> None:
    from edge_client.inspection import inspect
    from edge_client.stored import read_bitstream

    inspection = inspect(read_bitstream(arguments.file))
    print(json.dumps(inspection.as_json()) if arguments.json else inspection)


def _decode(arguments: argparse.Namespace) -> None:
    from edge_client.stored import picture_bytes, picture_format, read_bitstream, reconstruct
    from shared.files import write_file

    kind = picture_format(arguments.out)
    bitstream = read_bitstream(arguments.file)
    photo = reconstruct(bitstream, arguments.profile)
    write_file(arguments.out, picture_bytes(photo, kind), arguments.file)
    width, height = photo.original_size
    print(
        f"{photo.width}x{photo.height} pixels from {len(bitstream):,} B, quality {bitstream.quality}; "
        f"the photo was {width}x{height}"
    )


def as_json(reply: Reply) -> dict[str, Any]:
    """What ``send --json`` prints."""
    answer, receipt = reply.answer, reply.receipt
    return {
        "answer": answer.text,
        "finish": answer.finish,
        "tokens": answer.tokens,
        "task": answer.task,
        "choice": answer.choice,
        "box": answer.box and {side: round(place, 1) for side, place in asdict(answer.box).items()},
        "backend": answer.backend,
        "profile": answer.profile,
        "quality": receipt.qualities[0],
        "bytes_payload": receipt.bytes_payload,
        "bytes_wire": receipt.bytes_wire,
        "bpp": round(receipt.bpp, 4),
        "bytes_jpeg75": receipt.bytes_jpeg75,
        "timings_ms": {name: round(value, 1) for name, value in _timings(reply).items()},
        "model_digests": answer.digests,
    }


def found_lines(answer: Answer, choices: Sequence[str]) -> list[str]:
    """What ``send`` prints of what was found in the answer, where something was looked for."""
    if answer.task == "choice":
        return [f"choice: {'none' if answer.choice is None else choices[answer.choice]}"]
    if answer.task == "box":
        sides = asdict(answer.box).items() if answer.box else ()
        return [f"box: {', '.join(f'{side} {place:.0f}' for side, place in sides) or 'none'}"]
    return []


def receipt_line(reply: Reply) -> str:
    """What ``send`` prints below the answer."""
    receipt = reply.receipt
    figures = _figures(receipt.bytes_payload, receipt.bpp, receipt.qualities, receipt.bytes_jpeg75)
    labels = {"decode": "decode+neck"}
    times = [
        f"{labels.get(name, name)} {value:,.0f} ms"
        for name, value in _timings(reply).items()
        if name not in ("load", "queue") or value >= 1
    ]
    return f"{receipt.bytes_payload:,} B sent ({receipt.bytes_wire:,} B on the wire), {figures} | {', '.join(times)}"


def _figures(size: int, bpp: float, qualities: Sequence[int], jpeg75: int | None) -> str:
    figures = f"{bpp:.3f} bpp, quality {', '.join(map(str, dict.fromkeys(qualities)))}"
    if jpeg75:
        ratio = jpeg75 / size
        figures += f", {ratio:.{0 if ratio >= 10 else 1}f}x smaller than JPEG 75 ({jpeg75:,} B)"
    return figures


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
