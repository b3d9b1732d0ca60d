"""T2I-Adapter: a small network that runs once per image. The UNet's down blocks add its feature maps.

Read are diffusers' folders, and files in diffusers' or TencentARC's naming.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdxl_server.config.control_settings import T2I_ADAPTER, ControlConfig
from sdxl_server.convert.weights_files import Header
from sdxl_server.errors import ConfigError
from sdxl_server.model.controls.base import Component, Control, Inputs, UNetCall, make_zeros
from sdxl_server.model.controls.files import ControlFile, build_module, check_family, load_weights
from sdxl_server.model.families import Family

CLASSES = ("T2IAdapter",)  # diffusers'
RESIDUALS = "down_intrablock_additional_residuals"  # the UNet's argument
FULL, FULL_XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
# Input channels of the first layer, after pixels became channels: the image's channels, and the pixels of a side.
FIRST_LAYER = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}
CELLS = 32  # along a side of the image that checks the shapes


class T2IAdapter(Control):
    """A T2I-Adapter. Its module has no `unshuffle`, which makes channels of pixels: see `prepare_image`."""

    kind = T2I_ADAPTER

    def list_components(self) -> Mapping[str, Component]:
        """Return the network."""
        return {self.component: Component(self.module.forward, {"x": (2, 3)})}

    def encode_image(self, functions: Mapping[str, Callable[..., Any]], image: Any, mode: str | None) -> Any:
        """Return the feature maps of an image."""
        return list(functions[self.component](prepare_image(self.module, image)))

    def compute_inputs(
        self, functions: Mapping[str, Callable[..., Any]], encoded: Any, scale: float, call: UNetCall
    ) -> Inputs:
        """Return the feature maps times the scale."""
        return {RESIDUALS: [scale * each for each in encoded]}

    def list_empty_inputs(self, unet: Any, sample: Any) -> Inputs:
        """Return a zero map for each down block and for the middle."""
        return {RESIDUALS: [make_zeros(sample, *shape) for shape in list_residual_shapes(unet, *sample.shape[2:])]}


def load_t2i_adapter(
    opened: ControlFile, config: ControlConfig, pipeline: Any, family: Family, dtype: str
) -> T2IAdapter:
    """Load a T2I-Adapter.

    Args:
        dtype: of its weights, by torch's name.

    Raises:
        ConfigError: the files are damaged or do not fit the model.
    """
    import diffusers
    import torch

    names = _name_tensors(opened.header)
    shapes = {name: opened.header.shapes[held] for name, held in names.items()}
    module = build_module(opened, diffusers.T2IAdapter, opened.config or _read_config(opened.header.path, shapes))
    kind = module.config.adapter_type
    check_family(opened, f"a T2I-Adapter ({kind})", is_xl=kind == FULL_XL, wanted=family.is_xl)
    _check_fits(opened.path, module, pipeline)
    load_weights(opened, names, module, dtype)
    module.adapter.unshuffle = torch.nn.Identity()
    return T2IAdapter(config, opened.sha256, module.to(pipeline.unet.device))


def _name_tensors(header: Header) -> dict[str, str]:
    """Return the names in the file by diffusers' names. TencentARC counts the layers of all blocks, two in each."""
    is_flat = any(re.match(r"(adapter\.)?body\.\d+\.block1\.", name) for name in header.shapes)
    names = {}
    for held in header.shapes:
        name = held.removeprefix("adapter.")
        name = re.sub(r"^(body\.\d+\.)body\.", r"\1resnets.", name)
        if is_flat and (found := re.match(r"body\.(\d+)\.(block[12]\..*|in_conv\..*)", name)):
            number, layer = int(found[1]), found[2]
            resnet = f"resnets.{number % 2}." if layer.startswith("block") else ""
            name = f"body.{number // 2}.{resnet}{layer}"
        names[f"adapter.{name}"] = held
    return names


def _read_config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return an adapter's settings from the shapes of its tensors.

    Raises:
        ConfigError: a tensor that shows them is missing, or unknown.
    """
    is_light = "adapter.body.0.out_conv.weight" in shapes
    first = "adapter.body.0.in_conv.weight" if is_light else "adapter.conv_in.weight"
    last = "out_conv" if is_light else "resnets.0.block2"
    channels: list[int] = []
    inputs = (shapes.get(first) or (0, 0))[1]
    while found := shapes.get(f"adapter.body.{len(channels)}.{last}.weight"):
        channels.append(found[0])
    if inputs not in FIRST_LAYER or not channels:
        known = ", ".join(map(str, FIRST_LAYER))
        raise ConfigError(f"{path} holds no T2I-Adapter: {first} takes one of {known} channels, not {inputs}")
    in_channels, factor = FIRST_LAYER[inputs]
    count = sum(re.fullmatch(r"adapter\.body\.0\.resnets\.\d+\.block1\.weight", name) is not None for name in shapes)
    return {
        "in_channels": in_channels,
        "channels": channels[:-1] if is_light else channels,  # its last two blocks have one number
        "num_res_blocks": count,
        "downscale_factor": factor,
        "adapter_type": LIGHT if is_light else FULL if factor == 8 else FULL_XL,
    }


def _check_fits(path: Path, module: Any, pipeline: Any) -> None:
    """Refuse an adapter without weights whose feature maps do not fit the UNet.

    Raises:
        ConfigError: names the maps.
    """
    import torch

    side = CELLS * module.config.downscale_factor
    made = [
        tuple(each.shape[1:]) for each in module(torch.empty(1, module.config.in_channels, side, side, device="meta"))
    ]
    cells = side // pipeline.vae_scale_factor
    taken = list_residual_shapes(pipeline.unet, cells, cells)
    if made != taken[: len(made)]:
        shown = [", ".join("×".join(map(str, each)) for each in shapes) for shapes in (taken, made)]
        raise ConfigError(
            f"{path} does not fit this model: for {side}x{side} pixels its UNet takes feature maps of {shown[0]}, and "
            f"the adapter makes {shown[1]}"
        )


def list_residual_shapes(unet: Any, height: int, width: int) -> list[tuple[int, int, int]]:
    """Return channels, height and width of the feature maps that a UNet takes, for its down blocks and its middle.

    A block with attention adds its map before it halves the size, others after it.

    Args:
        height, width: of the latents.
    """
    shapes = []
    for block in unet.down_blocks:
        halved = (height, width) if block.downsamplers is None else (-(-height // 2), -(-width // 2))
        is_before = getattr(block, "has_cross_attention", False)
        shapes.append((block.resnets[-1].out_channels, *((height, width) if is_before else halved)))
        height, width = halved
    return [*shapes, (shapes[-1][0], height, width)]


def prepare_image(module: Any, image: Any) -> Any:
    """Return the adapter's input for a Pillow image: channels from 0 to 1, with the pixels of a square in one cell.

    Sides that the square does not divide get copies of their last pixels, as the UNet rounds up.
    """
    import numpy as np
    import torch

    config = module.config
    pixels = np.atleast_3d(np.asarray(image.convert("L" if config.in_channels == 1 else "RGB")))
    tensor = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
    factor = config.downscale_factor
    right, bottom = -image.width % factor, -image.height % factor
    tensor = torch.nn.functional.pad(tensor, (0, right, 0, bottom), mode="replicate")
    return torch.nn.functional.pixel_unshuffle(tensor, factor).to(module.device, module.dtype)
