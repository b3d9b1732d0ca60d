"""Reading an adapter's file: every tensor belongs to a layer of this model, or there is an error that names it."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.convert.recognition import CheckpointError, Header, read_header
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.names import OTHER_KINDS, PREFIXES, ROLES, UNET, Layer
from sdxl_server.schemas import shorten

# Whose cross-attention takes vectors of so many numbers.
MODELS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
STATED = ("modelspec.architecture", "ss_base_model_version")  # in a file's metadata
DIFFUSERS = "lora_adapter_metadata"  # PEFT's settings there, as JSON
PEFT = "adapter_config.json"  # PEFT's settings, beside a file of its own


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a layer: factor × up × down.

    Attributes:
        down: rank × inputs, and of a convolution height and width.
        up: results × rank.
        factor: the strength that it was trained with, alpha / rank.
    """

    down: Any
    up: Any
    factor: float

    @property
    def rank(self) -> int:
        return len(self.down)


def read_adapter(path: Path, spelt: Mapping[str, Layer]) -> tuple[str, dict[Layer, LowRank]]:
    """Return the SHA-256 of an adapter's file, and what it adds to which layer.

    Args:
        spelt: the layers of the model by every name that files give them.

    Raises:
        ConfigError: says what is wrong with the file.
    """
    from safetensors import safe_open

    try:
        header = read_header(path)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    places = {name: _place(name, header, spelt) for name in header.shapes}
    if not places:
        raise ConfigError(f"{path} holds no tensor")
    found: dict[Layer, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as file:
        for name, (layer, role) in places.items():
            if role in found.setdefault(layer, {}):
                raise ConfigError(f"{path} holds two tensors for one matrix of {layer.part}.{layer.name}: {name}")
            found[layer][role] = file.get_tensor(name)
    settings = _read_settings(path, header)
    return digest, {layer: _join(path, header, layer, tensors, settings) for layer, tensors in found.items()}


def _place(name: str, header: Header, spelt: Mapping[str, Layer]) -> tuple[Layer, str]:
    """Return the layer and the role of a tensor.

    Raises:
        ConfigError: it has none.
    """
    for mark, kind in OTHER_KINDS.items():
        if mark in name:
            raise ConfigError(f"{header.path} holds {kind}, and only LoRA is served: {name}")
    for ending, role in ROLES.items():
        if name.endswith(ending):
            layer = spelt.get(name.removesuffix(ending))
            if layer is not None:
                return layer, role
    raise ConfigError(f"{header.path} holds a tensor for which this model has no layer{_name_model(header)}: {name}")


def _name_model(header: Header) -> str:
    """Say for which model an adapter was made, by what its layers take or by what the file says, if anything."""
    for name, shape in header.shapes.items():
        if re.search(r"attn2[._](processor\.)?to_k(_lora)?\.(lora\.)?(lora_)?(down|A)\b", name) and shape[1] in MODELS:
            return f"; it was made for {MODELS[shape[1]]}"
    stated = (header.metadata[key] for key in STATED if key in header.metadata)
    return next((f"; it was made for {shorten(each)}" for each in stated), "")


def _join(path: Path, header: Header, layer: Layer, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> LowRank:
    """Return what the tensors of one layer add to it.

    Raises:
        ConfigError: one is missing, does not fit, or is not finite.
    """
    import torch

    where = f"{layer.part}.{layer.name}"
    missing = {"down", "up"} - set(tensors)
    if missing:
        raise ConfigError(f"{path} lacks a matrix of {where}: {', '.join(sorted(missing))}")
    for role, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ConfigError(f"{path} holds numbers for {where} that are not finite: {role}")
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    outputs, inputs, *kernel = layer.shape
    rank = len(down)
    if mid is not None and list(mid.shape) == [rank, rank, *kernel] and down.numel() == rank * inputs:
        # A convolution in three steps is one in two: the first two of them are one.
        down = torch.einsum("rskl,si->rikl", mid.float(), down.flatten(1).float())
    if not rank or down.numel() != rank * math.prod(layer.shape[1:]) or list(up.flatten(1).shape) != [outputs, rank]:
        shapes = ", ".join(f"{role} {'×'.join(map(str, each.shape))}" for role, each in tensors.items() if each.dim())
        raise ConfigError(
            f"{path} does not fit this model{_name_model(header)}: {where} has weights of "
            f"{'×'.join(map(str, layer.shape))}, and the file has for it {shapes}"
        )
    alpha = float(tensors["alpha"]) if "alpha" in tensors else _find_alpha(path, layer, settings, rank)
    return LowRank(down.reshape(rank, inputs, *kernel), up.flatten(1), alpha / rank)


def _read_settings(path: Path, header: Header) -> dict[str, Any]:
    """Return PEFT's settings by part, from the file's metadata as diffusers keeps them, or from the file beside it.

    Raises:
        ConfigError: they are of another kind than LoRA, or missing although such a file has no strength without them.
    """
    try:
        stated = json.loads(header.metadata.get(DIFFUSERS, "{}"))
        beside = path.with_name(PEFT)
        if any(name.startswith("base_model.model.") for name in header.shapes):
            if not beside.exists():
                raise ConfigError(f"{path} is PEFT's, whose strength stands in {PEFT} beside it, and there is none")
            stated = {f"{UNET}.{key}": value for key, value in json.loads(beside.read_text()).items()}
    except (OSError, ValueError) as error:
        raise ConfigError(f"the settings of {path} cannot be read: {error}") from error
    settings = {
        part: {key.removeprefix(f"{part}."): value for key, value in stated.items() if key.startswith(f"{part}.")}
        for part in PREFIXES
    }
    for each in settings.values():
        if each.get("use_dora"):
            raise ConfigError(f"{path} holds DoRA, and only LoRA is served")
    return settings


def _find_alpha(path: Path, layer: Layer, settings: Mapping[str, Any], rank: int) -> float:
    """Return the strength times rank that PEFT's settings give a layer; without any it is the rank."""
    own = settings[layer.part]
    patterns = own.get("alpha_pattern") or {}
    fits = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer.name))
    alpha = next(fits, own.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ConfigError(f"{path} says of {layer.part}.{layer.name} that its alpha is {alpha!r}, which is no number")
    return float(alpha) * (rank**0.5 if own.get("use_rslora") else 1)
