"""Load an adapter file. Each tensor must belong to a layer of this model; an error names one that does not."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_server.convert.recognition import UNET_PREFIX, VAE_PREFIX, describe_content
from sdxl_server.convert.weights_files import Header, remove_wrappers
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.changes import BIASES, FORMATS, LORA, Format, FusedChange, LowRankChange, Tensors
from sdxl_server.model.adapters.files import read_adapter_file
from sdxl_server.model.adapters.layer_names import LAYER_PREFIXES, MATRIX_BY_SUFFIX, UNET, Layer
from sdxl_server.schemas import shorten

# A matrix whose inputs are text embeddings, and the model by their width.
CROSS_ATTENTION = re.compile(
    r"attn2[._](processor\.)?to_k(_lora)?\.((lora\.)?(lora_)?(down|A)\b|hada_w1_b$|b2\.weight$|diff$)"
)
OWN_NAME = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)")  # PEFT's name of the adapter, such as .default
MODEL_BY_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
MODEL_KEYS = ("modelspec.architecture", "ss_base_model_version")  # in a file's metadata
DIFFUSERS_KEY = "lora_adapter_metadata"  # PEFT's settings there, as JSON
PEFT_FILE = "adapter_config.json"  # PEFT's settings, next to its own file
EMBEDDINGS = "bundle_emb."  # OneTrainer's textual inversions
NUMBERS = ("alpha", "on_input")
Change = LowRankChange | FusedChange

logger = logging.getLogger(__name__)


def load_lora(path: Path, layers: Mapping[str, Layer]) -> tuple[str, dict[Layer, Change]]:
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
        names = shorten(", ".join(embeddings))
        logger.warning("%s: its textual inversions need an entry in handler.embeddings, too: %s", path, names)
    found: dict[Layer, dict[str, Any]] = {}
    for name, tensor in header.load_tensors(places, torch.float32).items():
        layer, matrix = places[name]
        if matrix in found.setdefault(layer, {}):
            raise ConfigError(f"{path} holds two tensors for one matrix of {layer.component}.{layer.name}: {name}")
        found[layer][matrix] = tensor
    settings = _read_settings(path, header)
    return digest, {layer: _build_change(path, header, layer, tensors, settings) for layer, tensors in found.items()}


def _check_kind(header: Header) -> None:
    """Refuse a file without adapter.

    Raises:
        ConfigError: names its content.
    """
    own = tuple(suffix for suffix, matrix in MATRIX_BY_SUFFIX.items() if matrix != "weight")
    if header.shapes and not any(
        "lora" in name or name.startswith(EMBEDDINGS) or name.endswith(own) for name in header.shapes
    ):
        is_whole = header.has(UNET_PREFIX) and header.has(VAE_PREFIX)
        raise ConfigError(
            f"{header.path} holds {'a whole model' if is_whole else describe_content(header)}, no LoRA or other adapter"
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
        if CROSS_ATTENTION.search(name) and (width := math.prod(shape[1:])) in MODEL_BY_WIDTH:
            return f"; it was made for {MODEL_BY_WIDTH[width]}"
    stated = (header.metadata[key] for key in MODEL_KEYS if key in header.metadata)
    return next((f"; it was made for {shorten(each)}" for each in stated), "")


def _build_change(
    path: Path, header: Header, layer: Layer, tensors: Mapping[str, Any], settings: Mapping[str, Any]
) -> Change:
    """Return the change of one layer from its tensors.

    Raises:
        ConfigError: a tensor is missing, does not fit, is left over or is not finite.
    """
    where = f"{layer.component}.{layer.name}"
    _check_numbers(path, where, tensors)
    formats = [each for each in FORMATS if each.tensors & tensors.keys()]
    if len(formats) > 1:
        raise ConfigError(f"{path} holds {formats[0].name} and {formats[1].name} for one layer, {where}")
    layer_format = formats[0] if formats else BIASES if "diff_b" in tensors else LORA
    own = settings[layer.component]
    if own.get("use_dora") and "magnitude" not in tensors:
        raise ConfigError(f"{path} lacks the magnitudes of {where}, and its settings have use_dora")
    try:
        if layer_format is LORA and tensors.keys() <= {"down", "up", "mid", "alpha"}:
            return _build_low_rank_change(path, layer, tensors, own)
        change = _build_fused_change(path, layer, layer_format, tensors, own)
        left = _check_fits(change, layer)
    except ConfigError:  # is a ValueError, too
        raise
    except KeyError as error:
        raise ConfigError(f"{path} lacks a matrix of {where}: {error.args[0]}") from error
    except (IndexError, RuntimeError, ValueError) as error:
        shapes = ", ".join(
            f"{matrix} {'×'.join(map(str, each.shape))}" for matrix, each in tensors.items() if each.dim()
        )
        bias = "" if layer.has_bias or not tensors.keys() & {"diff_b", "up_bias"} else ", no bias"
        raise ConfigError(
            f"{path} does not fit this model{_describe_base_model(header)}: {where} has weights of "
            f"{'×'.join(map(str, layer.shape))}{bias}, and the file has {shapes}"
        ) from error
    if left:
        raise ConfigError(f"{path} holds tensors of {where} that {layer_format.name} does not have: {', '.join(left)}")
    return change


def _check_numbers(path: Path, where: str, tensors: Mapping[str, Any]) -> None:
    """Check that tensors hold usable numbers.

    Raises:
        ConfigError: names the tensor.
    """
    import torch

    for matrix, tensor in tensors.items():
        if matrix in NUMBERS and tensor.numel() != 1:
            raise ConfigError(f"{path} takes one number as the {matrix} of {where}, not {tensor.numel()}")
        if not tensor.is_floating_point() and (matrix not in NUMBERS or tensor.is_complex()):
            raise ConfigError(f"{path} takes floating-point numbers for {where}, not {tensor.dtype}: {matrix}")
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{path} holds numbers for {where} that are not finite: {matrix}")


def _build_low_rank_change(
    path: Path, layer: Layer, tensors: Mapping[str, Any], settings: Mapping[str, Any]
) -> LowRankChange:
    """Return the change of plain LoRA.

    Raises:
        KeyError: a matrix is missing.
        ValueError: the shapes do not fit.
    """
    import torch

    up, down, mid = tensors["up"], tensors["down"], tensors.get("mid")
    outputs, inputs, *kernel = layer.shape
    rank = len(down)
    if mid is not None and list(mid.shape) == [rank, rank, *kernel] and down.numel() == rank * inputs:
        # LoCon has three convolutions. The first two are joined into one.
        down = torch.einsum("rskl,si->rikl", mid.float(), down.flatten(1).float())
    if not rank or down.numel() != rank * math.prod(layer.shape[1:]) or list(up.flatten(1).shape) != [outputs, rank]:
        raise ValueError("the shapes do not fit")
    factor = _compute_factor(path, layer, tensors, settings, rank)
    return LowRankChange(down.reshape(rank, inputs, *kernel), up.flatten(1), factor)


def _build_fused_change(
    path: Path, layer: Layer, layer_format: Format, tensors: Mapping[str, Any], settings: Mapping[str, Any]
) -> FusedChange:
    """Return the change of another format.

    Raises:
        ConfigError: PEFT's settings are not served.
        ValueError: the shapes do not fit.
    """
    if "oft_R" in tensors and settings.get("coft"):
        raise ConfigError(f"{path} holds OFT of PEFT with coft: true, which is not served")
    if "boft_R" in tensors and len(tensors["boft_R"]) > 1:
        raise ConfigError(
            f"{path} holds BOFT of PEFT with {len(tensors['boft_R'])} butterfly factors, and only one is served"
        )
    held = Tensors({name: float(each) if name in NUMBERS else each for name, each in tensors.items()})
    rank, factor = min((len(tensors[name]) for name in layer_format.ranked if name in tensors), default=None), 1.0
    if rank == 0:
        raise ValueError("a rank of 0")
    if layer_format.ranked:
        factor = _compute_factor(path, layer, tensors, settings, rank)
        held.pop("alpha", None)
    return FusedChange(layer_format, held, rank, factor, settings, _scales_inputs(layer, tensors, settings))


def _scales_inputs(layer: Layer, tensors: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Say whether (IA)³ of PEFT scales a layer's inputs. The shape says so for linear layers alone."""
    vector, names = tensors.get("ia3_l"), settings.get("feedforward_modules") or ()
    if vector is None or vector.dim() == 2:
        return vector is not None and len(vector) == 1
    if isinstance(names, str):
        return re.fullmatch(names, layer.name) is not None
    return any(f".{layer.name}".endswith(f".{each}") for each in names)


