"""A handler with the faults that the key `planted` of model-config.yaml names: what the scorecard must find."""

import io
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

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

    def read_request(self, index: int, body: dict[str, Any]) -> Any:
        response = super().read_request(index, body)
        response.steps = self.spoil(response.steps)
        return response

    def write_error(self, error: Exception, index: int) -> bytes:
        told = super().write_error(error, index)
        return told.replace(b'"param": "', b'"param": "' + b"x" * 20_000) if "long echo" in self.planted else told

    def spoil(self, steps: Generator[bytes | None, None, bytes]) -> Generator[bytes | None, None, bytes]:
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
        body = yield from steps
        if self.served % 5 != 4 or not {"wrong size", "other pixels"} & set(self.planted):
            return body
        file, image = io.BytesIO(), Image.open(io.BytesIO(body))
        changed = image.resize((64, 64)) if "wrong size" in self.planted else ImageOps.invert(image)
        changed.save(file, "JPEG")
        return file.getvalue()
