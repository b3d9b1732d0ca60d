"""A handler whose decoder takes long for images of one width."""

import dataclasses
import time
from typing import Any

from stable_diffusion_handler import StableDiffusionHandler

SLOW_WIDTH = 192  # pixels
DECODE_SECONDS = 9.0


class SlowHandler(StableDiffusionHandler):
    """Serve images, some slowly."""

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        loaded = self.service.loaded
        decode = loaded.functions["vae"]

        def decode_slowly(latents: Any, **options: Any) -> Any:
            if latents.shape[-1] == SLOW_WIDTH // loaded.pipeline.vae_scale_factor:
                time.sleep(DECODE_SECONDS)
            return decode(latents, **options)

        self.service.loaded = dataclasses.replace(loaded, functions={**loaded.functions, "vae": decode_slowly})
