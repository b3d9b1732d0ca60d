"""Train the demonstration model's text encoders and UNet."""

import argparse
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from demo import shapes
from demo.measure import choose_prompts, draw_prompts, draw_with, load_eager_pipeline
from demo.training.data import (
    FEATURES,
    choose_training_prompt,
    draw_sample,
    number_features,
    read_scene,
    save_grid,
    to_tensor,
)
from demo.training.models import TEXT_WIDTH, Models, build_scheduler, save_models
from demo.training.steps import (
    build_optimizer,
    compute_rate,
    compute_short,
    save_state,
    show_loss,
    show_progress,
    take_step,
)

logger = logging.getLogger(__name__)

MAX_SNR = 5
FOCUS = 5  # extra weight of a thing's latent pixels at first
FOCUSED_SHARE = 0.7  # of the steps; the others weigh all pixels alike
TEXT_RATE = 0.3  # of the UNet's learning rate
SIZE_SHARES = {(128, 128): 0.91, (96, 96): 0.03, (192, 128): 0.03, (128, 192): 0.03}


def train_text(models: Models, folder: Path, *, steps: int, seed: int, device: str) -> None:
    """Teach the text encoders to name what a prompt says. The UNet then follows prompts from its first step."""
    torch.manual_seed(seed)
    path = folder / "text.pt"
    encoders = torch.nn.ModuleList([models.text_encoder, models.text_encoder_2])
    if path.exists():
        encoders.load_state_dict(torch.load(path, map_location=device)["encoders"])
        return
    counts = [len(options) + 1 for options in FEATURES]
    heads = torch.nn.ModuleList([torch.nn.Linear(width, sum(counts)) for width in (TEXT_WIDTH, 2 * TEXT_WIDTH)])
    heads.to(device)
    optimizer = build_optimizer([*encoders.parameters(), *heads.parameters()])
    bar = show_progress(0, steps, "text")
    for step in bar:
        random = Random(f"text {seed} {step}")
        scenes = [shapes.choose_scene(random, share_of_two=0.4) for _ in range(128)]
        prompts = [shapes.describe_scene(scene, random=random, drop=0.1) for scene in scenes]
        ids = models.tokenize(prompts, padding="longest")
        targets = torch.tensor([number_features(scene) for scene in scenes], device=device)
        hidden, pooled = models.encode(ids)
        ends = (ids == models.tokenizer.eos_token_id).int().argmax(1)
        answers = [heads[0](pooled), heads[1](hidden[torch.arange(len(ids), device=device), ends])]
        optimizer.param_groups[0]["lr"] = compute_rate(step, steps=steps, peak=1.5e-3)
        loss = sum(
            functional.cross_entropy(part, targets[:, i])
            for answer in answers
            for i, part in enumerate(answer.split(counts, 1))
        ) / (len(answers) * len(counts))
        take_step(optimizer, loss)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    save_state(path, encoders=encoders.state_dict())


@torch.no_grad()
def encode_scenes(vae: Any, folder: Path, *, count: int, seed: int, device: str) -> list[Any]:
    """Return latents, scenes and micro-conditions of the training images, by image size."""
    path = folder / "latents.pt"
    if not path.exists():
        groups = []
        for (width, height), share in SIZE_SHARES.items():
            latents: list[torch.Tensor] = []
            scenes: list[shapes.Scene] = []
            conditions: list[tuple[int, ...]] = []
            for i in tqdm(range(0, round(count * share), 32), desc=f"latents {width}x{height}", mininterval=10):
                random = Random(f"scenes {seed} {width} {height} {i}")
                samples = [draw_sample(random, width=width, height=height) for _ in range(32)]
                with compute_short(device):
                    posterior = vae.encode(to_tensor([each.image for each in samples]).to(device)).latent_dist
                latents.append(posterior.mean.half().cpu())
                scenes += [each.scene for each in samples]
                conditions += [each.conditions for each in samples]
            groups.append((torch.cat(latents), [astuple(scene) for scene in scenes], torch.tensor(conditions).float()))
        save_state(path, groups=groups)
    saved = torch.load(path)["groups"]
    return [(latents, [read_scene(scene) for scene in scenes], ids) for latents, scenes, ids in saved]


def weigh_pixels(latents: torch.Tensor, *, focus: float) -> torch.Tensor:
    """Return a weight per latent pixel: 1 + focus on things, which the background would outweigh."""
    middle = latents.flatten(2).median(2).values[:, :, None, None]  # the background's, for it is most of the image
    return 1 + focus * ((latents - middle).square().sum(1, keepdim=True) > 1)


