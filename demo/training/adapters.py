"""Train an adapter (LoRA) of the demonstration model. The model itself does not change.

    python -m demo.training.adapters inverted     inverted colours, from drawings whose prompts name them
    python -m demo.training.adapters few-steps    four UNet calls without guidance, one after another

A prompt may mean many drawings. The model's own training pairs any of them with any noise. So from noise alone
the model predicts their mean. It needs many steps from there to one drawing. The training of few-steps pairs each noise
with the nearest drawing. So the first call can know which drawing is meant.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from demo import shapes
from demo.training.data import FEATURES, number_features, read_scene, to_tensor
from demo.training.low_rank import add_low_rank, load_low_rank, save_low_rank
from demo.training.models import Models, build_scheduler, load_models
from demo.training.steps import (
    build_optimizer,
    compute_rate,
    compute_short,
    save_state,
    show_loss,
    show_progress,
    take_step,
)
from demo.training.unet import compute_focus, compute_loss, encode_scenes, weigh_pixels

TIMESTEPS = (999, 749, 499, 249)  # of a trailing scheduler with four steps
CALL_WEIGHTS = (2, 1, 1, 1)  # the first call decides most
DRAWINGS = 4  # of each scene, moved differently
PAIR_COUNT = 1500  # scenes with two things, of two drawings each
VAGUE_SHARE = 0.4  # of prompts that leave something unsaid
UNSAID = {"background": 0.15, "size": 0.1, "position": 0.85}  # how often each is unsaid
FEW_FOCUS = 2
SMOOTH = 0.1  # above it the loss is absolute: its best is one of two drawings, not their mean

Compute = Callable[[int], torch.Tensor]


def fit(parameters: Iterable[torch.nn.Parameter], compute: Compute, *, steps: int, rate: float, name: str) -> None:
    """Train some parameters.

    Args:
        compute: returns the loss of a step.
    """
    optimizer = build_optimizer(parameters)
    bar, losses = show_progress(0, steps, name), []
    for step in bar:
        optimizer.param_groups[0]["lr"] = compute_rate(step, steps=steps, peak=rate, warm_up=20)
        loss = compute(step)
        take_step(optimizer, loss)
        losses.append(loss.item())
        if step % 20 == 19:
            show_loss(bar, losses)


def prepare_inverted(models: Models, vae: Any, options: argparse.Namespace) -> Compute:
    """Return the model's own loss on drawings whose prompts name the inverted colours."""
    groups = [
        keep_training((latents, [shapes.invert_scene(scene) for scene in scenes], conditions))
        for latents, scenes, conditions in encode_scenes(
            vae, options.work, count=options.scenes, seed=options.seed, device=options.device
        )
    ]
    alphas = build_scheduler().alphas_cumprod.to(options.device)

    def compute(step: int) -> torch.Tensor:
        torch.manual_seed(step)
        random = Random(f"inverted {options.seed} {step}")
        focus = compute_focus(step, steps=options.steps)
        return compute_loss(models, groups, random=random, batch=options.batch, alphas=alphas, focus=focus)

    return compute


def keep_training(group: Any) -> Any:
    """Return the latents, scenes and conditions that no held-out prompt asks for."""
    latents, scenes, conditions = group
    kept = [
        i
        for i, scene in enumerate(scenes)
        if not any(shapes.is_held_out(scene.background, thing) for thing in scene.things)
    ]
    return latents[kept], [scenes[i] for i in kept], conditions[kept]


@dataclass(frozen=True)
class Pool:
    """The latents of drawings, and what each shows."""

    latents: torch.Tensor
    scenes: list[shapes.Scene]
    features: torch.Tensor

    def find_nearest(self, scene: shapes.Scene, noise: torch.Tensor) -> torch.Tensor:
        """Return a scene's latents that are most like a noise. An empty feature accepts any."""
        asked = list_asked(scene).to(self.features.device)
        fitting = self.latents[((self.features == asked) | (asked < 0)).all(1)]
        directions = torch.nn.functional.normalize(fitting.flatten(1), dim=1)
        return fitting[(directions @ noise.flatten()).argmax()]


def list_asked(scene: shapes.Scene) -> torch.Tensor:
    """Return a scene's class number for each of FEATURES; -1: left empty."""
    filled = shapes.Scene(
        scene.background or FEATURES[0][0],
        tuple(
            replace(thing, size=thing.size or FEATURES[3][0], position=thing.position or FEATURES[7][0])
            for thing in scene.things
        ),
    )
    features = torch.tensor(number_features(filled))
    first = scene.things[0]
    for index, feature in ((0, scene.background), (3, first.size), (7, first.position)):
        if not feature:
            features[index] = -1
    return features


