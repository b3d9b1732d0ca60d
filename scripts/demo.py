"""Serve a small Stable Diffusion XL on this machine, ask it for a picture, save the picture, stop the server.

The model has random weights, made on the spot without a download, so the picture is noise: it shows that the way from
the archive to the picture works.
"""

import sys
import tempfile
from pathlib import Path

from scripts.local_server import ROOT, LocalServer, ServerError, make_archive, run_command

PROMPT = "a photo of an astronaut riding a horse on mars"


def make_model() -> Path:
    """Return the folder of the small model, made at the first call."""
    folder = ROOT / "build" / "tiny-sdxl"
    if not (folder / "model_index.json").exists():
        run_command(sys.executable, "-m", "scripts.make_random_model", folder, "--size", "tiny", folder=ROOT)
    return folder


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("Making the model and its archive")
        make_archive(folder, make_model(), (ROOT / "model-config.yaml").read_text())
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
