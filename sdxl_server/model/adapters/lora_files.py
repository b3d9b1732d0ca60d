"""Load a LoRA file. Each tensor must belong to a layer of this model; an error names one that does not."""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.convert.recognition import UNET_PREFIX, VAE_PREFIX, describe_content
from sdxl_server.convert.weights_files import Header, remove_wrappers
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.files import read_adapter_file
from sdxl_server.model.adapters.layer_names import LAYER_PREFIXES, MATRIX_BY_SUFFIX, UNET, UNSERVED_ADAPTERS, Layer
from sdxl_server.schemas import shorten

# A matrix whose inputs are text embeddings, and the model by their width.
CROSS_ATTENTION = re.compile(r"attn2[._](processor\.)?to_k(_lora)?\.(lora\.)?(lora_)?(down|A)\b")
OWN_NAME = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)")  # PEFT's name of the adapter, such as .default
MODEL_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version")  # in a file's metadata
DIFFUSERS_KEY = "lora_adapter_metadata"  # PEFT's settings there, as JSON
PEFT_FILE = "adapter_config.json"  # PEFT's settings, next to its own file
EMBEDDINGS = "bundle_emb."  # OneTrainer's textual inversions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LowRankChange:
    """The change of one layer: factor × up × down.

    Attributes:
        down: rank × inputs, and for a convolution × height × width.
        up: outputs × rank.
        factor: alpha / rank, as trained.
    """

    down: Any
    up: Any
    factor: float

    @property
    def rank(self) -> int:
        return len(self.down)


def load_lora(path: Path, layers: Mapping[str, Layer]) -> tuple[str, dict[Layer, LowRankChange]]:
    """Return a file's SHA-256 and its changes.

    Args:
        layers: see `index_layers`.

    Raises:
        ConfigError: the file is damaged or does not fit the model.
    """
    import torch

    digest, header = read_adapter_file(path)
    _check_kind(header)
    places = {name: _find_layer(name, header, layers) for name in header.shapes if not name.startswith(EMBEDDINGS)}
    if not places:
        raise ConfigError(f"{path} holds no tensor of a LoRA")
    embeddings = sorted({name.split(".")[1] for name in header.shapes.keys() - places})
    if embeddings:
        logger.warning("%s: its textual inversions are left out: %s", path, shorten(", ".join(embeddings)))
    found: dict[Layer, dict[str, Any]] = {}
    for name, tensor in header.load_tensors(places, torch.float32).items():
        layer, matrix = places[name]
        if matrix in found.setdefault(layer, {}):
            raise ConfigError(f"{path} holds two tensors for one matrix of {layer.component}.{layer.name}: {name}")
        found[layer][matrix] = tensor
    settings = _read_settings(path, header)
    return digest, {layer: _build_change(path, header, layer, tensors, settings) for layer, tensors in found.items()}


def _check_kind(header: Header) -> None:
    """Refuse another kind of adapter than LoRA.

    Raises:
        ConfigError: names the kind and a tensor.
    """
    for kind, pattern in UNSERVED_ADAPTERS.items():
        name = next((name for name in header.shapes if re.search(pattern, name)), None)
        if name:
            raise ConfigError(f"{header.path} holds {kind}, and only LoRA is served: {name}")
    if header.shapes and not any("lora" in name or name.startswith(EMBEDDINGS) for name in header.shapes):
        is_whole = header.has(UNET_PREFIX) and header.has(VAE_PREFIX)
        raise ConfigError(
            f"{header.path} holds {'a whole model' if is_whole else describe_content(header)}, and only LoRA is served"
        )


def _find_layer(name: str, header: Header, layers: Mapping[str, Layer]) -> tuple[Layer, str]:
    """Return a tensor's layer, and which matrix of it the tensor is.

    Raises:
        ConfigError: this model has no such layer.
    """
    plain = OWN_NAME.sub("", name)
    for suffix, matrix in MATRIX_BY_SUFFIX.items():
        if plain.endswith(suffix):
            layer = layers.get(plain.removesuffix(suffix))
            if layer is not None:
                return layer, matrix
    base = _describe_base_model(header)
    raise ConfigError(f"{header.path} holds a tensor for which this model has no layer{base}: {name}")


