"""Serve the web UI next to a TorchServe on this machine; see docs/web-ui.md.

python -m web --url http://127.0.0.1:8080 --key-file key_file.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdxl_server.serving.readiness import NotReadyError, read_token
from web.server import PORT, PageServer


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m web", description=(__doc__ or "").partition(";")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="TorchServe's inference address (%(default)s)")
    parser.add_argument("--jobs", metavar="URL", help="the jobs' address, such as http://127.0.0.1:8090 (none)")
    parser.add_argument(
        "--address",
        default="127.0.0.1",
        help="to listen on; 0.0.0.0 in a container that publishes the port on loopback",
    )
    parser.add_argument("--port", type=int, default=PORT, help="to listen on (%(default)s)")
    parser.add_argument(
        "--key-file",
        type=Path,
        default=Path("key_file.json"),
        help="TorchServe's key file; its token goes into the printed address (%(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        token = read_token(options.key_file, "inference")
        server = PageServer(options.url, address=options.address, port=options.port, jobs=options.jobs)
    except (OSError, ValueError, NotReadyError) as error:
        print(error, file=sys.stderr)
        return 1
    with server:
        serve(server, token)
    return 0


def serve(server: PageServer, token: str) -> None:
    """Print the web UI's address and serve until Ctrl-C."""
    print(f"The web UI is at {server.make_url(token)}\nCtrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    sys.exit(main())
