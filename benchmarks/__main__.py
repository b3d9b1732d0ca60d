"""Compare engines, checkouts and step plans on one model. The program measures everything in turns."""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import controls, server, shortcuts
from benchmarks.comparison import compare_configurations, format_comparison
from benchmarks.configurations import IMAGE, PARTS, ConfigurationError, choose_configurations
from benchmarks.machine import describe_machine
from benchmarks.turns import MeasuringError, format_table
from demo.measure import GUIDANCE
from tools.server import ROOT

DEMO, BASE = ROOT / "demo/model", ROOT / "build/base"


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = commands.add_parser("parts", help="one call of the UNet, the VAE or a text encoder, per engine")
    parts.add_argument("--parts", nargs="+", default=["unet"], choices=PARTS, help="(default: unet)")
    images = commands.add_parser("images", help="whole images, other libraries too")
    images.add_argument("--steps", type=int, help="of an image (default: 4; quick: 10)")
    for each in (parts, images):
        each.add_argument("--quick", action="store_true", help="the demonstration model at 128×128, in minutes")
        each.add_argument("--model", type=Path, help="a pipeline's folder (default: build/base, of SDXL's real size)")
        each.add_argument("--size", type=int, help="width and height in pixels (default: 512; quick: 128)")
        each.add_argument("--only", nargs="+", default=[], metavar="NAME", help="ratios are to the first name")
        each.add_argument("--configurations", type=Path, default=Path(__file__).with_name("configurations.yaml"))
    servers = commands.add_parser("server", help="starts, images and memory through TorchServe")
    server.add_options(servers)
    for each, starts, calls in ((parts, 1, 3), (images, 1, 1), (servers, 2, 1)):
        each.add_argument("--starts", type=int, default=starts, help="of each alone (default: %(default)s)")
        each.add_argument("--calls", type=int, default=calls, help="after a start alone (default: %(default)s)")
        each.add_argument("--turns", type=int, default=5, help="calls of each in turns (default: %(default)s)")
        each.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for one call or start")
    plans = commands.add_parser("shortcuts", help="unet_calls, guidance_interval and few steps: distance and time")
    plans.add_argument("--model", type=Path, default=DEMO, help="a pipeline's folder (default: demo/model)")
    plans.add_argument("--size", type=int, default=128, help="width and height in pixels (default: %(default)s)")
    plans.add_argument("--steps", type=int, default=30, help="of a full image (default: %(default)s)")
    plans.add_argument("--calls", type=int, nargs="+", default=[11, 8], help="UNet calls (default: 11 8)")
    plans.add_argument("--prompts", type=int, default=100, help="(default: %(default)s)")
    plans.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these plans, and the full one")
    plans.add_argument("--guidance", type=float, default=GUIDANCE, help="(default: %(default)s)")
    plans.add_argument("--dtype", default="float32", help="auto: as in the server (default: %(default)s)")
    plans.add_argument(
        "--pt2", type=yaml.safe_load, default="openvino", help="as in model-config.yaml (default: openvino)"
    )
    plans.add_argument("--handler", type=yaml.safe_load, default={}, help="more settings: {vae_path: ...}")
    control = commands.add_parser("controls", help="steps without controls, with them unused, and with them")
    control.add_argument("--model", type=Path, help="a pipeline's folder (default: build/base, of SDXL's real size)")
    control.add_argument("--sizes", type=int, nargs="+", default=[512], help="in pixels (default: 512)")
    control.add_argument("--kinds", nargs="+", default=controls.KINDS, choices=controls.KINDS, help="(default: all)")
    control.add_argument("--turns", type=int, default=3, help="images of each in turns (default: %(default)s)")
    control.add_argument("--pt2", type=yaml.safe_load, default="openvino", help="(default: openvino)")
    for each in (images, plans):
        each.add_argument("--images", type=Path, metavar="FOLDER", help="save the images here")
    for each in commands.choices.values():
        each.add_argument("--output", type=Path, metavar="FILE", help="write all figures as JSON here")
    return parser.parse_args(argv)


