"""IP-Adapter: an image as a prompt. The UNet's attention to the text also attends to tokens of the image.

Read are safetensors files in the original naming: IP-Adapter, Plus and Full. Each needs its CLIP image encoder.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_server.config.control_settings import IP_ADAPTER, ControlConfig
from sdxl_server.errors import ConfigError
from sdxl_server.model.controls.base import Component, Control, Inputs, UNetCall, make_zeros
from sdxl_server.model.controls.files import ControlFile
from sdxl_server.model.families import Family
from sdxl_server.model.folders import check_component, load_weights

WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}  # of text tokens
PREFIX = "image_proj."
LAYER = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
FACE = re.compile(r"^image_proj\.perceiver_resampler|_lora\.(down|up)\.weight$")
NAME = "ip_hidden_states"  # diffusers' self-attention takes this argument without a warning


class ImageAttention(torch.nn.Module):
    """The processor of a cross-attention that also attends to image tokens, of each IP-Adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.to_k_ip, self.to_v_ip = torch.nn.ModuleList(), torch.nn.ModuleList()

    def add(self, name: str, key: Any, value: Any) -> None:
        """Add the layers of an IP-Adapter.

        Args:
            key, value: their weights; results × width of the tokens.
        """
        self.names.append(name)
        for layers, weight in ((self.to_k_ip, key), (self.to_v_ip, value)):
            layer = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layers.append(layer)

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        temb: Any = None,
        ip_hidden_states: Any = None,
    ) -> Any:
        """Return the attention to the text plus that to each image, times its scale.

        Args:
            hidden_states: rows × cells × channels.
            encoder_hidden_states: the text; rows × tokens × width.
            ip_hidden_states: by IP-Adapter `tokens`, rows × tokens × width, and `scale`, rows × 1 × 1. None: no image.
        """

        def split(values: Any) -> Any:
            return values.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(key: Any, value: Any) -> Any:
            attended = torch.nn.functional.scaled_dot_product_attention(query, split(key), split(value))
            return attended.transpose(1, 2).flatten(2)

        query = split(attn.to_q(hidden_states))
        total = attend(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        layers = zip(self.names, self.to_k_ip, self.to_v_ip, strict=True) if ip_hidden_states is not None else ()
        for name, to_key, to_value in layers:
            tokens, scale = ip_hidden_states[name]["tokens"], ip_hidden_states[name]["scale"]
            total = total + attend(to_key(tokens), scale * to_value(tokens))  # fewer numbers than the result
        return attn.to_out[1](attn.to_out[0](total))


class ImageEncoder(torch.nn.Module):
    """A CLIP image encoder and an IP-Adapter's projection.

    Args:
        encoder: transformers' CLIPVisionModelWithProjection.
        projection: diffusers' projection of an IP-Adapter.
        is_plus: the projection takes the tokens of the encoder's last layer but one, instead of its embedding.
    """

    def __init__(self, encoder: Any, projection: Any, *, is_plus: bool) -> None:
        super().__init__()
        self.is_plus, self.projection = is_plus, projection
        self.encoder = encoder.vision_model if is_plus else encoder
        if is_plus:
            self.encoder.encoder.layers = self.encoder.encoder.layers[:-1]

    def forward(self, pixels: Any) -> Any:
        """Return the tokens without an image and those of an image; 2 × tokens × width.

        Args:
            pixels: 1 × 3 × side × side, normalised.
        """
        if self.is_plus:
            embedded = self.encoder(torch.cat([torch.zeros_like(pixels), pixels])).last_hidden_state
        else:
            embedding = self.encoder(pixels).image_embeds
            embedded = torch.cat([torch.zeros_like(embedding), embedding])
        return self.projection(embedded)


@dataclass(frozen=True, eq=False)
class IPAdapter(Control):
    """An IP-Adapter. Its module encodes the image; its attention layers are part of the UNet.

    Attributes:
        prepare: transformers' image processor of the encoder.
        shape: of the tokens of an image; tokens × width.
    """

    kind = IP_ADAPTER
    is_map = False

    prepare: Any = None
    shape: tuple[int, int] = (0, 0)

    def list_components(self) -> Mapping[str, Component]:
        """Return the image encoder with the projection."""
        return {self.component: Component(self.module.forward, {})}

    def encode_image(self, functions: Mapping[str, Callable[..., Any]], image: Any, mode: str | None) -> Any:
        """Return the tokens without an image and those of the image."""
        pixels = self.prepare(image.convert("RGB"), return_tensors="pt").pixel_values
        weight = next(self.module.parameters())
        return functions[self.component](pixels.to(weight.device, weight.dtype))

    def compute_inputs(
        self, functions: Mapping[str, Callable[..., Any]], encoded: Any, scale: float, call: UNetCall
    ) -> Inputs:
        """Return the tokens and the scale. A single row is the prompt's."""
        rows = len(call.sample)
        scales = call.sample.new_full((rows, 1, 1), scale)
        return self._wrap(encoded[-rows:], scales)

    def list_empty_inputs(self, unet: Any, sample: Any) -> Inputs:
        """Return zeros for the tokens and the scale."""
        return self._wrap(make_zeros(sample, *self.shape), make_zeros(sample, 1, 1))

    def _wrap(self, tokens: Any, scale: Any) -> Inputs:
        return {"cross_attention_kwargs": {NAME: {self.config.name: {"tokens": tokens, "scale": scale}}}}


def load_ip_adapter(opened: ControlFile, config: ControlConfig, pipeline: Any, family: Family, dtype: str) -> IPAdapter:
    """Load an IP-Adapter and its image encoder, and add its attention layers to the UNet.

    Args:
        dtype: of its weights, by torch's name.

    Raises:
        ConfigError: the files are damaged or do not fit the model.
    """
    from diffusers.models.embeddings import ImageProjection
    from transformers import CLIPImageProcessorPil

    header, unet = opened.header, pipeline.unet
    has = {name.removeprefix(PREFIX) for name in header.shapes}
    if any(map(FACE.search, header.shapes)) or ("proj.0.weight" in has and "proj.3.weight" not in has):
        raise ConfigError(
            f"{opened.path} holds an IP-Adapter FaceID. It takes the embedding of a face, and this server has no model "
            "for faces; IP-Adapter, Plus and Full are served"
        )
    layers = _find_layers(opened, unet)
    own_dtype = getattr(torch, dtype)
    tensors = header.load_tensors(header.shapes, own_dtype)
    for name, each in tensors.items():
        tensors[name] = each.to(unet.device, own_dtype)
        if not torch.isfinite(tensors[name]).all():
            raise ConfigError(f"{header.path} holds numbers that are not finite in {dtype}: {name}")
    read = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
    try:
        projection = unet._convert_ip_adapter_image_proj_to_diffusers(read, low_cpu_mem_usage=False)
    except (KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{header.path} holds no whole projection of an IP-Adapter: {line}") from error
    is_plus = not isinstance(projection, ImageProjection)
    encoder = _load_encoder(opened, config, own_dtype, width=_read_width(read), is_plus=is_plus)
    module = ImageEncoder(encoder, projection.to(own_dtype), is_plus=is_plus).to(unet.device)
    side, cells = encoder.config.image_size, (encoder.config.image_size // encoder.config.patch_size) ** 2
    prepare = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokens = (
        read["latents"].shape[1] if "latents" in read else cells + 1 if is_plus else projection.num_image_text_embeds
    )
    for path, names in layers.items():
        attention = unet.get_submodule(path)
        if not isinstance(attention.processor, ImageAttention):
            attention.set_processor(ImageAttention())
        attention.processor.add(config.name, *(tensors[name] for name in names))
    shape = (tokens, unet.config.cross_attention_dim)
    return IPAdapter(config, opened.sha256, module.eval().requires_grad_(False), (), prepare, shape)


def _find_layers(opened: ControlFile, unet: Any) -> dict[str, list[str]]:
    """Return the names of an IP-Adapter's keys and values in its file, by the path of the UNet's cross-attention.

    Raises:
        ConfigError: they do not fit the UNet.
    """
    shapes = opened.header.shapes
    # The file counts all attentions; each second one is to the text.
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    names = {
        path: [f"ip_adapter.{2 * i + 1}.to_{each}_ip.weight" for each in "kv"] for i, path in enumerate(attentions)
    }
    held = {name: shapes[name] for name in shapes if LAYER.fullmatch(name)}
    expected = {
        name: (unet.get_submodule(path).to_k.out_features, unet.config.cross_attention_dim)
        for path, pair in names.items()
        for name in pair
    }
    if held != expected:
        width = next(iter(held.values()), (0, 0))[-1]
        raise ConfigError(
            f"{opened.path} holds an IP-Adapter for {WIDTHS.get(width, 'another model')} ({len(held) // 2} layers of "
            f"width {width}). This model's UNet has {len(attentions)} layers of width {unet.config.cross_attention_dim}"
        )
    return names


def _read_width(read: Mapping[str, Any]) -> int:
    """Return the width of what a projection takes from the image encoder."""
    first = next(
        each for name in ("proj.weight", "proj.0.weight", "proj_in.weight") if (each := read.get(name)) is not None
    )
    return int(first.shape[1])


def _load_encoder(opened: ControlFile, config: ControlConfig, dtype: Any, *, width: int, is_plus: bool) -> Any:
    """Load an IP-Adapter's image encoder.

    Args:
        width: of what the projection takes.

    Raises:
        ConfigError: it is missing, incomplete, or another one.
    """
    from transformers import CLIPVisionModelWithProjection

    folder = opened.path.parent / (config.image_encoder or "image_encoder")
    if not folder.is_dir():
        raise ConfigError(
            f"{opened.path} needs its CLIP image encoder, and {folder} is no folder; name its folder in image_encoder"
        )
    check_component(folder, remedy="hf download h94/IP-Adapter")
    try:
        encoder = load_weights(CLIPVisionModelWithProjection, folder, dtype)
    except (OSError, RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"{folder} holds no whole CLIP image encoder: {line}") from error
    own = encoder.config.hidden_size if is_plus else encoder.config.projection_dim
    if own != width:
        raise ConfigError(
            f"{opened.path} takes an image encoder of width {width}, and {folder} has {own}. Files named vit-h take "
            "models/image_encoder of h94/IP-Adapter, other files for Stable Diffusion XL sdxl_models/image_encoder"
        )
    return encoder
