"""The upscaler: a super-resolution model such as ESRGAN, which spandrel reads. It enlarges finished images in tiles.

All tiles have one size, so the memory is bounded and one graph serves images of any size.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.convert.recognition import describe_content
from sdxl_server.convert.weights_files import CheckpointError, check_not_quantised
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.files import read_adapter_file
from sdxl_server.model.tiling import TileAxis, place_tiles
from sdxl_server.schemas import shorten

UPSCALER = "upscaler"  # the component
TOKENS = 77  # of a prompt
TILE_SIDE, OVERLAP = 256, 32  # pixels of the image before
INSTALL = "pip install --no-deps -r requirements-upscaler.txt"
TORCHVISION = "torchvision.transforms.functional"

Size = tuple[int, int]  # width, height


@dataclass(frozen=True, eq=False)
class Upscaler:
    """A loaded upscaler.

    Attributes:
        name: of its file.
        architecture: by spandrel's name.
        scale: of its results.
        sha256: the digest of its file.
        module: the model, from pixels to pixels: 1, 3, height, width, from 0 to 1.
    """

    name: str
    architecture: str
    scale: int
    sha256: str
    module: Any

    @property
    def title(self) -> str:
        """The name in A1111's API."""
        return Path(self.name).stem

    def describe(self) -> dict[str, Any]:
        """Return its entry in a report."""
        return {"name": self.name, "architecture": self.architecture, "scale": self.scale, "sha256": self.sha256}

    def list_passes(self, size: Size, factor: int) -> list[Size]:
        """Return the image's size before each pass. Passes follow until the factor is reached."""
        passes, reached = [], 1
        while reached < factor:
            passes.append((size[0] * reached, size[1] * reached))
            reached *= self.scale
        return passes

    def count_tiles(self, size: Size, factor: int) -> int:
        """Return the tiles of all passes over an image."""
        passes = [plan_upscaling_tiles(each) for each in self.list_passes(size, factor)]
        return sum(len(down.starts) * len(across.starts) for down, across in passes)


def plan_upscaling_tiles(size: Size) -> tuple[TileAxis, TileAxis]:
    """Return the tiles down and across of an image, which is padded if a tile is larger."""
    width, height = (place_tiles(max(side, TILE_SIDE), TILE_SIDE, OVERLAP) for side in size)
    return height, width


def load_upscaler(pipeline: Any, config: HandlerConfig, dtype: str, *, model_dir: Path) -> Upscaler | None:
    """Return the configured upscaler.

    Args:
        dtype: of its weights, by torch's name. A model that overflows in it gets float32.
        model_dir: where a relative path is looked up.

    Raises:
        ConfigError: spandrel is missing, or the file is damaged or holds something else.
    """
    import torch

    if config.upscaler_path is None:
        return None
    spandrel, path = import_spandrel(), model_dir / config.upscaler_path
    try:
        digest, header = read_adapter_file(path)
        check_not_quantised(header)
        tensors = header.load_tensors(header.shapes, torch.float32)
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ConfigError(f"{path} holds numbers that are not finite: {name}")
        try:
            loaded = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(tensors))
        except spandrel.UnsupportedModelError as error:
            content = describe_content(header)
            raise ConfigError(f"{path} holds {content}; an upscaler is a model such as ESRGAN or SPAN") from error
        except Exception as error:  # each architecture raises its own
            raise ConfigError(f"{path} is damaged, or of an unknown kind: {shorten(str(error), length=200)}") from error
        _check_kind(path, loaded)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"handler.upscaler_path: {error}") from error
    fits = {"float16": loaded.supports_half, "bfloat16": loaded.supports_bfloat16}.get(dtype, True)
    module = _merge_branches(loaded.model).to(pipeline.unet.device, getattr(torch, dtype if fits else "float32"))
    return Upscaler(path.name, loaded.architecture.name, loaded.scale, digest, module.eval().requires_grad_(False))


