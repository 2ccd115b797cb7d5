"""``make demo``: starts a server, sends it a photograph, prints the answer and the receipt, stops the server.

The photograph is one that scikit-image carries, so that nobody has to fetch it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

COMMANDS = Path(sys.executable).parent
PHOTO = "chelsea.png"  # by Stefan van der Walt, CC0


def main() -> int:
    package = find_spec("skimage")
    if package is None or package.origin is None:
        print("the demo's photo comes with scikit-image: pip install 'comneck[dev]'", file=sys.stderr)
        return 1
    photo = Path(package.origin).parent / "data" / PHOTO
    serve = [COMMANDS / "cloud-server", "serve", "--grpc-port", "0", "--http-port", "0", "--json"]
    print("$ cloud-server serve", flush=True)
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                return server.wait()
            address = json.loads(line)["grpc"]
            print(f"profile small, gRPC on {address}\n")
            print(f'$ edge-client send {PHOTO} "describe this"', flush=True)
            send = [COMMANDS / "edge-client", "send", photo, "describe this", "--server", address]
            return subprocess.run(send, check=False).returncode
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main())
