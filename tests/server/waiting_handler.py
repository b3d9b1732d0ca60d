"""A handler whose images take time but little of a processor, for tests of what happens meanwhile."""

import dataclasses
import time
from typing import Any

from stable_diffusion_handler import StableDiffusionHandler

CALL_SECONDS = 0.03  # more for each call of the UNet


class WaitingHandler(StableDiffusionHandler):
    """Serve images, each slowly."""

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        loaded = self.service.loaded
        call = loaded.functions["unet"]

        def call_slowly(*args: Any, **options: Any) -> Any:
            time.sleep(CALL_SECONDS)
            return call(*args, **options)

        self.service.loaded = dataclasses.replace(loaded, functions={**loaded.functions, "unet": call_slowly})