def complete_options(options: argparse.Namespace) -> None:
    """Choose defaults that depend on --quick, and check the model.

    Raises:
        ConfigurationError: the model's folder has no pipeline.
    """
    is_quick = getattr(options, "quick", False)
    options.model = (options.model or (DEMO if is_quick else BASE)).resolve()
    options.size = getattr(options, "size", None) or (128 if is_quick else 512)
    options.steps = getattr(options, "steps", None) or (10 if is_quick else 4)
    if not (options.model / "model_index.json").exists():
        raise ConfigurationError(
            f"--model takes the folder of a pipeline, and {options.model} is none; "
            "python -m tools.random_model build/base --size base makes one"
        )
    options.images = getattr(options, "images", None) and options.images.resolve()
    if options.images:
        options.images.mkdir(parents=True, exist_ok=True)


def compare_engines(options: argparse.Namespace) -> dict[str, Any]:
    """Measure parts or images, and print their tables. Return all figures."""
    complete_options(options)
    chosen = choose_configurations(options.configurations, options.only)
    figures: dict[str, Any] = {"machine": describe_machine()}
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:  # caches and exports need gigabytes
        for part in options.parts if options.command == "parts" else [IMAGE]:
            rows = compare_configurations(part, chosen, options, Path(folder))
            figures[part] = [dataclasses.asdict(row) for row in rows]
            print(f"\n{part}\n\n{format_table(format_comparison(rows, part))}", flush=True)
    return figures


def compare_servers(options: argparse.Namespace) -> dict[str, Any]:
    """Measure starts and images through TorchServe, and print the table. Return all figures."""
    rows = server.measure_servers(options)
    print(format_table(server.format_servers(rows)))
    return {"machine": describe_machine(), "server": [dataclasses.asdict(row) for row in rows]}


def compare_plans(options: argparse.Namespace) -> dict[str, Any]:
    """Judge step plans, and print the table. Return all figures."""
    complete_options(options)
    plans = shortcuts.list_plans(options.steps, options.calls)
    if unknown := [name for name in options.only if name not in plans]:
        raise ConfigurationError(f"--only takes {', '.join(map(repr, plans))}, not {unknown[0]!r}")
    chosen = {name: fields for name, fields in plans.items() if not options.only or name in ("full", *options.only)}
    size = {"width": options.size, "height": options.size}
    settings = {"dtype": options.dtype, "guidance_scale": options.guidance, **size, **options.handler}
    rows = shortcuts.judge_plans(
        options.model, chosen, settings=settings, pt2=options.pt2, count=options.prompts, images=options.images
    )
    print(format_table(shortcuts.format_plans(rows)))
    return {"machine": describe_machine(), "shortcuts": [dataclasses.asdict(row) for row in rows]}


def compare_controls(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the steps with controls, and print a table for each size. Return all figures."""
    complete_options(options)
    given = {"sizes": options.sizes, "pt2": options.pt2, "kinds": options.kinds, "turns": options.turns}
    figures = controls.measure_controls(
        options.model, options.model.with_name(f"{options.model.name}-controls"), **given
    )
    for size, rows in figures.items():
        print(f"\n{size}×{size}\n\n{format_table(controls.format_controls(rows))}", flush=True)
    return {
        "machine": describe_machine(),
        "controls": {k: [dataclasses.asdict(row) for row in figures[k]] for k in figures},
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    commands = {"parts": compare_engines, "images": compare_engines, "server": compare_servers}
    commands["controls"] = compare_controls
    try:
        figures = commands.get(options.command, compare_plans)(options)
    except (ConfigurationError, MeasuringError) as error:
        sys.exit(f"benchmarks: {error}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        words = sys.argv[1:] if argv is None else list(argv)
        options.output.write_text(json.dumps({"command": words, **figures}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
