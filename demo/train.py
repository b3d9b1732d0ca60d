"""Train the demonstration model from scratch: a tiny Stable Diffusion XL that draws coloured shapes.

Six stages, each kept in the work folder as it goes, so that the same command continues an interrupted run: the VAE;
the text encoders, which learn to name what a prompt says; the latents of the scenes, encoded once; the UNet together
with the text encoders; latents that the averaged weights make of prompts; the VAE's decoder, on these. The result is
saved as fp16 safetensors in diffusers' format.

    python -m demo.train                          the whole training
    python -m demo.train --start-from demo/model  more steps of UNet and decoder from saved weights
"""

import argparse
import copy
import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from tqdm import tqdm

from demo import shapes
from demo.measure import choose_prompts, draw_prompts, draw_with, load_pipeline
from tools.random_model import make_text_encoder
from tools.random_model import save_pipeline as save_with_published_names

log = logging.getLogger(__name__)

MERGED_WORDS = tuple(dict.fromkeys(shapes.WORDS))
TEXT_WIDTH = 128
TEXT = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_hidden_layers": 3,  # SDXL reads the hidden states before the last layer
    "num_attention_heads": 4,
    "projection_dim": TEXT_WIDTH,
}
TIME_EMBEDDING = 32
UNET = {
    "block_out_channels": (64, 192),
    "layers_per_block": 1,
    "sample_size": shapes.PICTURE_SIZE // 8,
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 6),
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True,
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_EMBEDDING,
    "projection_class_embeddings_input_dim": 6 * TIME_EMBEDDING + TEXT_WIDTH,
}
VAE = {
    "block_out_channels": (16, 32, 64, 128),
    "norm_num_groups": 2,  # of a flat picture, two channels of a group would keep no more than their order
    "layers_per_block": 1,
    "sample_size": shapes.PICTURE_SIZE,
    "force_upcast": False,
    "scaling_factor": 1.0,  # normalise_latents brings them to unit variance
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    # Without a last step of pure noise, sampling starts from a mean colour that training never showed
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
CROP_SIZE = 64  # of the VAE's first pictures
MAX_SNR = 5
FOCUS = 5  # how much more a latent pixel of a thing weighs at first than one of the background
FOCUSED_SHARE = 0.7  # of the steps; the last ones weigh all pixels alike
LATENT_NOISE = 0.15  # at most, before the latents are brought to unit variance
DECODER_RATE = 5e-4
FARTHEST_GROUND = 50  # of 255 levels, in any channel
LEAST_OVERLAP = 0.5  # of a thing with what was asked for; less is something else
TEXT_RATE = 0.3  # of the UNet's learning rate
BLURRED_SHARE = 0.2
CROPPED_SHARE = 0.1
HARD_SHARE = 0.2  # of the scenes have a small star, which is learnt last
PICTURE_SHARES = {(128, 128): 0.91, (96, 96): 0.03, (192, 128): 0.03, (128, 192): 0.03}
NOTHING = "nothing"
_COLOURS, _SIZES = tuple(shapes.COLOURS), tuple(shapes.SIZES)
FEATURES = (_COLOURS, *(_COLOURS, shapes.SHAPES, _SIZES) * 2, tuple(shapes.POSITIONS))


def make_tokenizer() -> Any:
    """Return a CLIP tokenizer that reads any bytes, and each word of the shapes' world as one token."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [[*word[:-1], word[-1] + "</w>"] for word in MERGED_WORDS]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in words for pair in zip(word, word[1:], strict=False)):
        first, second = merge = max(pairs, key=lambda pair: pairs[pair])
        merges.append(merge)
        for word in words:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1 : i + 1]) == [first, second]:
                    word[i - 1 : i + 1] = [first + second]
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *dict.fromkeys(first + second for first, second in merges),
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=77)


def make_vae() -> Any:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, **blocks, **VAE)


def choose_scene(random: Random) -> shapes.Scene:
    """Return a scene to learn from; the hard ones come more often than by chance."""
    is_hard = random.random() < HARD_SHARE
    while True:
        scene = shapes.choose_scene(random)
        if not is_hard or any((thing.shape, thing.size) == ("star", "small") for thing in scene.things):
            return scene


def blur_picture(picture: Image.Image, random: Random) -> tuple[Image.Image, tuple[int, int]]:
    """Return a picture as if enlarged from a smaller original, and the height and width of that.

    The VAE sharpens it again; what is lost are corners, and small things. That shows in the smallest originals only, so
    these come as often as the larger ones.
    """
    scale = math.exp(random.uniform(math.log(0.06), math.log(0.5)))
    original = (round(picture.height * scale), round(picture.width * scale))
    small = picture.resize(original[::-1], Image.Resampling.BOX)
    return small.resize(picture.size, Image.Resampling.BICUBIC), original


def make_picture(random: Random) -> Image.Image:
    return shapes.draw_scene(choose_scene(random), random=random)


def make_crop(random: Random) -> Image.Image:
    """Draw a scene and cut out one of its things, so that small ones are not lost in the background."""
    scene = choose_scene(random)
    moves = [shapes.choose_move(random) for _ in scene.things]
    thing, move = random.choice(list(zip(scene.things, moves, strict=True)))
    middle, _ = shapes.place_thing(thing, move, width=shapes.PICTURE_SIZE, height=shapes.PICTURE_SIZE)
    last = shapes.PICTURE_SIZE - CROP_SIZE
    left, top = (min(max(round(at + random.uniform(-16, 16)) - CROP_SIZE // 2, 0), last) for at in middle)
    return shapes.draw_scene(scene, moves=moves).crop((left, top, left + CROP_SIZE, top + CROP_SIZE))


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return pictures as one tensor from -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def compute_rate(step: int, *, steps: int, peak: float, warm_up: int = 100) -> float:
    """Return the learning rate of a step: a linear rise, then half a cosine down."""
    return peak * min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2)


def save_state(path: Path, **state: Any) -> None:
    """Write a checkpoint that is either whole or absent."""
    partial = path.with_suffix(".incomplete")
    torch.save(state, partial)
    partial.replace(path)


def compute_short(device: str) -> Any:
    """Return a context that computes in bfloat16, unless the CPU would only imitate it."""
    is_slow = device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=not is_slow)


def show_progress(start: int, steps: int, name: str) -> Any:
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10, dynamic_ncols=True)


def compare_pictures(decoded: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Return how far decoded pictures are from the true ones."""
    distance = decoded - pictures
    # Edges are a small part of a picture, yet they alone tell a star from a circle
    edges = functional.max_pool2d(pictures, 5, 1, 2) + functional.max_pool2d(-pictures, 5, 1, 2) > 0.1
    weight = 1 + 4 * edges.any(1, keepdim=True)
    return (weight * (distance.abs() + distance.square())).mean()


def compute_misplacement(latents: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Return how far three latent channels are from the mean colours of their blocks, and the fourth out of its range.

    Left to itself, a VAE lays the few colours on one line, and what lies between two of them is a third.
    """
    colours = (latents[:, :3] - functional.avg_pool2d(pictures, 8)).square().mean()
    return colours + (latents[:, 3].abs() - 1).clamp(min=0).square().mean()


def train_vae(folder: Path, *, steps: int, seed: int, device: str) -> Any:
    """Train the VAE on crops, then on whole pictures, and bring its latents to unit variance."""
    torch.manual_seed(seed)
    vae, path, start = make_vae().to(device, memory_format=torch.channels_last), folder / "vae.pt", 0
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
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
        drawn = [make_picture(random) if is_whole else make_crop(random) for _ in range(6 if is_whole else 16)]
        pictures = to_tensor(drawn).to(device)
        optimizer.param_groups[0]["lr"] = compute_rate(step, steps=steps, peak=2e-3)
        with compute_short(device):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.sample()
            # The UNet's latents are a little wrong; the decoder learns to see past it
            noise = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, device=device) * torch.randn_like(latents)
            decoded = vae.decode(latents + noise).sample.float()
        loss = compare_pictures(decoded, pictures) + compute_misplacement(posterior.mean.float(), pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", std=f"{posterior.mean.std().item():.2f}")
        if step % 100 == 99:
            save_state(path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, is_done=False)
            save_sheet(folder / "vae.png", [*pictures[:6], *decoded.detach()[:6]], columns=6)
    normalise_latents(vae, seed=seed)
    save_state(path, vae=vae.state_dict(), step=steps, is_done=True)  # no optimizer: nothing goes on from here
    return vae


@torch.no_grad()
def normalise_latents(vae: Any, *, seed: int) -> None:
    """Fold the latents' mean and spread into the convolutions next to them: zero mean, unit variance per channel.

    A mean of latents in the configuration is applied by some of SDXL's pipelines only, so none is needed.
    """
    random = Random(f"latents {seed}")
    pictures = to_tensor([make_picture(random) for _ in range(256)]).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(32)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()  # the log of the variance


def to_image(picture: torch.Tensor) -> Image.Image:
    """Return a tensor from -1 to 1 as a picture."""
    return Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy())


def save_sheet(path: Path, pictures: Sequence[Any], *, columns: int) -> None:
    """Write pictures side by side; tensors from -1 to 1 or images."""
    images = [picture if isinstance(picture, Image.Image) else to_image(picture) for picture in pictures]
    width, height = max(each.width for each in images) + 4, max(each.height for each in images) + 4
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), (128, 128, 128))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width + 2, i // columns * height + 2))
    sheet.save(path)


@dataclass(frozen=True)
class Models:
    """The parts that the last stage trains, and what they are trained with."""

    tokenizer: Any
    text_encoder: Any
    text_encoder_2: Any
    unet: Any

    @property
    def trained(self) -> tuple[Any, ...]:
        return (self.text_encoder, self.text_encoder_2, self.unet)

    def tokenize(self, prompts: Sequence[str], *, padding: str = "max_length") -> torch.Tensor:
        ids = self.tokenizer(
            list(prompts), padding=padding, truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        return ids.to(self.unet.device)

    def encode(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states of both encoders and the second one's pooled projection, as SDXL takes them."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def make_models(*, seed: int, device: str) -> Models:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer)}
    first, second = (make_text_encoder(text, tokenizer, projects).to(device) for projects in (False, True))
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, **UNET).to(device)
    return Models(tokenizer, first, second, unet)


def list_features(scene: shapes.Scene) -> list[int]:
    """Return what a scene shows as class numbers, one for each of FEATURES."""
    things = [*scene.things, None][:2]
    features = [scene.background]
    for thing in things:
        features += [thing.colour, thing.shape, thing.size] if thing else [NOTHING] * 3
    features.append(scene.things[0].position)
    return [(*options, NOTHING).index(feature) for options, feature in zip(FEATURES, features, strict=True)]


def train_text(models: Models, folder: Path, *, steps: int, seed: int, device: str) -> None:
    """Let the text encoders name what a prompt says, so that the UNet has something to go by from its first step."""
    torch.manual_seed(seed)
    path = folder / "text.pt"
    encoders = torch.nn.ModuleList([models.text_encoder, models.text_encoder_2])
    if path.exists():
        encoders.load_state_dict(torch.load(path, map_location=device)["encoders"])
        return
    counts = [len(options) + 1 for options in FEATURES]
    heads = torch.nn.ModuleList([torch.nn.Linear(width, sum(counts)) for width in (TEXT_WIDTH, 2 * TEXT_WIDTH)]).to(
        device
    )
    parameters = [*encoders.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    bar = show_progress(0, steps, "text")
    for step in bar:
        random = Random(f"text {seed} {step}")
        scenes = [shapes.choose_scene(random, share_of_two=0.4) for _ in range(128)]
        ids = models.tokenize(
            [shapes.describe_scene(scene, random=random, drop=0.1) for scene in scenes], padding="longest"
        )
        targets = torch.tensor([list_features(scene) for scene in scenes], device=device)
        hidden, pooled = models.encode(ids)
        ends = (ids == models.tokenizer.eos_token_id).int().argmax(1)
        answers = [heads[0](pooled), heads[1](hidden[torch.arange(len(ids), device=device), ends])]
        optimizer.param_groups[0]["lr"] = compute_rate(step, steps=steps, peak=1.5e-3)
        loss = sum(
            functional.cross_entropy(part, targets[:, i])
            for answer in answers
            for i, part in enumerate(answer.split(counts, 1))
        ) / (len(answers) * len(counts))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    save_state(path, encoders=encoders.state_dict())


def to_scene(fields: tuple[Any, ...]) -> shapes.Scene:
    """Return the scene that astuple took apart; torch.load reads tuples and no classes."""
    background, things = fields
    return shapes.Scene(background, tuple(shapes.Thing(*each) for each in things))


@dataclass(frozen=True)
class Sample:
    """A picture with SDXL's micro-conditioning.

    Args:
        conditions: original height and width, crop's top and left, target height and width, in pixels.
    """

    scene: shapes.Scene
    picture: Image.Image
    conditions: tuple[int, ...]


def make_sample(random: Random, *, width: int, height: int) -> Sample:
    """Draw a scene; some of a smaller original, which is blurred, and some cropped."""
    scene = choose_scene(random)
    picture = shapes.draw_scene(scene, width=width, height=height, random=random)
    original, top, left = (height, width), 0, 0
    kind = random.random()
    if kind < BLURRED_SHARE:
        picture, original = blur_picture(picture, random)
    elif kind < BLURRED_SHARE + CROPPED_SHARE:
        top, left = random.choice(
            ((random.randrange(65), 0), (0, random.randrange(65)), (random.randrange(65), random.randrange(65)))
        )
        cropped = Image.new("RGB", picture.size, shapes.COLOURS[scene.background])
        cropped.paste(picture, (-left, -top))
        picture = cropped
    return Sample(scene, picture, (*original, top, left, height, width))


@torch.no_grad()
def encode_scenes(vae: Any, folder: Path, *, count: int, seed: int, device: str) -> list[Any]:
    """Return for each picture size the latents, the scenes and the micro-conditions of the training's pictures."""
    path = folder / "latents.pt"
    if not path.exists():
        groups = []
        for (width, height), share in PICTURE_SHARES.items():
            latents: list[torch.Tensor] = []
            scenes: list[shapes.Scene] = []
            conditions: list[tuple[int, ...]] = []
            for i in tqdm(range(0, round(count * share), 32), desc=f"latents {width}x{height}", mininterval=10):
                random = Random(f"scenes {seed} {width} {height} {i}")
                samples = [make_sample(random, width=width, height=height) for _ in range(32)]
                with compute_short(device):
                    posterior = vae.encode(to_tensor([each.picture for each in samples]).to(device)).latent_dist
                latents.append(posterior.mean.half().cpu())
                scenes += [each.scene for each in samples]
                conditions += [each.conditions for each in samples]
            groups.append((torch.cat(latents), [astuple(scene) for scene in scenes], torch.tensor(conditions).float()))
        save_state(path, groups=groups)
    return [
        (latents, [to_scene(scene) for scene in scenes], ids) for latents, scenes, ids in torch.load(path)["groups"]
    ]


def choose_prompt(scene: shapes.Scene, random: Random) -> str | None:
    """Return a prompt for training: mostly whole, some short as negative prompts are, some empty, and some none."""
    kind = random.random()
    if kind < 0.1:
        return None  # a pipeline without a negative prompt takes zeros
    if kind < 0.12:
        return ""
    if kind < 0.18:
        return shapes.describe_part(scene, random=random)
    return shapes.describe_scene(scene, random=random, drop=0.1)


def make_scheduler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**SCHEDULER)


def weigh_pixels(latents: torch.Tensor, *, focus: float) -> torch.Tensor:
    """Return a weight for each latent pixel: 1 + focus where a thing is, which else is lost in the background."""
    middle = latents.flatten(2).median(2).values[:, :, None, None]  # the background's, for it is most of the picture
    return 1 + focus * ((latents - middle).square().sum(1, keepdim=True) > 1)


def compute_loss(
    models: Models, groups: Sequence[Any], *, random: Random, batch: int, alphas: torch.Tensor, focus: float
) -> Any:
    """Return the loss of the predicted velocity on a random batch."""
    device = str(models.unet.device).partition(":")[0]
    latents, scenes, conditions = random.choices(groups, weights=list(PICTURE_SHARES.values()))[0]
    chosen = [random.randrange(len(scenes)) for _ in range(batch)]
    prompts = [choose_prompt(scenes[i], random) for i in chosen]
    clean = latents[chosen].float().to(device)
    noise = torch.randn_like(clean)
    # Spread evenly over the steps, and one at the very start, where nothing but the prompt tells the colours
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
    # Min-SNR's idea for velocities, less its zero weight where the noise is all there is
    weight = ((1 + MAX_SNR) * (1 - alpha)).clamp(max=1) * weigh_pixels(clean, focus=focus)
    return (weight * (predicted.float() - velocity).square()).mean()


def train_unet(
    models: Models, groups: Sequence[Any], folder: Path, *, vae: Any, settings: argparse.Namespace
) -> Models:
    """Train the UNet and the text encoders; return their moving average."""
    alphas = make_scheduler().alphas_cumprod.to(settings.device)
    averaged = copy.deepcopy(models)
    parameters, averages = ([p for part in each.trained for p in part.parameters()] for each in (models, averaged))
    of_text = {id(p) for part in models.trained[:2] for p in part.parameters()}
    sides = [[p for p in parameters if (id(p) in of_text) == is_text] for is_text in (False, True)]
    optimizer = torch.optim.AdamW(
        [{"params": side} for side in sides], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    path, start = folder / "unet.pt", 0
    if path.exists():
        state = torch.load(path, map_location=settings.device)
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        for each, name in ((models, "weights"), (averaged, "averages")):
            for part, weights in zip(each.trained, state[name], strict=True):
                part.load_state_dict(weights)
    bar, losses = show_progress(start, settings.unet_steps, "UNet"), []
    for step in bar:
        torch.manual_seed(settings.seed * 1_000_003 + step)
        for side, peak in zip(optimizer.param_groups, (settings.rate, settings.rate * TEXT_RATE), strict=True):
            side["lr"] = compute_rate(step, steps=settings.unet_steps, peak=peak)
        random = Random(f"UNet {settings.seed} {step}")
        focus = FOCUS * max(0.0, 1 - step / (FOCUSED_SHARE * settings.unet_steps))
        loss = compute_loss(models, groups, random=random, batch=settings.batch, alphas=alphas, focus=focus)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(0.998, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if step % 20 == 19:
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}")
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.unet_steps:
            log.info("step %d: mean loss %.4f of the last %d", step + 1, sum(losses) / len(losses), len(losses))
            losses.clear()
            states = {
                name: [part.state_dict() for part in each.trained]
                for each, name in ((models, "weights"), (averaged, "averages"))
            }
            save_state(path, optimizer=optimizer.state_dict(), step=step + 1, **states)
            save_pipeline(averaged, vae, folder / "snapshot")
            save_progress(folder / "snapshot", folder / f"sheet-{step + 1:06}.png", device=settings.device)
    return averaged


def make_pipeline(models: Models, vae: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    names = ("text_encoder", "text_encoder_2", "unet")
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        tokenizer=models.tokenizer,
        tokenizer_2=models.tokenizer,
        scheduler=make_scheduler(),
        **dict(zip(names, models.trained, strict=True)),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(models: Models, vae: Any, folder: Path) -> None:
    """Write the pipeline in diffusers' format, with fp16 weights."""
    for path in folder.glob("*/*"):  # a model card next to them stays
        path.unlink()
    contiguous = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)  # as safetensors wants it
    pipeline = make_pipeline(copy.deepcopy(models), contiguous).to(torch.float16)
    save_with_published_names(pipeline, folder)


def find_move(thing: shapes.Thing, mask: Any) -> tuple[shapes.Move, float]:
    """Return the move that lays a thing best over a mask, and the overlap from 0 to 1."""
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


def find_moves(scene: shapes.Scene, picture: Image.Image) -> tuple[list[shapes.Move], float]:
    """Return the moves that make the drawing of a scene most like a picture, and the worst overlap of its things."""
    ground = np.array(shapes.COLOURS[scene.background])
    mask = np.abs(np.asarray(picture).astype(int) - ground).max(-1) > FARTHEST_GROUND
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
    """Return latents that the pipeline makes of prompts, each with its scene and how to draw it most alike.

    Those that show something else than their prompt says are left out.
    """
    pipeline, path = make_pipeline(models, vae), folder / "samples.pt"
    parts: list[Any] = torch.load(path)["parts"] if path.exists() else []
    for i in show_progress(len(parts), -(-count // 24), "samples"):
        random = Random(f"samples {seed} {i}")
        scenes = [choose_scene(random) for _ in range(24)]
        latents = pipeline(
            [shapes.describe_scene(scene, random=random) for scene in scenes],
            num_inference_steps=random.randint(4, 7),
            guidance_scale=random.uniform(1, 2),
            generator=torch.Generator().manual_seed(random.randrange(2**32)),
            output_type="latent",
        ).images
        part = []
        for scene, latent, picture in zip(scenes, latents, vae.decode(latents).sample, strict=True):
            moves, overlap = find_moves(scene, to_image(picture))
            if overlap > LEAST_OVERLAP:
                part.append((latent.half().cpu(), astuple(scene), moves))
        parts.append(part)
        save_state(path, parts=parts)
    return [(latent, to_scene(scene), moves) for part in parts for latent, scene, moves in part]


def train_decoder(vae: Any, samples: Sequence[Any], folder: Path, *, steps: int, seed: int) -> None:
    """Train the decoder to draw what was asked for from the latents that the UNet makes of it.

    They are a little wrong, and the latents of true pictures never showed it how. The encoder stays, and with it what
    latents mean.
    """
    torch.manual_seed(seed)
    path, start = folder / "decoder.pt", 0
    trained = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    if path.exists():
        state = torch.load(path, map_location=vae.device)
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    bar, losses = show_progress(start, steps, "decoder"), []
    for step in bar:
        random = Random(f"decoder {seed} {step}")
        true = to_tensor(
            [make_sample(random, width=shapes.PICTURE_SIZE, height=shapes.PICTURE_SIZE).picture for _ in range(2)]
        ).to(vae.device)
        chosen = random.sample(samples, 4)
        sampled = torch.stack([latent.float() for latent, _, _ in chosen]).to(vae.device)
        asked = to_tensor([shapes.draw_scene(scene, moves=moves) for _, scene, moves in chosen]).to(vae.device)
        with compute_short(vae.device.type):
            with torch.no_grad():
                encoded = vae.encode(true).latent_dist.mean
            decoded = vae.decode(torch.cat([sampled, encoded.float()])).sample.float()
        optimizer.param_groups[0]["lr"] = compute_rate(step, steps=steps, peak=DECODER_RATE, warm_up=20)
        loss = compare_pictures(decoded, torch.cat([asked, true]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
        if step % 50 == 49 or step + 1 == steps:
            save_state(path, trained=trained.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            save_sheet(folder / "decoder.png", [*asked, *decoded.detach()[:4]], columns=4)
    vae.requires_grad_(False)


def load_models(folder: Path, *, device: str) -> tuple[Models, Any]:
    """Return the trained parts and the VAE of a saved pipeline."""
    pipeline = load_pipeline(folder, device=device)
    models = Models(pipeline.tokenizer, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet)
    return models, pipeline.vae


def save_progress(folder: Path, path: Path, *, device: str) -> None:
    """Draw scenes that were held out of training, as a sheet, beside the drawings to compare with."""
    prompts = choose_prompts(16)
    drawn = draw_prompts(prompts, draw_with(load_pipeline(folder, device=device), num_inference_steps=10))
    pairs = [
        image
        for prompt, image_drawn in zip(prompts, drawn, strict=True)
        for image in (shapes.draw_scene(prompt.scene), image_drawn)
    ]
    save_sheet(path, pairs, columns=8)


def parse_arguments() -> argparse.Namespace:
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
    parser.add_argument("--scenes", type=int, default=24_000, help="pictures to train on (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="the UNet's highest learning rate (default: %(default)s)"
    )
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    settings = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings.work.mkdir(parents=True, exist_ok=True)
    seed, device = settings.seed, settings.device
    if settings.start_from:
        models, vae = load_models(settings.start_from, device=device)
    else:
        models = make_models(seed=seed, device=device)
        vae = train_vae(settings.work, steps=settings.vae_steps, seed=seed, device=device)
        train_text(models, settings.work, steps=settings.text_steps, seed=seed, device=device)
    vae.requires_grad_(False).to(memory_format=torch.channels_last)
    if settings.unet_steps:
        groups = encode_scenes(vae, settings.work, count=settings.scenes, seed=seed, device=device)
        models = train_unet(models, groups, settings.work, vae=vae, settings=settings)
    if settings.decoder_steps:
        samples = sample_latents(models, vae, settings.work, count=settings.samples, seed=seed)
        train_decoder(vae, samples, settings.work, steps=settings.decoder_steps, seed=seed)
    save_pipeline(models, vae, settings.output)


if __name__ == "__main__":
    main()