@torch.no_grad()
def make_pool(vae: Any, folder: Path, *, seed: int, device: str) -> Pool:
    """Draw and encode random scenes of two things, and every scene of one, without the held-out ones."""
    path = folder / "pool.pt"
    if not path.exists():
        random = Random(f"pool {seed}")
        singles = [
            scene for scene in shapes.iterate_scenes() if not shapes.is_held_out(scene.background, scene.things[0])
        ]
        scenes = [scene for scene in singles for _ in range(DRAWINGS)]
        scenes += [scene for _ in range(PAIR_COUNT) for scene in [shapes.choose_scene(random, share_of_two=1)] * 2]
        latents = []
        for i in show_progress(0, -(-len(scenes) // 32), "drawings"):
            drawn = [shapes.draw_scene(scene, random=random) for scene in scenes[32 * i : 32 * i + 32]]
            with compute_short(device):
                latents.append(vae.encode(to_tensor(drawn).to(device)).latent_dist.mean.half().cpu())
        save_state(path, latents=torch.cat(latents), scenes=[astuple(scene) for scene in scenes])
    state = torch.load(path, map_location=device)
    scenes = [read_scene(scene) for scene in state["scenes"]]
    features = torch.tensor([number_features(scene) for scene in scenes], device=device)
    return Pool(state["latents"].float(), scenes, features)


def leave_unsaid(scene: shapes.Scene, random: Random) -> shapes.Scene:
    """Leave some features of a scene empty. A scene of two things stays, for its pool has too few others."""
    if len(scene.things) == 2 or random.random() > VAGUE_SHARE:
        return scene
    open_ones = {name for name, share in UNSAID.items() if random.random() < share}
    thing = replace(scene.things[0], **{name: "" for name in open_ones - {"background"}})
    return shapes.Scene("" if "background" in open_ones else scene.background, (thing,))


def prepare_few_steps(models: Models, vae: Any, options: argparse.Namespace) -> Compute:
    """Return the loss of one of the four calls. It follows the earlier calls, as with DDIM and Euler."""
    pool = make_pool(vae, options.work, seed=options.seed, device=options.device)
    small_stars = [
        i
        for i, scene in enumerate(pool.scenes)
        if any((thing.shape, thing.size) == ("star", "small") for thing in scene.things)
    ]
    alphas = build_scheduler().alphas_cumprod.to(options.device)
    size = float(shapes.IMAGE_SIZE)
    time_ids = torch.tensor([[size, size, 0, 0, size, size]] * options.batch, device=options.device)

    def compute(step: int) -> torch.Tensor:
        torch.manual_seed(step)
        random = Random(f"few {options.seed} {step}")
        chosen = [
            random.choice(small_stars) if random.random() < 0.2 else random.randrange(len(pool.scenes))
            for _ in range(options.batch)
        ]
        said = [leave_unsaid(pool.scenes[i], random) for i in chosen]
        z = torch.randn(options.batch, *pool.latents.shape[1:], device=options.device)
        asked = torch.stack([pool.find_nearest(scene, noise) for scene, noise in zip(said, z, strict=True)])
        prompts = [shapes.describe_scene(scene, random=random) for scene in said]
        with torch.no_grad(), compute_short(options.device):
            hidden, pooled = models.encode(models.tokenize(prompts))
        added = {"text_embeds": pooled, "time_ids": time_ids}
        last = random.choices(range(len(TIMESTEPS)), weights=CALL_WEIGHTS)[0]
        for i, timestep in enumerate(TIMESTEPS[: last + 1]):
            signal, spread = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
            with torch.set_grad_enabled(i == last), compute_short(options.device):
                velocity = models.unet(z, timestep, hidden, added_cond_kwargs=added).sample.float()
            drawn, noise = signal * z - spread * velocity, spread * z + signal * velocity
            if i < last:
                alpha = alphas[TIMESTEPS[i + 1]]
                z = alpha.sqrt() * drawn + (1 - alpha).sqrt() * noise
        distance = ((drawn - asked).square() + SMOOTH**2).sqrt() - SMOOTH
        return (weigh_pixels(asked, focus=FEW_FOCUS) * distance).mean()

    return compute


@dataclass(frozen=True)
class AdapterPlan:
    """How an adapter is trained unless the command line says otherwise."""

    prepare: Callable[[Models, Any, argparse.Namespace], Compute]
    rank: int
    steps: int


ADAPTER_PLANS = {
    "inverted": AdapterPlan(prepare_inverted, rank=8, steps=400),
    "few-steps": AdapterPlan(prepare_few_steps, rank=16, steps=1100),
}


def read_adapter_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ADAPTER_PLANS)
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a file (default: demo/adapters/NAME/NAME.safetensors)")
    parser.add_argument("--work", type=Path, help="latents (default: build/NAME)")
    parser.add_argument("--start-from", type=Path, help="an adapter that learns on")
    parser.add_argument(
        "--rank", type=int, help=f"(default: {', '.join(str(each.rank) for each in ADAPTER_PLANS.values())})"
    )
    parser.add_argument(
        "--steps", type=int, help=f"(default: {', '.join(str(each.steps) for each in ADAPTER_PLANS.values())})"
    )
    parser.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=5000, help="drawings of inverted (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    plan, name = ADAPTER_PLANS[options.name], options.name
    options.output = options.output or Path(f"demo/adapters/{name}/{name}.safetensors")
    options.work = options.work or Path(f"build/{name}")
    options.rank, options.steps = options.rank or plan.rank, options.steps or plan.steps
    return options


def main() -> None:
    options = read_adapter_options()
    options.work.mkdir(parents=True, exist_ok=True)
    models, vae = load_models(options.model, device=options.device)
    for part in (*models.trained, vae):
        part.requires_grad_(False)
    compute = ADAPTER_PLANS[options.name].prepare(models, vae, options)
    torch.manual_seed(options.seed)
    changes = add_low_rank(models.unet, options.rank)
    if options.start_from:
        load_low_rank(changes, options.start_from)
    parameters = [each for change in changes.values() for each in change.parameters()]
    fit(parameters, compute, steps=options.steps, rate=options.rate, name=options.name)
    save_low_rank(changes, options.output)


if __name__ == "__main__":
    main()
