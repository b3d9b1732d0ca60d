"""What files of adapters call the layers of a model, and the tensors of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.convert.names import name_originals

UNET = "unet"
# How the name of a tensor ends, and which matrix of its layer it is; the first that fits.
ROLES = {
    ".lora_down.weight": "down",  # kohya's, and LyCORIS's of the kind LoCon
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",  # PEFT's and diffusers'
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # diffusers' before it used PEFT
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # of its attention processors
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
# What tells other kinds of adapters, anywhere in the name of a tensor.
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".diff": "whole weights (.diff)",
    ".w_norm": "weights of normalisations",
    ".lora_B.bias": "biases",
}
# How files call a part of a pipeline: before its layers' names with points, and with underscores, as kohya writes them.
PREFIXES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    UNET: (("unet.", "base_model.model.", ""), ("lora_unet_",)),
    "text_encoder": (("text_encoder.",), ("lora_te1_", "lora_te_")),
    "text_encoder_2": (("text_encoder_2.",), ("lora_te2_",)),
}
# diffusers' attention processors have no names of layers.
PROCESSORS = {
    "attn1.to_": "attn1.processor.to_",
    "attn2.to_": "attn2.processor.to_",
    "to_out.0": "to_out",
    "self_attn.out_proj": "self_attn.to_out",
    "self_attn.q_proj": "self_attn.to_q",
    "self_attn.k_proj": "self_attn.to_k",
    "self_attn.v_proj": "self_attn.to_v",
}


@dataclass(frozen=True)
class Layer:
    """A layer that an adapter can change.

    Attributes:
        part: of the pipeline.
        name: of the module in it.
        shape: of its weights: results, inputs, and of a convolution height and width.
    """

    part: str
    name: str
    shape: tuple[int, ...]

    @property
    def weight(self) -> str:
        """The name of its weights."""
        return f"{self.name}.weight"


def spell_layers(pipeline: Any, text_encoders: tuple[str, ...]) -> dict[str, Layer]:
    """Return each layer of a pipeline by every name that files give it."""
    spelt: dict[str, Layer] = {}
    for part in (UNET, *text_encoders):
        layers = list_layers(part, getattr(pipeline, part))
        originals: dict[str, str] = {}
        if part == UNET:
            originals = name_originals((each.weight for each in layers), pipeline.unet.config.layers_per_block)
        for layer in layers:
            spelt |= dict.fromkeys(_spell(layer, originals.get(layer.weight)), layer)
    return spelt


def list_layers(part: str, module: Any) -> list[Layer]:
    """Return the layers of a part that adapters can change: the linear ones and the convolutions."""
    import torch

    return [
        Layer(part, name, tuple(each.weight.shape))
        for name, each in module.named_modules()
        if isinstance(each, (torch.nn.Linear, torch.nn.Conv2d))
    ]


def _spell(layer: Layer, original: str | None) -> Iterator[str]:
    """Yield what files call a layer, without what is the tensor's own.

    Args:
        original: the name of its weights in the original layout.
    """
    pointed, flat = PREFIXES[layer.part]
    # transformers has changed its mind on whether the layers of an encoder stand in a `text_model`.
    short = layer.name.removeprefix("text_model.")
    names = [layer.name] if layer.part == UNET else [short, f"text_model.{short}"]
    for name in names:
        processors = name
        for new, old in PROCESSORS.items():
            processors = processors.replace(new, old)
        yield from (prefix + each for prefix in pointed for each in (name, processors))
    for name in [*names, *([original.removesuffix(".weight")] if original else [])]:
        yield from (prefix + name.replace(".", "_") for prefix in flat)