def _check_fits(change: FusedChange, layer: Layer) -> list[str]:
    """Compute a change on PyTorch's meta device, which has shapes only. Return the tensors that it does not need.

    Raises:
        KeyError: a tensor is missing.
        IndexError, RuntimeError, ValueError: the shapes do not fit.
    """
    import torch

    tensors = Tensors(
        {name: each if name in NUMBERS else each.to("meta") for name, each in change.tensors.data.items()}
    )
    shapes = {"weight": layer.shape, **({"bias": layer.shape[:1]} if layer.has_bias else {})}
    dataclasses.replace(change, tensors=tensors).compute(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    )
    return sorted(change.tensors.keys() - tensors.read)


def _read_settings(path: Path, header: Header) -> dict[str, Any]:
    """Return PEFT's settings by component: from the metadata that diffusers writes, or from PEFT's own file.

    Raises:
        ConfigError: they cannot be read, or PEFT's file is missing.
    """
    stated = _read_object(header.metadata.get(DIFFUSERS_KEY, "{}"), f"the metadata of {path}")
    peft_file = path.with_name(PEFT_FILE)
    if any(name.startswith("base_model.model.") for name in header.shapes):
        try:
            text = peft_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} needs PEFT's settings: put its {PEFT_FILE} next to it ({error})") from error
        stated = {f"{UNET}.{key}": value for key, value in _read_object(text, str(peft_file)).items()}
    return {
        name: {key.removeprefix(f"{name}."): value for key, value in stated.items() if key.startswith(f"{name}.")}
        for name in LAYER_PREFIXES
    }


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


