"""A handler with the faults that the key `planted` of model-config.yaml names: what the scorecard must find."""

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from stable_diffusion_handler import StableDiffusionHandler


class PlantedHandler(StableDiffusionHandler):
    """Serve pictures, but for the faults."""

    def initialize(self, context: Any) -> None:
        self.planted = context.model_yaml_config["planted"]
        self.leaked: list[bytes] = []
        self.served = 0
        starts = Path("starts.txt")  # in the archive's folder
        with starts.open("a") as file:
            file.write("x")
        if "slow recovery" in self.planted and starts.stat().st_size > 3:  # the first, and two loads without requests
            time.sleep(8)
        try:
            super().initialize(context)
        except ValueError:
            if "starts without a model" not in self.planted:
                raise

    def serve(self, index: int, row: dict[str, Any]) -> Generator[bytes, None, bytes]:
        self.served += 1
        if "leak" in self.planted:
            self.leaked.append(b"x" * 10_000_000)
        if "server error" in self.planted:
            raise ZeroDivisionError("planted")
        if "hang" in self.planted and self.served == 5:
            time.sleep(8)
        while "drip" in self.planted and self.served == 5:
            time.sleep(0.5)
            yield b"."
        return (yield from super().serve(index, row))

    def postprocess(self, request: Any, images: list[Any], *rest: Any, **options: Any) -> bytes:
        if "wrong size" in self.planted and self.served % 5 == 4:
            images = [image.resize((64, 64)) for image in images]
        return super().postprocess(request, images, *rest, **options)
