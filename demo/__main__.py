"""Serve the demonstration model on this machine, ask it for a picture, save the picture, stop the server."""

import sys
import tempfile
from pathlib import Path

import yaml

from demo.measure import GUIDANCE
from tools.server import ROOT, LocalServer, ServerError, make_archive, read_shipped, run_command

PROMPT = "a large yellow star on a blue background, left"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("Making the archive")
        settings = read_shipped()
        settings["handler"]["guidance_scale"] = GUIDANCE
        make_archive(folder, ROOT / "demo/model", yaml.safe_dump(settings, sort_keys=False))
        print("Starting TorchServe; the model is compiled for OpenVINO")
        try:
            with LocalServer(folder) as server:
                print(f"Asking for {PROMPT!r}", flush=True)
                key_file = folder / "key_file.json"
                query = run_command(
                    *(sys.executable, "query.py", "--url", server.url, "--prompt", PROMPT, "--key-file", key_file),
                    folder=ROOT,
                    capture_output=True,
                )
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"The server is stopped; the picture is {ROOT / query.stdout.strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
