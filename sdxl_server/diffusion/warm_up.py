"""The warm-up: compile every graph before the first request, and fit the previews."""

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from sdxl_server import metrics
from sdxl_server.config.settings import MIN_SIDE
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.diffusion.previews import fit_preview
from sdxl_server.diffusion.upscaling import upscale
from sdxl_server.errors import ConfigError, FlaggedError, NotFiniteError, RequestError
from sdxl_server.model.compiling import VAE_ENCODER
from sdxl_server.model.describe import count_component_graphs, describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.upscaler import UPSCALER
from sdxl_server.request.controls import RequestControl
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.upscaling import FACTORS

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 2  # Inductor may compile again at the second
_SIDE = 128  # pixels, for a graph of any size; a smaller image is a single pixel deep in the UNet


def warm_up(loaded: LoadedPipeline) -> None:
    """Generate an image for each graph, which compiles every component. Then fit the previews.

    The first request with an image compiles the VAE's encoder. Models that need an image compile it here.

    Raises:
        ConfigError: a component was not compiled, or an image is not finite.
    """
    from openvino_backend import compile_ahead

    kinds: list[dict[str, Any]] = [{"guidance_interval": [0, 1]}]
    # An OpenVINO graph is for one batch size or for any, so guidance needs no graph of its own.
    if loaded.graphs is None and loaded.compilation.backend is not None and loaded.config.guidance_interval is not None:
        kinds.append({"guidance_scale": 1.0})
    for (width, height), kind in itertools.product(choose_sizes(loaded), kinds):
        request = _choose_warm_up(loaded, {"prompt": "warm-up", "width": width, "height": height, **kind})
        if loaded.compilation.backend == "openvino":
            with compile_ahead(), metrics.leave_out_calls():
                _draw(loaded, request)
        with _blame_numbers(loaded):
            _draw(loaded, request)
    if loaded.config.preview == "fast":
        with _blame_numbers(loaded):
            logger.info("Fast previews: %.1f levels of 255 from what the VAE decodes", fit_preview(loaded).error)
    warm = [name for name in loaded.parts if name != VAE_ENCODER or loaded.family.needs]
    idle = [name for name in warm if not count_component_graphs(loaded, name)]
    report = describe_pipeline(loaded)
    if idle:
        raise ConfigError(f"pt2.backend: {report['backend']} did not compile {', '.join(idle)}: {report}")
    if report["graph_breaks"]:
        logger.warning("Eager PyTorch runs a part of the model, at %d graph breaks", report["graph_breaks"])


def _draw(loaded: LoadedPipeline, request: GenerationRequest) -> None:
    """Generate an image for nobody, with all controls, and run the upscaler.

    The image may be flagged: the safety checker is the last component to run.
    """
    image = Image.new("RGB", (request.width, request.height))
    controls = tuple(RequestControl(each.config.name, image, scale=1.0) for each in loaded.controls)
    request = dataclasses.replace(request, control=controls or None)
    with contextlib.suppress(FlaggedError):
        run_to_end(generate(loaded, request))
    if loaded.upscaler is not None:
        image = Image.new("RGB", (MIN_SIDE, MIN_SIDE))
        *_, _ = upscale(loaded.upscaler, loaded.functions[UPSCALER], image, FACTORS[0])


@contextlib.contextmanager
def _blame_numbers(loaded: LoadedPipeline) -> Iterator[None]:
    """Turn NotFiniteError in a block into a ConfigError."""
    try:
        yield
    except NotFiniteError as error:
        raise ConfigError(
            f"handler.dtype: {loaded.config.dtype}: at the warm-up {error}. The weights in "
            f"{loaded.config.model_path} are damaged, or they overflow in {loaded.dtype} and need dtype: float32"
        ) from error


def choose_sizes(loaded: LoadedPipeline) -> list[tuple[int, int]]:
    """Return the width and height of an image for each graph. A graph for any size gets the smallest image.

    The first image of another size then takes half a second longer than the next one.
    """
    configured, allowed = loaded.contract.size, sorted(loaded.contract.limits.allowed_sizes, key=math.prod)
    if loaded.graphs not in ("dynamic", "both"):
        return allowed or [configured]
    # At most one VAE tile. With "both" the shape differs from a tile, because tiles have their own graph.
    side = min(_SIDE, loaded.config.max_side // 8 * 8, loaded.config.vae_tile_side or _SIDE)
    if loaded.graphs == "dynamic":
        return allowed[:1] or [(side, side)]
    less = max(side - 8, MIN_SIDE)
    return [configured, *[each for each in allowed or [(side, less), (less, side)] if each != configured][:1]]


def _choose_warm_up(loaded: LoadedPipeline, fields: Mapping[str, Any]) -> GenerationRequest:
    """Return the request with the fewest steps that compile everything and that the scheduler can make."""
    most = loaded.contract.properties["num_inference_steps"]["default"]
    steps = 1 if loaded.compilation.backend == "openvino" else min(WARM_UP_STEPS, most)
    while True:
        try:
            return loaded.contract.check_sample({**fields, "num_inference_steps": steps})
        except RequestError:
            if steps >= most:
                raise
            steps += 1
