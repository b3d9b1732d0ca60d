"""Train an embedding (textual inversion) of the demonstration model. The model itself does not change.

    python -m demo.training.embeddings                  train it
    python -m demo.training.embeddings --measure 25     draw 25 prompts on each background with it, and print a table

Drawings show one thing: a large yellow star at the top. Prompts call it `lodestar` and name the background. Only the
vectors of this name learn, from the model's own loss.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from demo import shapes
from demo.measure import JUDGED, Prompt, draw_prompts, draw_with, load_eager_pipeline, score_pictures
from demo.training.adapters import fit
from demo.training.data import to_tensor
from demo.training.models import Models, build_scheduler, load_models
from demo.training.unet import compute_focus, compute_loss
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.model.embeddings import expand, load_embeddings
from sdxl_server.model.families import FAMILIES

NAME, THING = "lodestar", shapes.Thing("yellow", "star", "large", "top")
UNSEEN = ("cyan", "green")  # backgrounds. The model itself has not learnt from such a star on cyan
WORDINGS = ("{name} on a {ground} background", "{name}, {ground} background", "a {ground} background with {name}")
DRAWINGS = 32  # for each background
PARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class ExtendedEmbedding(torch.nn.Module):
    """A text encoder's token embedding with rows that learn after its own ones, which do not."""

    def __init__(self, embedding: Any, count: int) -> None:
        super().__init__()
        self.own = embedding.weight.detach()
        self.rows = torch.nn.Parameter(self.own.mean(0).repeat(count, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, torch.cat([self.own, self.rows]))


def word_scene(scene: shapes.Scene, random: Random, *, name: str) -> str:
    """Put a scene of the thing into words."""
    return random.choice(WORDINGS).format(name=name, ground=scene.background)


def extend_models(models: Models, count: int) -> tuple[str, dict[str, ExtendedEmbedding]]:
    """Let models learn only new rows of their text encoders; return what stands for them in prompts, and the rows."""
    for part in models.trained:
        part.requires_grad_(False)
    tokens = [f"<{NAME}-{each}>" for each in range(count)]
    models.tokenizer.add_tokens(tokens)
    extended = {}
    for name in PARTS:
        encoder = getattr(models, name)
        extended[name] = ExtendedEmbedding(encoder.get_input_embeddings(), count)
        encoder.set_input_embeddings(extended[name])
    return "".join(tokens), extended


@torch.no_grad()
def draw_group(vae: Any, *, seed: int, device: str) -> tuple[torch.Tensor, list[shapes.Scene], torch.Tensor]:
    """Return latents, scenes and micro-conditions of the thing on backgrounds."""
    random, size = Random(f"{NAME} {seed}"), float(shapes.IMAGE_SIZE)
    grounds = [each for each in shapes.COLOURS if each not in (THING.colour, *UNSEEN)]
    scenes = [shapes.Scene(ground, (THING,)) for ground in grounds for _ in range(DRAWINGS)]
    drawn = to_tensor([shapes.draw_scene(scene, random=random) for scene in scenes])
    latents = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in drawn.split(32)])
    return latents, scenes, torch.tensor([[size, size, 0, 0, size, size]] * len(scenes))


def choose_named_prompts(count: int, grounds: Iterable[str], *, name: str = NAME) -> list[Prompt]:
    """Return prompts that name the thing, so many on each background."""
    random = Random(f"named {NAME}")
    scenes = [shapes.Scene(ground, (THING,)) for ground in grounds for _ in range(count)]
    return [Prompt(word_scene(scene, random, name=name), scene, i) for i, scene in enumerate(scenes)]


def print_named_shares(model: Path, embedding: Path, *, count: int, steps: int = 10) -> None:
    """Draw and judge prompts with the embedding, and with the words for it."""
    pipeline = load_eager_pipeline(model)
    config = HandlerConfig.parse({"embeddings": [{"name": NAME, "path": str(embedding.resolve())}]})
    embeddings = load_embeddings(pipeline, FAMILIES["sdxl"], config, model_dir=Path())
    print(f"| prompts | backgrounds | {' | '.join((*JUDGED, 'all'))} |")
    print("|---" * (len(JUDGED) + 3) + "|")
    learnt = [each for each in shapes.COLOURS if each not in (THING.colour, *UNSEEN)]
    for name in (NAME, f"{THING.size} {THING.colour} {THING.shape} at the {THING.position}"):
        for what, grounds in (("learnt", learnt), ("not learnt", UNSEEN)):
            prompts = choose_named_prompts(count, grounds, name=name)
            read = [replace(each, text=expand(each.text, embeddings)) for each in prompts]
            images = list(draw_prompts(read, draw_with(pipeline, num_inference_steps=steps)))
            shares = score_pictures(prompts, images).values()
            print(f"| {len(prompts)}: {name} | {what} | {' | '.join(f'{each:.1%}' for each in shares)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path(f"demo/embeddings/{NAME}/{NAME}.safetensors"), help="(default: %(default)s)"
    )
    parser.add_argument("--vectors", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-2, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", type=int, metavar="COUNT", help="measure the embedding instead")
    options = parser.parse_args()
    if options.measure:
        print_named_shares(options.model, options.output, count=options.measure)
        return
    models, vae = load_models(options.model, device=options.device)
    tokens, extended = extend_models(models, options.vectors)
    groups = [draw_group(vae, seed=options.seed, device=options.device)]
    alphas = build_scheduler().alphas_cumprod.to(options.device)

    def compute(step: int) -> torch.Tensor:
        torch.manual_seed(options.seed * 1_000_003 + step)
        loss: torch.Tensor = compute_loss(
            models,
            groups,
            random=Random(f"{NAME} {options.seed} {step}"),
            batch=options.batch,
            alphas=alphas,
            focus=compute_focus(step, steps=options.steps),
            word=lambda scene, random: word_scene(scene, random, name=tokens),
        )
        return loss

    fit([each.rows for each in extended.values()], compute, steps=options.steps, rate=options.rate, name=NAME)
    rows = {PARTS[name]: each.rows.detach().half().contiguous().cpu() for name, each in extended.items()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(rows, options.output, {"format": "pt"})


if __name__ == "__main__":
    main()
