"""Measure how often the demonstration model draws what a held-out prompt asks for, by steps; print a table.

python -m demo.measure --prompts 500 --steps 5 10 20 30 --sheet sheet.jpg
python -m demo.measure --prompts 100 --steps 10 --pt2 "{backend: openvino}"     through the server
python -m demo.measure --vague 200 --steps 4 --guidance-scale 0 --adapters demo/adapters/few-steps/few-steps.safetensors
python -m demo.measure --steps 10 --adapters demo/adapters/inverted/inverted.safetensors --inverted
"""

import argparse
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import yaml
from PIL import Image, ImageDraw
from tqdm import tqdm

from benchmarks.server import summarise
from demo.oracle import Verdict, judge_picture
from demo.shapes import (
    IMAGE_SIZE,
    Scene,
    choose_scene,
    describe_scene,
    invert_scene,
    is_held_out,
    iterate_scenes,
)
from sdxl_server.serving.client import send_request
from tools.server import LocalServer, make_archive, read_shipped

logger = logging.getLogger(__name__)

CAPTION_HEIGHT = 42
GUIDANCE = 1.5  # SDXL's usual 5 mixes colours: this model starts from pure noise, and 5 overshoots
JUDGED = tuple(field.name for field in fields(Verdict))
DrawPrompts = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]  # from prompts and seeds


@dataclass(frozen=True)
class Prompt:
    """A request in words and as a scene, and the seed to draw it with."""

    text: str
    scene: Scene
    seed: int


def choose_prompts(count: int, *, seed: int = 0) -> list[Prompt]:
    """Return prompts of one thing whose combinations no training has shown; each says everything.

    Args:
        count: 642 at most.
    """
    random = Random(f"prompts {seed}")
    return word_scenes(random.sample(list_held_out(), count), random)


def word_scenes(scenes: Sequence[Scene], random: Random) -> list[Prompt]:
    return [Prompt(describe_scene(scene, random=random), scene, i) for i, scene in enumerate(scenes)]


def list_held_out() -> list[Scene]:
    return [scene for scene in iterate_scenes() if is_held_out(scene.background, scene.things[0])]


def choose_pairs(count: int, *, seed: int = 0) -> list[Prompt]:
    """Return prompts of two things each; these pairs were not kept from training."""
    random = Random(f"pairs {seed}")
    return word_scenes([choose_scene(random, share_of_two=1) for _ in range(count)], random)


def choose_vague(count: int, *, seed: int = 0) -> list[Prompt]:
    """Return prompts of one thing that leave its position unsaid. An image between the five positions shows nothing."""
    random = Random(f"vague {seed}")
    scenes = [
        Scene(scene.background, (replace(scene.things[0], position=""),))
        for scene in random.sample(list_held_out(), count)
    ]
    return word_scenes(scenes, random)


def read_adapter_entry(text: str) -> dict[str, Any]:
    """Return an entry of `adapters` in model-config.yaml from FILE or FILE=SCALE."""
    name, _, scale = text.partition("=")
    path = Path(name).resolve()
    return {"name": path.stem, "path": str(path), "scale": float(scale or 1)}


def load_eager_pipeline(folder: Path, *, device: str = "cpu", adapters: Sequence[Mapping[str, Any]] = ()) -> Any:
    """Return the saved pipeline in float32, without progress bars.

    Args:
        adapters: as in model-config.yaml; added to the weights.
    """
    import torch
    from diffusers import StableDiffusionXLPipeline

    from sdxl_server.model.adapters.layer_names import index_layers
    from sdxl_server.model.adapters.lora_files import load_lora
    from sdxl_server.model.adapters.registry import fuse_adapter

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for each in adapters:
        _, changes = load_lora(Path(each["path"]), index_layers(pipeline, ("text_encoder", "text_encoder_2")))
        fuse_adapter(pipeline, changes, scale=each["scale"])
    return pipeline


