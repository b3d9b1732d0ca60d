"""Download a model, archive it, and serve it with the web UI until Ctrl-C.

python -m tools.serve --model stabilityai/stable-diffusion-xl-base-1.0

The settings come from model-config.yaml. A second run downloads nothing.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import yaml

import Download_model
from sdxl_server.model.sources import read_hub_page
from sdxl_server.serving.readiness import read_token
from tools.server import ROOT, LocalServer, ServerError, make_archive, read_shipped
from web.__main__ import serve
from web.server import PORT, PageServer

EXAMPLE = 'python query.py --url {url} --key-file {key_file} --prompt "a photo of an astronaut riding a horse on mars"'


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default=Download_model.DEFAULT_MODEL,
        help="a hub id or its page, a folder, or a .safetensors file; see Download_model.py (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=PORT, help="of the web UI (default: %(default)s)")
    options = parser.parse_args()
    name = "--".join(filter(None, read_hub_page(options.model)))
    model = ROOT / "build/models" / re.sub(r"[^\w.-]+", "--", name).strip("-.")
    settings = read_shipped()
    arguments = ["--model", options.model, "--output-dir", str(model)]
    if settings["handler"].get("safety_checker"):
        arguments.append("--safety-checker")
    if status := Download_model.main(arguments, retry="make sdxl MODEL={}"):
        return status
    settings["handler"]["model_path"] = str(model)
    with tempfile.TemporaryDirectory() as name:
        try:
            make_archive(Path(name), None, yaml.safe_dump(settings, sort_keys=False))
            print("Starting TorchServe. The first start compiles the model, which takes minutes.", flush=True)
            with LocalServer(Path(name)) as server:
                serve_web_ui(server, port=options.port)
        except (ServerError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


def serve_web_ui(server: LocalServer, *, port: int = PORT) -> None:
    """Print an example request and the web UI's address, and serve the web UI until Ctrl-C."""
    print(EXAMPLE.format(url=server.url, key_file=server.key_file))
    with PageServer(server.address, port=port) as page:
        serve(page, read_token(server.key_file, "inference"))


if __name__ == "__main__":
    sys.exit(main())
