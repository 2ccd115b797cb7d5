"""``make demo``: starts a server, sends it a photograph, prints the answer and the receipt, stops the server."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.server import COMMANDS, PHOTO, running_server, sample_photo


def main() -> int:
    pull = subprocess.run([COMMANDS / "comneck", "weights", "pull", "--profile", "small"], check=False)
    if pull.returncode:
        return pull.returncode
    print("\n$ cloud-server serve", flush=True)
    with running_server() as server:
        print(f"profile small, gRPC on {server.grpc}\n")
        print(f'$ edge-client send {PHOTO} "describe this"', flush=True)
        send = [COMMANDS / "edge-client", "send", sample_photo(), "describe this", "--server", server.grpc]
        return subprocess.run(send, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
