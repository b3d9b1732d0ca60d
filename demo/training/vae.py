"""Train the demonstration model's VAE."""

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional

from demo.training.data import draw_crop, draw_training_image, save_grid, to_tensor
from demo.training.models import build_vae
from demo.training.steps import build_optimizer, compute_rate, compute_short, save_state, show_progress, take_step

LATENT_NOISE = 0.15  # at most, before the latents are brought to unit variance
VAE_WEIGHT_DECAY = 1e-3


def compute_difference(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return how far decoded images are from the true ones."""
    distance = decoded - images
    # Edges are a small part of an image. They alone distinguish a star from a circle
    edges = functional.max_pool2d(images, 5, 1, 2) + functional.max_pool2d(-images, 5, 1, 2) > 0.1
    weight = 1 + 4 * edges.any(1, keepdim=True)
    return (weight * (distance.abs() + distance.square())).mean()


def compute_misplacement(latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return how far three latent channels are from their blocks' mean colours, and the fourth out of range.

    Otherwise a VAE lays the few colours on one line. A latent between two colours is then a third.
    """
    colours = (latents[:, :3] - functional.avg_pool2d(images, 8)).square().mean()
    return colours + (latents[:, 3].abs() - 1).clamp(min=0).square().mean()


def train_vae(folder: Path, *, steps: int, seed: int, device: str) -> Any:
    """Train the VAE on crops, then on whole images. Normalise its latents."""
    torch.manual_seed(seed)
    vae, path, start = build_vae().to(device, memory_format=torch.channels_last), folder / "vae.pt", 0
    optimizer = build_optimizer(vae.parameters(), weight_decay=VAE_WEIGHT_DECAY)
    if path.exists():
        state = torch.load(path, map_location=device)
        vae.load_state_dict(state["vae"])
        start = state["step"]
        if state["is_done"]:
            return vae
        optimizer.load_state_dict(state["optimizer"])
    bar = show_progress(start, steps, "VAE")
    for step in bar:
        random = Random(f"vae {seed} {step}")
        is_whole = step > 0.8 * steps
        drawn = [draw_training_image(random) if is_whole else draw_crop(random) for _ in range(6 if is_whole else 16)]
        images = to_tensor(drawn).to(device)
        optimizer.param_groups[0]["lr"] = compute_rate(step, steps=steps, peak=2e-3)
        with compute_short(device):
            posterior = vae.encode(images).latent_dist
            latents = posterior.sample()
            # The UNet's latents are a little wrong. The decoder learns to ignore it
            noise = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=device) * torch.randn_like(latents)
            decoded = vae.decode(latents + noise).sample.float()
        loss = compute_difference(decoded, images) + compute_misplacement(posterior.mean.float(), images)
        take_step(optimizer, loss)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", std=f"{posterior.mean.std().item():.2f}")
        if step % 100 == 99:
            save_state(path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, is_done=False)
            save_grid(folder / "vae.png", [*images[:6], *decoded.detach()[:6]], columns=6)
    normalise_latents(vae, seed=seed)
    save_state(path, vae=vae.state_dict(), step=steps, is_done=True)  # no optimizer: nothing goes on from here
    return vae


@torch.no_grad()
def normalise_latents(vae: Any, *, seed: int) -> None:
    """Give each latent channel zero mean and unit variance through the convolutions next to it.

    Only some of SDXL's pipelines apply a configured mean of latents.
    """
    random = Random(f"latents {seed}")
    images = to_tensor([draw_training_image(random) for _ in range(256)]).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()  # the log of the variance
