"""Share learning rate, optimizer step, checkpoints and progress between the stages of training."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


def build_optimizer(parameters: Iterable[Any], *, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """Build the optimizer; each step sets its learning rate.

    Args:
        parameters: or groups of them, as torch's optimizers take them.
    """
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def take_step(optimizer: torch.optim.Optimizer, loss: Any) -> None:
    """Move all parameters against the loss's gradient. Its norm is clipped to 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_([each for group in optimizer.param_groups for each in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def compute_rate(step: int, *, steps: int, peak: float, warm_up: int = 100) -> float:
    """Return a step's learning rate: a linear rise, then half a cosine down."""
    return peak * min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2)


def save_state(path: Path, **state: Any) -> None:
    """Write a checkpoint that is either whole or absent."""
    partial = path.with_suffix(".incomplete")
    torch.save(state, partial)
    partial.replace(path)


def compute_short(device: str) -> Any:
    """Return a context for bfloat16, unless the CPU would only emulate it."""
    is_slow = device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16, enabled=not is_slow)


def show_progress(start: int, steps: int, name: str) -> Any:
    return tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10, dynamic_ncols=True)


def show_loss(bar: Any, losses: list[float]) -> None:
    """Show the mean of the last hundred losses."""
    bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}")
