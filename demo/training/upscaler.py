"""Train an upscaler of two for the demonstration model's images, or measure it.

    python -m demo.training.upscaler
    python -m demo.training.upscaler --measure 200 --sheet sheet.png

It learns from drawings of 128 and 256 pixels. Half of the small ones pass the model's VAE, whose edges are unclean.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from demo import shapes
from demo.measure import JUDGED, choose_prompts, draw_prompts, draw_with, load_eager_pipeline, score_pictures
from demo.training.adapters import fit
from demo.training.data import choose_training_scene, save_grid, to_image, to_tensor
from demo.training.models import load_models
from demo.training.steps import compute_short, show_progress
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.upscaling import upscale
from sdxl_server.model.upscaler import import_spandrel, load_upscaler

SCALE, FEATURES, LAYERS = 2, 24, 4
CROP = 24  # pixels of a small drawing
CANDIDATES = 4  # crops; the one with the most detail is learnt
LOSS_SCALE = 1000  # gradients are clipped to a norm of 1
SMALL, LARGE = shapes.IMAGE_SIZE, SCALE * shapes.IMAGE_SIZE
Enlarge = Callable[[Image.Image], Image.Image]


def draw_pair(scene: shapes.Scene, random: Random) -> tuple[Image.Image, Image.Image]:
    """Return a small and a large drawing of a scene."""
    moves = [shapes.choose_move(random) for _ in scene.things]
    small, large = (shapes.draw_scene(scene, width=side, height=side, moves=moves) for side in (SMALL, LARGE))
    return small, large


@torch.no_grad()
def decode_encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Return images after the VAE, in batches."""
    with compute_short(images.device.type):
        parts = [vae.decode(vae.encode(each).latent_dist.mean).sample.float() for each in images.split(32)]
    return torch.cat(parts).clamp(-1, 1)


def draw_pairs(vae: Any, *, count: int, seed: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return small and large drawings, from 0 to 255. The second half of the small ones has passed the VAE."""
    random = Random(f"upscaler {seed}")
    pairs = [draw_pair(choose_training_scene(random), random) for _ in show_progress(0, count, "drawings")]
    small, large = (to_tensor(each) for each in zip(*pairs, strict=True))
    small[count // 2 :] = decode_encoded(vae, small[count // 2 :].to(device)).cpu()
    return tuple(((each + 1) * 127.5).round().byte() for each in (small, large))


def choose_crop(small: torch.Tensor, large: torch.Tensor, random: Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same crop of a small and a large drawing, the one with the most detail of CANDIDATES."""
    crops = []
    for _ in range(CANDIDATES):
        top, left = random.randrange(SMALL - CROP + 1), random.randrange(SMALL - CROP + 1)
        whole = large[:, SCALE * top : SCALE * (top + CROP), SCALE * left : SCALE * (left + CROP)].float() / 255
        crops.append((small[:, top : top + CROP, left : left + CROP].float() / 255, whole))
    return max(crops, key=lambda pair: float(pair[1].std(dim=(1, 2)).sum()))


def train(options: argparse.Namespace) -> None:
    import_spandrel()
    from spandrel.architectures.Compact import Compact

    _, vae = load_models(options.model, device=options.device)
    small, large = draw_pairs(vae, count=options.drawings, seed=options.seed, device=options.device)
    torch.manual_seed(options.seed)
    network = Compact(num_feat=FEATURES, num_conv=LAYERS, upscale=SCALE).to(options.device)
    for each in network.body[-1].parameters():  # so that it begins with the nearest pixels
        torch.nn.init.zeros_(each)

    def compute(step: int) -> torch.Tensor:
        random = Random(f"upscaler {options.seed} {step}")
        chosen = [random.randrange(len(small)) for _ in range(options.batch)]
        crops = [choose_crop(small[i], large[i], random) for i in chosen]
        given, wanted = (torch.stack(each).to(options.device) for each in zip(*crops, strict=True))
        difference: torch.Tensor = network(given) - wanted
        return LOSS_SCALE * difference.square().mean()

    fit(network.parameters(), compute, steps=options.steps, rate=options.rate, name="upscaler")
    tensors = {name: each.detach().half().contiguous().cpu() for name, each in network.state_dict().items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, options.output, {"format": "pt"})


def list_ways(pipeline: Any, file: Path) -> dict[str, Enlarge]:
    """Return the ways to enlarge an image that are compared, by name."""
    upscaler = load_upscaler(pipeline, HandlerConfig(upscaler_path=str(file)), "float32", model_dir=Path.cwd())
    if upscaler is None:
        raise ValueError(f"{file} holds no upscaler")

    def enlarge(image: Image.Image) -> Image.Image:
        *_, result = upscale(upscaler, upscaler.module, image, SCALE)
        enlarged: Image.Image = result
        return enlarged

    def resize(how: Image.Resampling) -> Enlarge:
        return lambda image: image.resize((SCALE * image.width, SCALE * image.height), how)

    resampling = Image.Resampling
    return {"bicubic": resize(resampling.BICUBIC), "Lanczos": resize(resampling.LANCZOS), "this upscaler": enlarge}


def compute_psnr(made: Sequence[Image.Image], wanted: Sequence[Image.Image]) -> float:
    """Return the mean PSNR of images in dB."""
    errors = [np.square(np.asarray(a, dtype=float) - np.asarray(b)).mean() for a, b in zip(made, wanted, strict=True)]
    return float(np.mean([10 * math.log10(255**2 / max(each, 1e-9)) for each in errors]))


def measure(options: argparse.Namespace) -> None:
    """Print the PSNR on held-out drawings, and the shares of the model's images that are right when enlarged."""
    pipeline = load_eager_pipeline(options.model)
    ways, random = list_ways(pipeline, options.output), Random("held-out drawings")
    prompts = choose_prompts(options.measure)
    pairs = [draw_pair(each.scene, random) for each in prompts]
    large = [each for _, each in pairs]
    small = {"drawings": [each for each, _ in pairs]}
    decoded = decode_encoded(pipeline.vae, to_tensor(small["drawings"]))
    small["drawings after the VAE"] = [to_image(each) for each in decoded]
    print("| way | " + " | ".join(f"PSNR of {name}, dB" for name in small) + " |")
    for name, enlarge in ways.items():
        figures = [compute_psnr([enlarge(each) for each in images], large) for images in small.values()]
        print(f"| {name} | {' | '.join(f'{each:.2f}' for each in figures)} |", flush=True)
    drawn = list(draw_prompts(prompts, draw_with(pipeline, num_inference_steps=10)))
    enlarged = {"none, 128x128": drawn, **{name: [run(each) for each in drawn] for name, run in ways.items()}}
    print(f"| {len(drawn)} images enlarged by | {' | '.join((*JUDGED, 'all'))} |")
    for name, images in enlarged.items():
        shares = score_pictures(prompts, images).values()
        print(f"| {name} | {' | '.join(f'{each:.1%}' for each in shares)} |", flush=True)
    if options.sheet:
        chosen = [*drawn[:6]]
        rows = [[enlarge(each) for each in chosen] for name, enlarge in ways.items() if name != "Lanczos"]
        save_grid(options.sheet, [each for row in rows for each in row], columns=len(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("demo/upscaler/double.safetensors"), help="(default: %(default)s)"
    )
    parser.add_argument("--drawings", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4500, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", type=int, metavar="COUNT", help="measure the upscaler instead")
    parser.add_argument("--sheet", type=Path, help="a file for some enlarged images, with --measure")
    options = parser.parse_args()
    (measure if options.measure else train)(options)


if __name__ == "__main__":
    main()