def draw_with(pipeline: Any, **settings: Any) -> DrawPrompts:
    """Return a function that draws prompts with a pipeline."""
    import torch

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Sequence[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(list(prompts), generator=generators, **{"guidance_scale": GUIDANCE, **settings}).images

    return draw


@contextmanager
def draw_through_server(
    model: Path, pt2: Any, adapters: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Callable[..., DrawPrompts]]:
    """Serve the model with TorchServe; yield a function from settings to a function that draws prompts one by one.

    Args:
        pt2: as in model-config.yaml; None is eager PyTorch.
        adapters: as in model-config.yaml; each request names all of them.
    """
    config = read_shipped() | {"pt2": pt2}
    config["handler"]["adapters"] = list(adapters) or None
    named = [{"name": each["name"]} for each in adapters]
    with tempfile.TemporaryDirectory() as name:
        make_archive(Path(name), model, yaml.safe_dump(config))
        with LocalServer(Path(name)) as server:
            logger.info("%s", summarise(server.read_document()))

            def prepare(**settings: Any) -> DrawPrompts:
                def draw_one(prompt: str, seed: int) -> Image.Image:
                    fields = {"guidance_scale": GUIDANCE, **settings, "prompt": prompt, "seed": seed, "adapters": named}
                    answer = send_request(
                        "POST",
                        server.url,
                        json=fields | {"output_format": "png"},
                        headers=server.get_headers(),
                        timeout=600,
                    )
                    answer.raise_for_status()
                    return Image.open(io.BytesIO(answer.content))

                return lambda prompts, seeds: list(map(draw_one, prompts, seeds))

            yield prepare


def draw_prompts(prompts: Sequence[Prompt], draw: DrawPrompts, *, batch: int = 32) -> Iterator[Image.Image]:
    for i in range(0, len(prompts), batch):
        part = prompts[i : i + batch]
        yield from draw([prompt.text for prompt in part], [prompt.seed for prompt in part])


def score_pictures(prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> dict[str, float]:
    """Return the share of images that are right, for each feature and for all at once."""
    verdicts = [judge_picture(image, prompt.scene) for prompt, image in zip(prompts, images, strict=True)]
    shares = {name: sum(asdict(verdict)[name] for verdict in verdicts) / len(verdicts) for name in JUDGED}
    return {**shares, "all": sum(verdict.is_right for verdict in verdicts) / len(verdicts)}


def wrap_words(text: str, *, width: int) -> str:
    """Break a caption into lines of at most so many characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def save_sheet(path: Path, prompts: Sequence[Prompt], images: Sequence[Image.Image], *, columns: int = 4) -> None:
    """Write images with their prompts below."""
    width, height = IMAGE_SIZE + 52, IMAGE_SIZE + 8 + CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        x, y = i % columns * width, i // columns * height
        sheet.paste(image, (x + 26, y + 4))
        draw.text((x + 4, y + IMAGE_SIZE + 6), wrap_words(prompt.text, width=32), fill="black", font_size=10)
    sheet.save(path, quality=90)


def print_shares(prepare: Callable[..., DrawPrompts], arguments: argparse.Namespace) -> None:
    """Draw and judge the prompts that the arguments name; print each row when it is ready."""
    print(f"| prompts | steps | {' | '.join((*JUDGED, 'all', 'all, where small'))} | s per image |")
    print("|---" * (len(JUDGED) + 5) + "|")
    for name, prompts in (
        ("one thing", choose_prompts(arguments.prompts)),
        ("two things", choose_pairs(arguments.pairs)),
        ("one thing, no position", choose_vague(arguments.vague)),
    ):
        judged = [replace(each, scene=invert_scene(each.scene)) for each in prompts] if arguments.inverted else prompts
        for steps in arguments.steps if prompts else []:
            draw = prepare(num_inference_steps=steps, guidance_scale=arguments.guidance_scale)
            start = time.perf_counter()
            drawn = draw_prompts(prompts, draw, batch=arguments.batch)
            images = list(tqdm(drawn, total=len(prompts), desc=f"{steps} steps", leave=False))
            seconds = (time.perf_counter() - start) / len(prompts)
            shares = score_pictures(judged, images)
            small = [i for i, each in enumerate(judged) if any(thing.size == "small" for thing in each.scene.things)]
            shares["small"] = score_pictures([judged[i] for i in small], [images[i] for i in small])["all"]
            print(
                f"| {name} | {steps} | {' | '.join(f'{share:.1%}' for share in shares.values())} | {seconds:.2f} |",
                flush=True,
            )
    if arguments.sheet:
        shown = [*choose_prompts(12, seed=1), *choose_pairs(4, seed=1)]
        draw = prepare(num_inference_steps=max(arguments.steps), guidance_scale=arguments.guidance_scale)
        save_sheet(arguments.sheet, shown, list(draw_prompts(shown, draw)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts (default: %(default)s, most: 642)")
    parser.add_argument("--pairs", type=int, default=0, help="prompts of two things, besides (default: %(default)s)")
    parser.add_argument(
        "--vague", type=int, default=0, help="prompts that leave the position unsaid (default: %(default)s)"
    )
    parser.add_argument("--inverted", action="store_true", help="judge by the inverted colours")
    parser.add_argument(
        "--adapters", type=read_adapter_entry, nargs="+", default=[], metavar="PATH[=SCALE]", help="to draw with"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 30])
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--pt2",
        type=yaml.safe_load,
        default=False,
        help="draw one by one through TorchServe, with this pt2 in model-config.yaml",
    )
    parser.add_argument("--sheet", type=Path, help="write a sheet of the first 12 prompts and 4 pairs here")
    arguments = parser.parse_args()
    logging.basicConfig()
    logger.setLevel(logging.INFO)
    prepare: Callable[..., DrawPrompts]
    with ExitStack() as stack:
        if arguments.pt2 is False:
            pipeline = load_eager_pipeline(arguments.model, device=arguments.device, adapters=arguments.adapters)
            prepare = partial(draw_with, pipeline)
        else:
            prepare = stack.enter_context(draw_through_server(arguments.model, arguments.pt2, arguments.adapters))
        print_shares(prepare, arguments)


if __name__ == "__main__":
    main()
