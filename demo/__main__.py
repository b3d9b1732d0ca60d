"""Serve the demonstration model on this machine, request an image, save it, stop the server.

python -m demo --page     serve it and the web UI until Ctrl-C
"""

import argparse
import sys
import tempfile
from pathlib import Path

import yaml

from demo.measure import GUIDANCE
from tools.serve import serve_web_ui
from tools.server import ROOT, LocalServer, ServerError, make_archive, read_shipped, run_command
from web.server import PORT

PROMPT = "a large yellow star on a blue background, left"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Serve the demonstration model.")
    parser.add_argument("--page", action="store_true", help="with the web UI, until Ctrl-C")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("Making the archive")
        settings = read_shipped()
        settings["handler"]["guidance_scale"] = GUIDANCE
        make_archive(folder, ROOT / "demo/model", yaml.safe_dump(settings, sort_keys=False))
        print("Starting TorchServe; the model is compiled for OpenVINO", flush=True)
        try:
            with LocalServer(folder) as server:
                (serve_web_ui if options.page else save_demo_image)(server)
        except (ServerError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def save_demo_image(server: LocalServer) -> None:
    """Request an image and save it."""
    print(f"Asking for {PROMPT!r}", flush=True)
    query = run_command(
        *(sys.executable, "query.py", "--url", server.url, "--prompt", PROMPT, "--key-file", server.key_file),
        folder=ROOT,
        capture_output=True,
    )
    print(f"make page serves the model to a browser, at http://127.0.0.1:{PORT}/")
    print(f"The image is {ROOT / query.stdout.strip()}")


if __name__ == "__main__":
    sys.exit(main())
