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
    ".lora_B.bias": "up_bias",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",  # PEFT's
    ".lora_magnitude_vector.weight": "magnitude",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},  # GLoRA
    **{f".{name}": name for name in ("oft_blocks", "oft_diag", "rescale")},
    **{".oft_R.weight": "oft_R", ".boft_R": "boft_R", ".boft_s": "boft_s", ".ia3_l": "ia3_l"},  # PEFT's
    **{".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b", ".set_weight": "set_weight"},
    ".alpha": "alpha",
    **{".on_input": "on_input", ".weight": "weight"},  # (IA)³
}
# The prefixes of a component's layers: with dots, and with underscores as in kohya's files. OneTrainer writes clip_l.,
# or for ComfyUI diffusion_model. and text_encoders.; clip_h is the encoder of Stable Diffusion 2.x.
LAYER_PREFIXES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    UNET: (
        ("unet.", "base_model.model.", "diffusion_model.", "model.diffusion_model.", "lora_unet.", ""),
        ("lora_unet_", "lycoris_unet_", "lycoris_"),
    ),
    "text_encoder": (
        (
            *("text_encoder.", "lora_te1.", "lora_te.", "clip_l.", "clip_h."),
            *("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
        ),
        ("lora_te1_", "lora_te_", "lycoris_te1_", "lycoris_te_"),
    ),
    "text_encoder_2": (
        ("text_encoder_2.", "lora_te2.", "clip_g.", "text_encoders.clip_g.transformer."),
        ("lora_te2_", "lycoris_te2_"),
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
        shape: of its weights: outputs, inputs, and for a convolution height and width; channels of a normalisation.
        has_bias: it has a bias as well.
    """

    component: str
    name: str
    shape: tuple[int, ...]
    has_bias: bool

    @property
    def weight(self) -> str:
        """The name of its weights."""
        return f"{self.name}.weight"


def index_layers(pipeline: Any, text_encoders: tuple[str, ...]) -> dict[str, Layer]:
    """Return a pipeline's layers by every name that files give them."""
    by_name: dict[str, Layer] = {}
    for component in (UNET, *text_encoders):
        module = getattr(pipeline, component)
        layers = [*list_layers(component, module), *list_normalisations(component, module)]
        ldm_names: dict[str, str] = {}
        if component == UNET:
            ldm_names = list_ldm_names((each.weight for each in layers), pipeline.unet.config.layers_per_block)
        for layer in layers:
            by_name |= dict.fromkeys(_list_file_names(layer, ldm_names.get(layer.weight)), layer)
    return by_name


def list_layers(component: str, module: Any) -> list[Layer]:
    """Return a component's layers that matrices can change: linear layers and convolutions."""
    import torch

    return _list_modules(component, module, (torch.nn.Linear, torch.nn.Conv2d))


def list_normalisations(component: str, module: Any) -> list[Layer]:
    """Return a component's normalisations that have weights."""
    import torch

    return _list_modules(component, module, (torch.nn.GroupNorm, torch.nn.LayerNorm))


def _list_modules(component: str, module: Any, classes: tuple[Any, ...]) -> list[Layer]:
    return [
        Layer(component, name, tuple(each.weight.shape), each.bias is not None)
        for name, each in module.named_modules()
        if isinstance(each, classes) and each.weight is not None
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
