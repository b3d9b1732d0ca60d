"""The names that adapter files give to a model's layers and to the matrices of each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.convert.ldm_names import list_ldm_names

UNET = "unet"
# The end of a tensor's name, and its matrix; the first match counts.
MATRIX_BY_SUFFIX = {
    ".lora_down.weight": "down",  # kohya's, and LyCORIS's LoCon
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",  # PEFT's and diffusers'
    ".lora_B.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # diffusers' before PEFT
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # its attention processors'
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
# Other kinds of adapters, by a pattern of their tensors' names.
UNSERVED_ADAPTERS = {
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)\b",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "GLoRA": r"\.([ab][12]|bm)\.weight$",
    "(IA)³": r"\.(on_input|ia3_l)\b",
    "OFT": r"\.oft_",
    "BOFT": r"\.boft_",
    "VeRA": r"\.vera_",
    "whole weights (.diff)": r"\.diff$",
    "biases": r"\.(diff_b|lora_B\.bias)$",
    "weights of normalisations": r"\.[bw]_norm$",
}
# The prefixes of a component's layers: with dots, and with underscores as in kohya's files. OneTrainer writes clip_l.,
# or for ComfyUI diffusion_model. and text_encoders.; clip_h is the encoder of Stable Diffusion 2.x.
LAYER_PREFIXES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    UNET: (
        ("unet.", "base_model.model.", "diffusion_model.", "model.diffusion_model.", "lora_unet.", ""),
        ("lora_unet_", "lycoris_"),
    ),
    "text_encoder": (
        (
            *("text_encoder.", "lora_te1.", "lora_te.", "clip_l.", "clip_h."),
            *("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
        ),
        ("lora_te1_", "lora_te_"),
    ),
    "text_encoder_2": (
        ("text_encoder_2.", "lora_te2.", "clip_g.", "text_encoders.clip_g.transformer."),
        ("lora_te2_",),
    ),
}
# diffusers' attention processors name no layers.
ATTENTION_PROCESSORS = {
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
        component: of the pipeline.
        name: its module's name in the component.
        shape: of its weights: outputs, inputs, and for a convolution height and width.
    """

    component: str
    name: str
    shape: tuple[int, ...]

    @property
    def weight(self) -> str:
        """The name of its weights."""
        return f"{self.name}.weight"


def index_layers(pipeline: Any, text_encoders: tuple[str, ...]) -> dict[str, Layer]:
    """Return a pipeline's layers by every name that files give them."""
    by_name: dict[str, Layer] = {}
    for component in (UNET, *text_encoders):
        layers = list_layers(component, getattr(pipeline, component))
        ldm_names: dict[str, str] = {}
        if component == UNET:
            ldm_names = list_ldm_names((each.weight for each in layers), pipeline.unet.config.layers_per_block)
        for layer in layers:
            by_name |= dict.fromkeys(_list_file_names(layer, ldm_names.get(layer.weight)), layer)
    return by_name


def list_layers(component: str, module: Any) -> list[Layer]:
    """Return a component's layers that adapters can change: linear layers and convolutions."""
    import torch

    return [
        Layer(component, name, tuple(each.weight.shape))
        for name, each in module.named_modules()
        if isinstance(each, (torch.nn.Linear, torch.nn.Conv2d))
    ]


def _list_file_names(layer: Layer, ldm_name: str | None) -> Iterator[str]:
    """Yield a layer's names in files, without the ending for the matrix.

    Args:
        ldm_name: the name of its weights in the LDM layout.
    """
    dotted, flat = LAYER_PREFIXES[layer.component]
    # Some versions of transformers put an encoder's layers into a `text_model`.
    short = layer.name.removeprefix("text_model.")
    names = [layer.name] if layer.component == UNET else [short, f"text_model.{short}"]
    if ldm_name:
        names.append(ldm_name.removesuffix(".weight"))
    for name in names:
        processors = name
        for new, old in ATTENTION_PROCESSORS.items():
            processors = processors.replace(new, old)
        yield from (prefix + each for prefix in dotted for each in (name, processors))
        yield from (prefix + name.replace(".", "_") for prefix in flat)
