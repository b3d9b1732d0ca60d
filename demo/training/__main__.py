"""Train the demonstration model, a tiny Stable Diffusion XL of coloured shapes, from scratch.

Training has six stages. Each stage keeps its state in the work folder. The same command continues an interrupted run.

1. Train the VAE.
2. Train the text encoders to name what a prompt says.
3. Encode the scenes once.
4. Train the UNet together with the text encoders.
5. Make latents of prompts with the averaged weights.
6. Train the VAE's decoder on these latents.

The result is saved as fp16 safetensors in diffusers' format.

    python -m demo.training                          the whole training
    python -m demo.training --start-from demo/model  more steps of UNet and decoder from saved weights
"""

import argparse
import logging
from pathlib import Path

import torch

from demo.training.decoder import sample_latents, train_decoder
from demo.training.models import build_models, load_models, save_models
from demo.training.unet import encode_scenes, train_text, train_unet
from demo.training.vae import train_vae


def read_training_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo/model"), help="where to save (default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="checkpoints and sheets (default: %(default)s)"
    )
    parser.add_argument(
        "--start-from", type=Path, help="a saved pipeline whose VAE stays and whose other parts learn on"
    )
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--unet-steps", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=4800, help="latents to train the decoder on")
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--scenes", type=int, default=24_000, help="images to train on (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="the UNet's highest learning rate (default: %(default)s)"
    )
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    settings = read_training_options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings.work.mkdir(parents=True, exist_ok=True)
    seed, device = settings.seed, settings.device
    if settings.start_from:
        models, vae = load_models(settings.start_from, device=device)
    else:
        models = build_models(seed=seed, device=device)
        vae = train_vae(settings.work, steps=settings.vae_steps, seed=seed, device=device)
        train_text(models, settings.work, steps=settings.text_steps, seed=seed, device=device)
    vae.requires_grad_(False).to(memory_format=torch.channels_last)
    if settings.unet_steps:
        groups = encode_scenes(vae, settings.work, count=settings.scenes, seed=seed, device=device)
        models = train_unet(models, groups, settings.work, vae=vae, settings=settings)
    if settings.decoder_steps:
        samples = sample_latents(models, vae, settings.work, count=settings.samples, seed=seed)
        train_decoder(vae, samples, settings.work, steps=settings.decoder_steps, seed=seed)
    save_models(models, vae, settings.output)


if __name__ == "__main__":
    main()