def _merge_branches(module: Any) -> Any:
    """Replace SPAN's convolutions of several branches by their sums, which SPAN itself would compute at each call."""
    from torch import nn

    for name, child in module.named_children():
        if hasattr(child, "update_params"):
            child.update_params()
            relu = [nn.LeakyReLU(0.05)] if child.has_relu else []
            setattr(module, name, nn.Sequential(child.eval_conv, *relu))
        else:
            _merge_branches(child)
    return module


def import_spandrel() -> Any:
    """Import spandrel without torchvision, which two of its architectures import. No upscaler uses it.

    PyPI's torchvision is built for CUDA. Next to torch for CPUs it breaks the import of transformers.

    Raises:
        ConfigError: it is not installed.
    """
    parts = TORCHVISION.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    missing = {name: ModuleType(name) for name in names if name not in sys.modules}
    if TORCHVISION in missing:
        vars(missing[TORCHVISION]).update(dict.fromkeys(("InterpolationMode", "normalize", "rotate")))
    sys.modules |= missing
    try:
        return importlib.import_module("spandrel")
    except ImportError as error:
        raise ConfigError(f"handler.upscaler_path needs spandrel: {INSTALL} ({error})") from error
    finally:
        for name in missing:
            del sys.modules[name]


def _check_kind(path: Path, loaded: Any) -> None:
    """Refuse a model that does not enlarge images of three colours in tiles.

    Raises:
        ConfigError: says what it does.
    """
    made = f"{path} holds {loaded.architecture.name}"
    if loaded.purpose != "SR" or loaded.scale < 2:
        raise ConfigError(
            f"{made}, which does not enlarge images ({loaded.purpose}); an upscaler is one such as ESRGAN"
        )
    if (loaded.input_channels, loaded.output_channels) != (3, 3):
        channels = f"{loaded.input_channels} channels to {loaded.output_channels}"
        raise ConfigError(f"{made} from {channels}; an upscaler takes and makes three, red, green and blue")
    if not loaded.size_requirements.check(TILE_SIDE, TILE_SIDE):
        raise ConfigError(f"{made}, which cannot take tiles of {TILE_SIDE}x{TILE_SIDE} pixels")


def compute_tile_work(upscaler: Upscaler, pipeline: Any, size: Size, *, batch: int) -> float:
    """Return the work on a tile, in UNet calls × megapixels, by the number of operations.

    Each weight of the upscaler counts as two operations for each pixel, as in convolutions.

    Args:
        size: of a default image.
        batch: rows of its UNet calls.
    """
    weights = sum(each.numel() for each in upscaler.module.parameters())
    height, width = (side // pipeline.vae_scale_factor for side in reversed(size))
    call = _count_operations(pipeline.unet, (batch, pipeline.unet.config.in_channels, height, width))
    return 2 * weights * TILE_SIDE**2 / call * size[0] * size[1] / 1e6


def _count_operations(unet: Any, shape: tuple[int, ...]) -> int:
    """Return the floating-point operations of a UNet call, by shape inference on the meta device.

    Args:
        shape: of the latents.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    config, rows = unet.config, shape[0]
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs: dict[str, Any] = {
            "sample": torch.empty(shape, dtype=unet.dtype),
            "timestep": torch.empty(rows),
            "encoder_hidden_states": torch.empty(rows, TOKENS, config.cross_attention_dim, dtype=unet.dtype),
        }
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            text, times = torch.empty(rows, width, dtype=unet.dtype), torch.empty(rows, 6)
            inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": times}
        if config.time_cond_proj_dim is not None:
            inputs["timestep_cond"] = torch.empty(rows, config.time_cond_proj_dim, dtype=unet.dtype)
        weights = {name: each.to("meta") for name, each in (*unet.named_parameters(), *unet.named_buffers())}
        torch.func.functional_call(unet, weights, kwargs=inputs)
    operations: int = counter.get_total_flops()
    return operations
