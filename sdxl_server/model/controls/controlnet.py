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
from sdxl_server.model.controls.files import ControlFile, build_module, check_family, load_weights
from sdxl_server.model.families import Family

PLAIN, UNION = "ControlNetModel", "ControlNetUnionModel"
CLASSES = (PLAIN, UNION)  # diffusers'
DOWN, MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"  # the UNet's arguments
SIDES = (0, 2, 3)  # the axes of rows, height and width
# The kinds of images of a union ControlNet, in the order of its inputs. Smaller models end earlier.
UNION_MODES = ("openpose", "depth", "scribble", "canny", "normal", "segment", "tile", "repaint")


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
            "control_type": (0,),
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
        return embedded, self.modes.index(mode) if mode else 0

    def compute_inputs(
        self, functions: Mapping[str, Callable[..., Any]], encoded: Any, scale: float, call: UNetCall
    ) -> Inputs:
        """Return the feature maps for a call of the UNet. The network multiplies them by the scale."""
        import torch

        embedded, mode = encoded
        rows, config = len(call.sample), self.module.config
        conditions = embedded.expand(rows, -1, -1, -1)
        strength = torch.tensor(scale, dtype=embedded.dtype, device=embedded.device)
        given: dict[str, Any] = {"controlnet_cond": conditions, "conditioning_scale": strength}
        if self.modes:
            kinds = embedded.new_zeros(rows, config.num_control_type)
            kinds[:, mode] = 1
            index = torch.tensor([mode], device=embedded.device)
            given = {"controlnet_cond": [conditions], "conditioning_scale": [strength]}
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
    is_xl = any(name.startswith("add_embedding.") for name in names)
    check_family(opened, "a ControlNet", is_xl=is_xl, wanted=family.is_xl)
    is_union = any(name.startswith("control_add_embedding.") for name in names)
    settings = opened.config or _read_config(shapes, pipeline.unet.config, is_union=is_union)
    module = build_module(opened, getattr(diffusers, UNION if is_union else PLAIN), settings)
    if module.config.controlnet_conditioning_channel_order != "rgb":
        raise ConfigError(f"{opened.path} takes images in the channel order bgr; ControlNets for rgb are served")
    _check_fits(opened, module, pipeline.unet)
    load_weights(opened, names, module, dtype)
    module.to(pipeline.unet.device)
    embedding, module.controlnet_cond_embedding = module.controlnet_cond_embedding, torch.nn.Identity()
    modes = UNION_MODES[: module.config.num_control_type] if is_union else ()
    return ControlNet(config, opened.sha256, module, modes, embedding)


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
    blocks, layers = [], []
    for index, layer in enumerate(
        _spread(unet_config["transformer_layers_per_block"], unet_config["down_block_types"])
    ):
        depth = _count(shapes, rf"down_blocks\.{index}\.attentions\.0\.transformer_blocks\.(\d+)\.norm1\.weight")
        blocks.append("CrossAttnDownBlock2D" if depth else "DownBlock2D")
        layers.append(depth or layer)
    config |= {"down_block_types": blocks, "transformer_layers_per_block": layers}
    if not any(name.startswith("mid_block.attentions.") for name in shapes):
        config["mid_block_type"] = "UNetMidBlock2D"
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


def _spread(value: Any, over: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * len(over)


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)


def _check_fits(opened: ControlFile, module: Any, unet: Any) -> None:
    """Refuse a ControlNet whose feature maps do not fit the UNet.

    Raises:
        ConfigError: names the channels.
    """
    made = [each.out_channels for each in (*module.controlnet_down_blocks, module.controlnet_mid_block)]
    taken = [channels for channels, _, _ in list_connection_shapes(unet, 64, 64)]
    if made != taken:
        shown = [", ".join(map(str, each)) for each in (taken, made)]
        raise ConfigError(
            f"{opened.path} does not fit this model: its UNet takes feature maps of {shown[0]} channels, and the "
            f"ControlNet makes {shown[1]}"
        )