def _describe_base_model(header: Header) -> str:
    """Describe the model of an adapter, from its layers or its metadata; empty if unknown."""
    for name, shape in header.shapes.items():
        if CROSS_ATTENTION.search(name) and shape[1] in MODEL_BY_WIDTH:
            return f"; it was made for {MODEL_BY_WIDTH[shape[1]]}"
    stated = (header.metadata[key] for key in MODEL_KEYS if key in header.metadata)
    return next((f"; it was made for {shorten(each)}" for each in stated), "")


def _build_change(
    path: Path, header: Header, layer: Layer, tensors: Mapping[str, Any], settings: Mapping[str, Any]
) -> LowRankChange:
    """Return the change of one layer from its tensors.

    Raises:
        ConfigError: a tensor is missing, does not fit or is not finite.
    """
    import torch

    where = f"{layer.component}.{layer.name}"
    missing = {"down", "up"} - set(tensors)
    if missing:
        raise ConfigError(f"{path} lacks a matrix of {where}: {', '.join(sorted(missing))}")
    for matrix, tensor in tensors.items():
        if matrix == "alpha" and tensor.numel() != 1:
            raise ConfigError(f"{path} takes one number as the alpha of {where}, not {tensor.numel()}")
        if not tensor.is_floating_point() and (matrix != "alpha" or tensor.is_complex()):
            raise ConfigError(f"{path} takes floating-point numbers for {where}, not {tensor.dtype}: {matrix}")
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{path} holds numbers for {where} that are not finite: {matrix}")
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    outputs, inputs, *kernel = layer.shape
    rank = len(down)
    if mid is not None and list(mid.shape) == [rank, rank, *kernel] and down.numel() == rank * inputs:
        # LoCon has three convolutions. The first two are joined into one.
        down = torch.einsum("rskl,si->rikl", mid.float(), down.flatten(1).float())
    if not rank or down.numel() != rank * math.prod(layer.shape[1:]) or list(up.flatten(1).shape) != [outputs, rank]:
        shapes = ", ".join(
            f"{matrix} {'×'.join(map(str, each.shape))}" for matrix, each in tensors.items() if each.dim()
        )
        raise ConfigError(
            f"{path} does not fit this model{_describe_base_model(header)}: {where} has weights of "
            f"{'×'.join(map(str, layer.shape))}, and the file has {shapes}"
        )
    alpha = float(tensors["alpha"]) if "alpha" in tensors else _read_alpha(path, layer, settings, rank)
    return LowRankChange(down.reshape(rank, inputs, *kernel), up.flatten(1), alpha / rank)


def _read_settings(path: Path, header: Header) -> dict[str, Any]:
    """Return PEFT's settings by component: from the metadata that diffusers writes, or from PEFT's own file.

    Raises:
        ConfigError: they describe another kind than LoRA, or PEFT's file is missing.
    """
    stated = _read_object(header.metadata.get(DIFFUSERS_KEY, "{}"), f"the metadata of {path}")
    peft_file = path.with_name(PEFT_FILE)
    if any(name.startswith("base_model.model.") for name in header.shapes):
        try:
            text = peft_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} needs PEFT's settings: put its {PEFT_FILE} next to it ({error})") from error
        stated = {f"{UNET}.{key}": value for key, value in _read_object(text, str(peft_file)).items()}
    settings = {
        name: {key.removeprefix(f"{name}."): value for key, value in stated.items() if key.startswith(f"{name}.")}
        for name in LAYER_PREFIXES
    }
    for each in settings.values():
        if each.get("use_dora"):
            raise ConfigError(f"{path} holds DoRA, and only LoRA is served")
    return settings


def _read_object(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        where: the text's place, in messages.
    """
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} takes a JSON object with PEFT's settings, not {shorten(content)}")
    return content


def _read_alpha(path: Path, layer: Layer, settings: Mapping[str, Any], rank: int) -> float:
    """Return a layer's alpha by PEFT's settings; without settings it is the rank."""
    own = settings[layer.component]
    patterns = own.get("alpha_pattern") or {}
    try:
        fits = [
            alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({remove_wrappers(key)})", layer.name)
        ]
    except (AttributeError, re.error) as error:
        raise ConfigError(
            f"{path} takes alphas by the pattern of a name as alpha_pattern, not {shorten(patterns)}: {error}"
        ) from error
    alpha = next(iter(fits), own.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ConfigError(f"{path} takes a number as the alpha of {layer.component}.{layer.name}, not {alpha!r}")
    return float(alpha) * (rank**0.5 if own.get("use_rslora") else 1)
