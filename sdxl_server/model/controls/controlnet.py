"""ControlNet: a copy of the UNet's encoder that runs at each step. The UNet adds its feature maps.

Read are diffusers' folders, and files in diffusers' or the original naming. A union ControlNet serves several kinds of
images; a request's `mode` names one.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.control_settings import CONTROLNET, ControlConfig
from sdxl_server.convert.weights_files import Header
from sdxl_server.errors import ConfigError
from sdxl_server.model.controls.base import Component, Control, Inputs, UNetCall, make_zeros
from sdxl_server.model.controls.files import MODELS, ControlFile, build_module, check_family, load_weights
from sdxl_server.model.families import Family

PLAIN, UNION = "ControlNetModel", "ControlNetUnionModel"
CLASSES = (PLAIN, UNION, "ControlNetModel_Union")  # the last is the name of the union's authors
DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"  # the UNet's arguments
SIDES = (0, 2, 3)  # the axes of rows, height and width
UNION_MODES = {
    **{"openpose": 0, "depth": 1, "scribble": 2, "hed": 2, "pidi": 2, "ted": 2},
    **{"canny": 3, "lineart": 3, "anime_lineart": 3, "mlsd": 3, "normal": 4, "segment": 5, "tile": 6, "repaint": 7},
}
"""The kinds of images of a union ControlNet, named by its authors, and the numbers of their inputs."""
# Settings that decide what a ControlNet takes at each step. It gets what the UNet gets.
SHARED_SETTINGS = (
    *("cross_attention_dim", "encoder_hid_dim_type", "class_embed_type", "addition_embed_type"),
    *("addition_time_embed_dim", "projection_class_embeddings_input_dim"),
)


@dataclass(frozen=True, eq=False)
class ControlNet(Control):
    """A ControlNet. The embedding of the image is left out of its module, because it runs once per request.

    Attributes:
        embedding: takes an image of 1 × 3 × height × width, and returns 1 × channels × height / 8 × width / 8.
    """

    kind = CONTROLNET

    embedding: Any = None

    def list_components(self) -> Mapping[str, Component]:
        """Return the embedding of the image, and the network of each step."""
        free = {
            "sample": SIDES,
            "encoder_hidden_states": (0, 1),
            "controlnet_cond": SIDES,
            "conditioning_scale": (0,),
            "control_type": (0,),
            "control_type_idx": (0,),
            "added_cond_kwargs": {"text_embeds": (0,), "time_ids": (0,)},
        }
        return {
            f"{self.component}_image": Component(self.embedding.forward, {"conditioning": (2, 3)}),
            self.component: Component(self.module.forward, free, is_batched=True),
        }

    def encode_image(self, functions: Mapping[str, Callable[..., Any]], image: Any, mode: str | None) -> Any:
        """Return the embedding of an image, and the number of its mode."""
        import numpy as np
        import torch

        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255).permute(2, 0, 1)[None]
        embedded = functions[f"{self.component}_image"](pixels.to(self.module.device, self.module.dtype))
        return embedded, UNION_MODES[mode or self.modes[0]] if self.modes else 0

    def compute_inputs(
        self, functions: Mapping[str, Callable[..., Any]], encoded: Any, scale: float, call: UNetCall
    ) -> Inputs:
        """Return the feature maps for a call of the UNet. The network multiplies them by the scale.

        Where a map is averaged over its places, as for shuffled images, the half without the prompt gets none.
        """
        import torch

        embedded, mode = encoded
        rows, config = len(call.sample), self.module.config
        conditions = embedded.expand(rows, -1, -1, -1)
        strength = embedded.new_full((rows, 1, 1, 1), scale)
        if config.global_pool_conditions:
            strength[: rows // 2] = 0
        given: dict[str, Any] = {"controlnet_cond": conditions, "conditioning_scale": strength}
        if self.modes:
            kinds = embedded.new_zeros(rows, config.num_control_type)
            kinds[:, mode] = 1
            index = torch.full((rows,), mode, device=embedded.device)
            given = {name: [each] for name, each in given.items()}
            given |= {"control_type": kinds, "control_type_idx": [index]}
        down, middle = functions[self.component](
            call.sample[:, : config.in_channels],
            call.timestep,
            encoder_hidden_states=call.options["encoder_hidden_states"],
            added_cond_kwargs=call.options.get("added_cond_kwargs"),
            return_dict=False,
            **given,
        )
        return {DOWN: list(down), MIDDLE: middle}

    def list_empty_inputs(self, unet: Any, sample: Any) -> Inputs:
        """Return a zero map for each connection between the UNet's down and up blocks, and for the middle."""
        *down, middle = [make_zeros(sample, *shape) for shape in list_connection_shapes(unet, *sample.shape[2:])]
        return {DOWN: down, MIDDLE: middle}


