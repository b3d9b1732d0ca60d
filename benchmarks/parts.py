"""Parts of a pipeline, each with the inputs that the pipeline gives it."""

import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.configurations import PARTS

_TOKENS = 77
_TIMESTEPS = (981.0, 721.0, 401.0, 101.0)  # one for each input; a large one needs a precise time embedding
INPUTS = len(_TIMESTEPS)


@dataclass(frozen=True)
class Part:
    """One part of the pipeline in a folder.

    Attributes:
        weights: the name of their type. As in the server, the VAE overflows in float16 and takes float32.
        size: the image's width and height in pixels.
    """

    model: Path
    name: str
    weights: str
    size: int

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, "float32" if (self.name, self.weights) == ("vae", "float16") else self.weights)

    @functools.cached_property
    def module(self) -> torch.nn.Module:
        library, class_name, _ = PARTS[self.name]
        module = getattr(importlib.import_module(library), class_name).from_pretrained(
            self.model / self.name, dtype=self.dtype, use_safetensors=True, local_files_only=True
        )
        if self.name.startswith("text_encoder"):
            # At its first call transformers hooks up the hidden states, behind a lock that dynamo cannot trace.
            module(torch.zeros(1, 1, dtype=torch.long), output_hidden_states=True)
        return module.eval().requires_grad_(False)

    @property
    def method(self) -> Callable[..., Any]:
        return getattr(self.module, PARTS[self.name][2])

    @functools.cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """Keyword arguments with different noise, prompts and timesteps. The error of one call is partly chance."""
        config = SimpleNamespace(**json.loads((self.model / self.name / "config.json").read_text()))
        inputs = [_build_inputs(self.name, config, self.size, *each) for each in enumerate(_TIMESTEPS)]

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            # As in the server, the timestep stays in float32.
            return tensor.to(self.dtype) if tensor.is_floating_point() and tensor.dim() else tensor

        return pytree.tree_map_only(torch.Tensor, convert, inputs)


def list_tensors(results: Any) -> tuple[torch.Tensor, ...]:
    """Return all tensors of a nested structure."""
    return tuple(each for each in pytree.tree_leaves(results) if isinstance(each, torch.Tensor))


def _build_inputs(name: str, config: Any, size: int, seed: int, timestep: float) -> dict[str, Any]:
    """Return seeded inputs. The UNet gets two rows, as with guidance: with the prompt and without."""
    generator, side = torch.Generator().manual_seed(seed), size // 8

    def draw(*shape: int) -> torch.Tensor:
        # The values are exact in bfloat16 and float16 too, so every configuration gets the same ones.
        return torch.randn(shape, generator=generator).to(torch.bfloat16).float()

    if name == "unet":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "sample": draw(2, config.in_channels, side, side),
            "timestep": torch.tensor(timestep),
            "encoder_hidden_states": draw(2, _TOKENS, config.cross_attention_dim),
            "added_cond_kwargs": {
                "text_embeds": draw(2, pooled),
                "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * 2).float(),
            },
            "return_dict": False,
        }
    if name == "vae":
        return {"z": draw(1, config.latent_channels, side, side), "return_dict": False}
    letters = torch.randint(config.vocab_size - 2, (1, _TOKENS), generator=generator)
    letters[:, -1] = config.eos_token_id
    return {"input_ids": letters, "output_hidden_states": True}