def _compute_factor(
    path: Path, layer: Layer, tensors: Mapping[str, Any], settings: Mapping[str, Any], rank: float | None
) -> float:
    """Return alpha / rank. Without settings the alpha is the rank.

    Args:
        rank: None for LoKr of two whole matrices: LyCORIS does not scale these, and PEFT does.
    """
    if rank is None:
        rank = _read_number(path, layer, settings, "rank", default=settings.get("r", 0))
        if not rank:
            return 1.0
    if "alpha" in tensors:
        return float(tensors["alpha"]) / rank
    alpha = _read_number(
        path, layer, settings, "alpha", default=settings.get("lora_alpha", settings.get("alpha", rank))
    )
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _read_number(path: Path, layer: Layer, settings: Mapping[str, Any], name: str, *, default: Any) -> float:
    """Return a layer's rank or alpha by PEFT's settings."""
    patterns = settings.get(f"{name}_pattern") or {}
    try:
        fits = [each for key, each in patterns.items() if re.fullmatch(rf"(.*\.)?({remove_wrappers(key)})", layer.name)]
    except (AttributeError, re.error) as error:
        raise ConfigError(
            f"{path} takes numbers by the pattern of a name as {name}_pattern, not {shorten(patterns)}: {error}"
        ) from error
    number = next(iter(fits), default)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ConfigError(f"{path} takes a number as the {name} of {layer.component}.{layer.name}, not {number!r}")
    return float(number)