def compute_loss(
    models: Models,
    groups: Sequence[Any],
    *,
    random: Random,
    batch: int,
    alphas: torch.Tensor,
    focus: float,
    word: Callable[[shapes.Scene, Random], str | None] = choose_training_prompt,
) -> Any:
    """Return the loss of the predicted velocity on a random batch.

    Args:
        word: puts a scene into words.
    """
    device = str(models.unet.device).partition(":")[0]
    latents, scenes, conditions = random.choices(groups, weights=list(SIZE_SHARES.values())[: len(groups)])[0]
    chosen = [random.randrange(len(scenes)) for _ in range(batch)]
    prompts = [word(scenes[i], random) for i in chosen]
    clean = latents[chosen].float().to(device)
    noise = torch.randn_like(clean)
    # Spread evenly over the steps. One is the first, where only the prompt shows the colours
    steps = ((torch.randperm(batch) + torch.rand(batch)) / batch * len(alphas)).long().clamp(max=len(alphas) - 1)
    steps[0] = len(alphas) - 1
    steps = steps.to(device)
    alpha = alphas[steps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    with compute_short(device):
        hidden, pooled = models.encode(models.tokenize([prompt or "" for prompt in prompts]))
        is_said = torch.tensor([prompt is not None for prompt in prompts], device=device)
        added = {"text_embeds": pooled * is_said[:, None], "time_ids": conditions[chosen].to(device)}
        predicted = models.unet(noisy, steps, hidden * is_said[:, None, None], added_cond_kwargs=added).sample
    # Min-SNR for velocities, without its zero weight for pure noise
    weight = ((1 + MAX_SNR) * (1 - alpha)).clamp(max=1) * weigh_pixels(clean, focus=focus)
    return (weight * (predicted.float() - velocity).square()).mean()


def compute_focus(step: int, *, steps: int) -> float:
    """Return the extra weight of a thing's latent pixels in a step."""
    return FOCUS * max(0.0, 1 - step / (FOCUSED_SHARE * steps))


def train_unet(
    models: Models, groups: Sequence[Any], folder: Path, *, vae: Any, settings: argparse.Namespace
) -> Models:
    """Train the UNet and the text encoders; return their moving average."""
    alphas = build_scheduler().alphas_cumprod.to(settings.device)
    averaged = copy.deepcopy(models)
    parameters, averages = ([p for part in each.trained for p in part.parameters()] for each in (models, averaged))
    text = [p for part in models.trained[:2] for p in part.parameters()]
    optimizer = build_optimizer([{"params": list(models.unet.parameters())}, {"params": text}])
    path, start = folder / "unet.pt", 0
    versions = {"weights": models, "averages": averaged}
    if path.exists():
        state = torch.load(path, map_location=settings.device)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        for name, version in versions.items():
            for part, weights in zip(version.trained, state[name], strict=True):
                part.load_state_dict(weights)
    bar, losses = show_progress(start, settings.unet_steps, "UNet"), []
    for step in bar:
        torch.manual_seed(settings.seed * 1_000_003 + step)
        for group, peak in zip(optimizer.param_groups, (settings.rate, settings.rate * TEXT_RATE), strict=True):
            group["lr"] = compute_rate(step, steps=settings.unet_steps, peak=peak)
        random, focus = Random(f"UNet {settings.seed} {step}"), compute_focus(step, steps=settings.unet_steps)
        loss = compute_loss(models, groups, random=random, batch=settings.batch, alphas=alphas, focus=focus)
        take_step(optimizer, loss)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(0.998, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if step % 20 == 19:
            show_loss(bar, losses)
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.unet_steps:
            logger.info("step %d: mean loss %.4f of the last %d", step + 1, sum(losses) / len(losses), len(losses))
            losses.clear()
            states = {name: [part.state_dict() for part in each.trained] for name, each in versions.items()}
            save_state(path, optimizer=optimizer.state_dict(), step=step + 1, **states)
            save_models(averaged, vae, folder / "snapshot")
            save_snapshot_grid(folder / "snapshot", folder / f"sheet-{step + 1:06}.png", device=settings.device)
    return averaged


def save_snapshot_grid(folder: Path, path: Path, *, device: str) -> None:
    """Draw held-out scenes, each next to the right drawing."""
    prompts = choose_prompts(16)
    drawn = draw_prompts(prompts, draw_with(load_eager_pipeline(folder, device=device), num_inference_steps=10))
    pairs = zip(prompts, drawn, strict=True)
    save_grid(path, [image for prompt, made in pairs for image in (shapes.draw_scene(prompt.scene), made)], columns=8)
