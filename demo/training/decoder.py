"""Train the VAE's decoder on latents that the UNet makes of prompts."""

import itertools
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo import shapes
from demo.training.data import choose_training_scene, draw_sample, read_scene, save_grid, to_image, to_tensor
from demo.training.models import Models, build_pipeline
from demo.training.steps import (
    build_optimizer,
    compute_rate,
    compute_short,
    save_state,
    show_loss,
    show_progress,
    take_step,
)
from demo.training.vae import VAE_WEIGHT_DECAY, compute_difference

DECODER_RATE = 5e-4
FARTHEST_GROUND = 50  # of 255 levels, in any channel
LEAST_SAMPLE_OVERLAP = 0.5  # with the requested thing; less is something else


def find_move(thing: shapes.Thing, mask: Any) -> tuple[shapes.Move, float]:
    """Return a thing's move of the best overlap with a mask, and this overlap."""
    height, width = mask.shape
    best: tuple[float, shapes.Move] = (0.0, (0.0, 0.0, 0.0))
    for scale in np.linspace(-1, 1, 5):
        image = Image.new("L", (width, height))
        centre, radius = shapes.place_thing(thing, (0, 0, scale), width=width, height=height)
        shapes.draw_shape(image, thing.shape, centre=centre, radius=radius, fill=255)
        drawn = np.asarray(image) > 127
        reach = round(shapes.LARGEST_SHIFT * width)
        for x, y in itertools.product(range(-reach, reach + 1), repeat=2):
            moved = np.roll(drawn, (y, x), (0, 1))
            overlap = (moved & mask).sum() / (moved | mask).sum()
            best = max(best, (overlap, (x / reach, y / reach, float(scale))))
    return best[1], best[0]


def find_moves(scene: shapes.Scene, image: Image.Image) -> tuple[list[shapes.Move], float]:
    """Return the moves that draw a scene most like an image, and the worst overlap."""
    ground = np.array(shapes.COLOURS[scene.background])
    mask = np.abs(np.asarray(image).astype(int) - ground).max(-1) > FARTHEST_GROUND
    moves, overlaps = [], []
    for i, thing in enumerate(scene.things):
        part = mask.copy()
        if len(scene.things) == 2:  # each in its half
            part[:, slice(mask.shape[1] // 2, None) if i == 0 else slice(mask.shape[1] // 2)] = False
        move, overlap = find_move(thing, part)
        moves.append(move)
        overlaps.append(overlap)
    return moves, min(overlaps)


@torch.no_grad()
def sample_latents(models: Models, vae: Any, folder: Path, *, count: int, seed: int) -> list[Any]:
    """Return latents that the pipeline makes of prompts, with their scenes and moves.

    Latents that do not show their prompt are left out.
    """
    pipeline, path = build_pipeline(models, vae), folder / "samples.pt"
    parts: list[Any] = torch.load(path)["parts"] if path.exists() else []
    for i in show_progress(len(parts), -(-count // 24), "samples"):
        random = Random(f"samples {seed} {i}")
        scenes = [choose_training_scene(random) for _ in range(24)]
        latents = pipeline(
            [shapes.describe_scene(scene, random=random) for scene in scenes],
            num_inference_steps=random.randint(4, 7),
            guidance_scale=random.uniform(1, 2),
            generator=torch.Generator().manual_seed(random.randrange(2**32)),
            output_type="latent",
        ).images
        part = []
        for scene, latent, decoded in zip(scenes, latents, vae.decode(latents).sample, strict=True):
            moves, overlap = find_moves(scene, to_image(decoded))
            if overlap > LEAST_SAMPLE_OVERLAP:
                part.append((latent.half().cpu(), astuple(scene), moves))
        parts.append(part)
        save_state(path, parts=parts)
    return [(latent, read_scene(scene), moves) for part in parts for latent, scene, moves in part]


def train_decoder(vae: Any, samples: Sequence[Any], folder: Path, *, steps: int, seed: int) -> None:
    """Train the decoder on the UNet's latents of prompts, to draw the requested scenes.

    These latents are a little wrong, unlike latents of true images. The encoder and the meaning of latents stay.
    """
    torch.manual_seed(seed)
    path, start = folder / "decoder.pt", 0
    trained = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    optimizer = build_optimizer(trained.parameters(), weight_decay=VAE_WEIGHT_DECAY)
    if path.exists():
        state = torch.load(path, map_location=vae.device)
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    bar, losses = show_progress(start, steps, "decoder"), []
    for step in bar:
        random = Random(f"decoder {seed} {step}")
        side = shapes.IMAGE_SIZE
        true = to_tensor([draw_sample(random, width=side, height=side).image for _ in range(2)]).to(vae.device)
        chosen = random.sample(samples, 4)
        sampled = torch.stack([latent.float() for latent, _, _ in chosen]).to(vae.device)
        asked = to_tensor([shapes.draw_scene(scene, moves=moves) for _, scene, moves in chosen]).to(vae.device)
        with compute_short(vae.device.type):
            with torch.no_grad():
                encoded = vae.encode(true).latent_dist.mean
            decoded = vae.decode(torch.cat([sampled, encoded.float()])).sample.float()
        optimizer.param_groups[0]["lr"] = compute_rate(step, steps=steps, peak=DECODER_RATE, warm_up=20)
        loss = compute_difference(decoded, torch.cat([asked, true]))
        take_step(optimizer, loss)
        losses.append(loss.item())
        if step % 20 == 19:
            show_loss(bar, losses)
        if step % 50 == 49 or step + 1 == steps:
            save_state(path, trained=trained.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            save_grid(folder / "decoder.png", [*asked, *decoded.detach()[:4]], columns=4)
    vae.requires_grad_(False)
