"""The limits of requests, from the configuration and from the model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.request.adapters import RegisteredAdapter
from sdxl_server.request.controls import RegisteredControl
from sdxl_server.request.samplers import Samplers
from sdxl_server.request.upscaling import RegisteredUpscaler


@dataclass(frozen=True)
class Limits:
    """The limits of requests.

    Attributes:
        config: the settings, which contain most limits.
        own_side: side of the model's own square, in pixels. An uploaded image is resized to about its area.
        multiple: the sides of such an image are multiples of this, in pixels.
        allowed_sizes: the only sizes (width, height), in pixels. Empty: any size.
        samplers: diffusers' schedulers that sample this model correctly, each with its options.
        max_clip_skip: the layers of the smaller text encoder, less one.
        adapters: the adapters that requests can name.
        is_xl: the model is Stable Diffusion XL, and not 1.x or 2.x.
        controls: the controls that requests can name.
        upscaler: the one that requests can use.
    """

    config: HandlerConfig = HandlerConfig()
    own_side: int = 1024
    multiple: int = 32
    allowed_sizes: tuple[tuple[int, int], ...] = ()
    samplers: Samplers = dataclasses.field(default_factory=dict)
    max_clip_skip: int = 11
    adapters: Mapping[str, RegisteredAdapter] = dataclasses.field(default_factory=dict)
    is_xl: bool = True
    controls: Mapping[str, RegisteredControl] = dataclasses.field(default_factory=dict)
    upscaler: RegisteredUpscaler | None = None