def list_connection_shapes(unet: Any, height: int, width: int) -> list[tuple[int, int, int]]:
    """Return channels, height and width of each connection of a UNet, and of its middle.

    Args:
        height, width: of the latents.
    """
    shapes = [(unet.conv_in.out_channels, height, width)]
    for block in unet.down_blocks:
        shapes += [(each.out_channels, height, width) for each in block.resnets]
        if block.downsamplers is not None:
            height, width = -(-height // 2), -(-width // 2)
            shapes.append((block.resnets[-1].out_channels, height, width))
    return [*shapes, (shapes[-1][0], height, width)]


def load_controlnet(
    opened: ControlFile, config: ControlConfig, pipeline: Any, family: Family, dtype: str
) -> ControlNet:
    """Load a ControlNet.

    Args:
        dtype: of its weights, by torch's name.

    Raises:
        ConfigError: the files are damaged or do not fit the model.
    """
    import diffusers
    import torch

    names = _name_tensors(opened.header, pipeline.unet.config["layers_per_block"])
    shapes = {name: opened.header.shapes[held] for name, held in names.items()}
    if "conv_in.weight" not in names:
        raise ConfigError(f"{opened.path} holds no ControlNet for {' or '.join(MODELS.values())}: it has no conv_in")
    is_xl = any(name.startswith("add_embedding.") for name in names)
    check_family(opened, "a ControlNet", is_xl=is_xl, wanted=family.is_xl)
    is_union = any(name.startswith("control_add_embedding.") for name in names)
    settings = opened.config or _read_config(shapes, pipeline.unet.config, is_union=is_union)
    module = build_module(opened, getattr(diffusers, UNION if is_union else PLAIN), settings)
    _check_fits(opened, module, pipeline)
    load_weights(opened, names, module, dtype)
    module.to(pipeline.unet.device)
    embedding, module.controlnet_cond_embedding = module.controlnet_cond_embedding, torch.nn.Identity()
    modes = [name for name, number in UNION_MODES.items() if is_union and number < module.config.num_control_type]
    return ControlNet(config, opened.sha256, module, tuple(modes), embedding)


def _name_tensors(header: Header, layers_per_block: int) -> dict[str, str]:
    """Return the names in the file by diffusers' names."""
    from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING, convert_controlnet_checkpoint

    if "time_embedding.linear_1.weight" in header.shapes:
        return {name: name for name in header.shapes}
    held = {name.removeprefix("control_model."): name for name in header.shapes}
    renamed = convert_controlnet_checkpoint(held, {"layers_per_block": layers_per_block})
    added = DIFFUSERS_TO_LDM_MAPPING["controlnet"]["addition_embed_type"]
    renamed |= {new: held.get(old) for new, old in added.items()}
    known = {name: old for name, old in renamed.items() if old is not None}
    return known | {old: old for old in held.values() if old not in known.values()}  # reported as unknown


def _read_config(
    shapes: Mapping[str, tuple[int, ...]], unet_config: Mapping[str, Any], *, is_union: bool
) -> dict[str, Any]:
    """Return a ControlNet's settings: those of the UNet that it copies, and what the shapes of its tensors show."""
    config = {name: value for name, value in unet_config.items() if not name.startswith("_")}
    config["in_channels"] = shapes.get("conv_in.weight", (0, 4))[1]
    transformer = r"\.attentions\.0\.transformer_blocks\.\d+\.norm1\.weight"
    depths = [_count(shapes, rf"down_blocks\.{i}{transformer}") for i in range(len(unet_config["down_block_types"]))]
    config["down_block_types"] = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    middle = _count(shapes, rf"mid_block{transformer}")
    config["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    config["transformer_layers_per_block"] = [*depths[:-1], middle or depths[-1]]  # the last is the middle's too
    parts = "controlnet_cond_embedding"
    channels = [shapes.get(f"{parts}.conv_in.weight", (16,))[0]]
    channels += [
        shapes[name][0] for index in range(1, len(shapes), 2) if (name := f"{parts}.blocks.{index}.weight") in shapes
    ]
    config["conditioning_embedding_out_channels"] = channels
    config["conditioning_channels"] = shapes.get(f"{parts}.conv_in.weight", (0, 3))[1]
    if is_union:
        config["num_control_type"], config["num_trans_channel"] = shapes.get("task_embedding", (len(UNION_MODES), 320))
        config["num_proj_channel"] = shapes.get("spatial_ch_projs.weight", (320,))[0]
        config["num_trans_layer"] = _count(shapes, r"transformer_layes\.(\d+)\.ln_1\.weight")
    return config


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


def _check_fits(opened: ControlFile, module: Any, pipeline: Any) -> None:
    """Refuse a ControlNet that takes other inputs than the UNet's, or makes other feature maps.

    Raises:
        ConfigError: names what differs.
    """
    unet, config = pipeline.unet, module.config
    taken = [channels for channels, _, _ in list_connection_shapes(unet, 64, 64)]
    made = [each.out_channels for each in (*module.controlnet_down_blocks, module.controlnet_mid_block)]
    side = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    pairs = {
        "the channels of feature maps": (taken, made),
        "the channels of latents": (pipeline.vae.config.latent_channels, config.in_channels),
        "the channels of images": (3, config.conditioning_channels),
        "the pixels along a cell of latents": (pipeline.vae_scale_factor, side),
        "controlnet_conditioning_channel_order": ("rgb", config.controlnet_conditioning_channel_order),
        **{name: (unet.config[name], config[name]) for name in SHARED_SETTINGS},
    }
    for name, (wanted, given) in pairs.items():
        if wanted != given:
            raise ConfigError(f"{opened.path} does not fit this model: {name} must be {wanted}, not {given}")
