"""T2I-Adapter: a small network that runs once per image. The UNet's down blocks add its feature maps.

Read are diffusers' folders, and files in diffusers' or TencentARC's naming.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_server.convert.recognition import describe_content
from sdxl_server.convert.weights_files import CheckpointError, Header, check_not_quantised
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.files import read_adapter_file
from sdxl_server.model.families import Family
from sdxl_server.model.folders import FP16_MARK, check_component, check_links, is_weights, load_json_object
from sdxl_server.schemas import shorten

CLASS = "T2IAdapter"  # diffusers'
FULL, FULL_XL, LIGHT = "full_adapter", "full_adapter_xl", "light_adapter"
MODELS = {True: "Stable Diffusion XL", False: "Stable Diffusion 1.x or 2.x"}  # by Family.is_xl
BLOCK = re.compile(r"^(adapter\.)?body\.\d+\.")
# Input channels of the first layer, after pixels became channels: the image's channels, and the pixels of a side.
FIRST_LAYER = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}
CELLS = 32  # along a side of the image that checks the shapes


def load_t2i_adapter(path: Path, pipeline: Any, family: Family, dtype: str) -> tuple[Any, str, int]:
    """Return a T2I-Adapter, the SHA-256 of its file, and the number of its feature maps.

    Its `unshuffle`, which makes channels of pixels, is left out: see `prepare_image`.

    Args:
        dtype: of its weights, by torch's name.

    Raises:
        ConfigError: the files hold something else, are damaged or do not fit the model.
    """
    import diffusers
    import torch

    file, config = _find_file(path)
    digest, header = _open(file)
    stored = _name_tensors(header)
    config = config or _read_config(header.path, {name: header.shapes[held] for name, held in stored.items()})
    try:
        with torch.device("meta"):
            module = diffusers.T2IAdapter.from_config(config)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}/config.json does not describe a {CLASS}: {error}") from error
    kind, is_xl = module.config.adapter_type, module.config.adapter_type == FULL_XL
    if is_xl is not family.is_xl:
        raise ConfigError(
            f"{path} holds a T2I-Adapter for {MODELS[is_xl]} ({kind}), and this model is {MODELS[family.is_xl]}"
        )
    _check_tensors(header, stored, module)
    count = _check_fits(path, module, pipeline)
    own_dtype = getattr(torch, dtype)
    tensors = {}
    loaded = header.load_tensors(stored.values(), torch.float32)
    for name, held in stored.items():
        tensors[name] = loaded[held].to(own_dtype)
        if not torch.isfinite(tensors[name]).all():
            raise ConfigError(f"{header.path} holds numbers that are not finite in {dtype}: {held}")
    module.load_state_dict(tensors, assign=True)
    module.adapter.unshuffle = torch.nn.Identity()
    return module.eval().requires_grad_(False).to(pipeline.unet.device), digest, count


def _find_file(path: Path) -> tuple[Path, Mapping[str, Any] | None]:
    """Return the weights file of a control, and the settings in its folder; None for a single file.

    Raises:
        ConfigError: the folder holds another model, or is incomplete.
    """
    check_links([path])
    if not path.is_dir():
        return path, None
    config = load_json_object(path / "config.json")
    held = config.get("_class_name")
    if held is None:
        raise ConfigError(f"{path} has no readable config.json of a {CLASS}; name a folder with one, or a file")
    if held != CLASS:
        kind = (
            f"a ControlNet ({shorten(held)}), which is not served yet" if "ControlNet" in str(held) else shorten(held)
        )
        raise ConfigError(f"{path} holds {kind}; a control is a {CLASS}")
    command = ["hf", "download", "<its id on the hub>", "--local-dir", f"{path}-whole"]
    check_component(path, remedy=shlex.join(command))
    files = [each for each in sorted(path.glob("*.safetensors")) if is_weights(each.name)]
    if not files:
        raise ConfigError(f"{path} has no weights of a {CLASS}, such as diffusion_pytorch_model.safetensors")
    return min(files, key=lambda each: FP16_MARK in each.name), config


def _open(path: Path) -> tuple[str, Header]:
    """Return the SHA-256 and the header of a control's file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    digest, header = read_adapter_file(path)
    try:
        check_not_quantised(header)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if not any(BLOCK.match(name) for name in header.shapes):
        content = describe_content(header)
        is_later = content in ("a ControlNet", "an IP-Adapter")
        raise ConfigError(f"{path} holds {content}{', which is not served yet' * is_later}; a control is a T2I-Adapter")
    return digest, header


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


def _check_tensors(header: Header, stored: Mapping[str, str], module: Any) -> None:
    """Refuse a file that lacks a tensor, or has another one or another shape.

    Raises:
        ConfigError: names the tensor.
    """
    expected = {name: tuple(each.shape) for name, each in module.state_dict().items()}
    if missing := sorted(expected.keys() - stored.keys()):
        raise ConfigError(f"{header.path} lacks {len(missing)} tensors of its {CLASS}, such as {missing[0]}")
    for name, held in stored.items():
        if name not in expected:
            raise ConfigError(f"{header.path} holds a tensor that is not of a {CLASS}: {held}")
        if header.shapes[held] != expected[name]:
            shapes = ["×".join(map(str, each)) for each in (expected[name], header.shapes[held])]
            raise ConfigError(f"{header.path} takes {shapes[0]} numbers for {held}, not {shapes[1]}")


def _check_fits(path: Path, module: Any, pipeline: Any) -> int:
    """Refuse an adapter whose feature maps do not fit the UNet, and return their number.

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
    return len(made)


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
