"""Generate the images of a request, step by step."""

import contextlib
import contextvars
import inspect
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from sdxl_server.diffusion.controls import bind_controls
from sdxl_server.diffusion.denoiser import Denoiser, name_failed_step
from sdxl_server.diffusion.prompt_embedding import choose_chunks, embed_prompts
from sdxl_server.diffusion.safety import check_safety
from sdxl_server.diffusion.stand_ins import Functions, TextEncoderStandIn, build_vae, check_finite
from sdxl_server.errors import RequestError
from sdxl_server.model.adapters.registry import build_low_rank_matrices
from sdxl_server.model.embeddings import expand_prompts
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.safety_checker import SAFETY_CHECKER
from sdxl_server.request.fields import DECLARATIONS, GenerationRequest
from sdxl_server.request.masks import cover_cells, keep_protected, prepare_drawing
from sdxl_server.request.prompts import PROMPTS
from sdxl_server.sampling.schedulers import build_request_scheduler, read_schedule
from sdxl_server.sampling.step_plan import build_step_plan


class SkippedImage(Exception):
    """Thrown into the generator of `generate`: the image under way is left out, and the next one begins."""


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image.

    Attributes:
        image: a Pillow image.
        unet_calls: the UNet calls made for it, in whole calls. Outside a guidance interval one may count half.
        calls_of_all: the UNet calls of the full schedule.
    """

    image: Any
    unet_calls: float
    calls_of_all: int


@dataclass(frozen=True)
class Progress:
    """Where a request stands after a denoising step.

    Attributes:
        done, total: steps of the request. A step is a UNet call, made or extrapolated.
        index: the current image, from 0.
        step, steps: of this image.
        denoiser: of this image.
        share: the part of the request's UNet calls that is made; extrapolated calls do not count. Above 0.
        image: the finished image, after its last step.
    """

    done: int
    total: int
    index: int
    step: int
    steps: int
    denoiser: Denoiser
    share: float
    image: GeneratedImage | None = None


def generate(loaded: LoadedPipeline, request: GenerationRequest) -> Generator[Progress, None, list[GeneratedImage]]:
    """Generate the images of a request, and yield after each denoising step. The last step includes the decoding.

    Several requests can be in progress at a time, in one thread. Each has its own pipeline around the same compiled
    components. An image depends on its own seed only, because it is generated alone. Closing the generator stops the
    work.

    Raises:
        RequestError: this size would need one compiled graph too many.
        FlaggedError: the safety checker flagged an image.
        NotFiniteError: the model returned NaN or infinity; names the step and the seed.
    """
    # Large matrices and control images: once for all images, and dropped with this generator.
    functions = bind_controls(loaded, request, bind_adapters(loaded, request))
    request = expand_prompts(request, loaded.embeddings)
    images = []
    for index in range(request.num_images_per_prompt):
        with contextlib.suppress(SkippedImage):
            images.append((yield from _generate_image(loaded, request, index, functions)))
    return images


def _generate_image(
    loaded: LoadedPipeline, request: GenerationRequest, index: int, functions: Functions
) -> Generator[Progress, None, GeneratedImage]:
    """Run a diffusers pipeline in a greenlet. Its callback leaves the greenlet after each step but the last."""
    import torch
    from greenlet import greenlet

    is_grad_enabled = torch.is_grad_enabled()

    def measure(step: int, image: GeneratedImage | None = None) -> Progress:
        steps, count = pipeline.num_timesteps, request.num_images_per_prompt
        share = (index + unet.calls / unet.plan.total) / count
        return Progress(index * steps + step, count * steps, index, step, steps, unet, share, image)

    def report_step(_: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        check_finite(tensors["latents"], "the scheduler's result")
        if step + 1 < pipeline.num_timesteps:
            # Each pipeline switches gradients off at its start and back at its end. Another pipeline runs meanwhile.
            with torch.set_grad_enabled(is_grad_enabled):
                work.parent.switch(measure(step + 1))
        return tensors

    pipeline = build_image_pipeline(loaded, request, functions)
    unet: Denoiser = pipeline.unet
    arguments = list_pipeline_arguments(pipeline, request, index)
    chunks = choose_chunks(loaded)
    if chunks and (embedded := embed_prompts(pipeline, request, loaded.family, chunks=chunks)):
        arguments = {name: value for name, value in arguments.items() if name not in PROMPTS} | embedded
    work = greenlet(lambda: pipeline(callback_on_step_end=report_step, **arguments).images[0])
    work.gr_context = contextvars.copy_context()  # a greenlet begins with an empty one
    try:
        with name_failed_step(request, index, unet):
            result = work.switch()
            while not work.dead:
                yield result
                result = work.switch()
    except Exception as error:
        if _is_graph_limit(error):
            raise RequestError(
                f"{request.width}x{request.height} needs one more graph than this server may compile; request a size "
                "that it has generated before, or ask the operator to change allowed_sizes and max_graphs"
            ) from error
        raise
    finally:
        if not work.dead:
            work.throw()
    finished = keep_protected(result, request)
    check_safety(loaded, finished, seed=request.get_seed(index))
    image = GeneratedImage(finished, unet.calls, len(unet.plan.costs))
    yield measure(pipeline.num_timesteps, image)
    return image


def _is_graph_limit(error: BaseException) -> bool:
    import torch

    from openvino_backend import GraphLimitError

    return isinstance(error, (GraphLimitError, torch._dynamo.exc.FailOnRecompileLimitHit))


def run_to_end(generator: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end and return its value."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def build_image_pipeline(loaded: LoadedPipeline, request: GenerationRequest, functions: Functions) -> Any:
    """Return a diffusers pipeline for one image, with its own scheduler and stand-ins.

    Args:
        functions: what runs each component, from `bind_adapters`.
    """
    import diffusers

    family, pipeline = loaded.family, loaded.pipeline
    name = family.text_to_image
    if request.image is not None:
        name = family.image_to_image if request.mask_image is None else family.inpainting
    chosen = getattr(diffusers, name)
    scheduler = build_request_scheduler(pipeline.scheduler, request)
    plan = build_step_plan(scheduler, request, unet_config=pipeline.unet.config, half=loaded.contract.half)
    stand_ins = {
        "scheduler": scheduler,
        "unet": Denoiser(pipeline.unet, functions["unet"], request, scheduler, plan),
        "vae": build_vae(loaded),
        **{each: TextEncoderStandIn(getattr(pipeline, each), functions[each]) for each in family.text_encoders},
        SAFETY_CHECKER: None,  # it would blacken flagged images; `check_safety` refuses them
    }
    given = {**pipeline.config, **pipeline.components, **stand_ins}
    accepted = inspect.signature(chosen.__init__).parameters
    forked = chosen(**{each: value for each, value in given.items() if each in accepted})
    forked.set_progress_bar_config(disable=True)
    return forked


def bind_adapters(loaded: LoadedPipeline, request: GenerationRequest) -> Functions:
    """Return the function that runs each component, with the adapters that a request names."""
    matrices = build_low_rank_matrices(loaded.adapters, request.adapters or ())
    return {
        name: run.bind(matrices[name]) if name in matrices else run  # type: ignore[attr-defined]
        for name, run in loaded.functions.items()
    }


def list_pipeline_arguments(pipeline: Any, request: GenerationRequest, index: int) -> dict[str, Any]:
    """Return a pipeline's keyword arguments for image `index` of a request.

    Raises:
        RequestError: a field has no effect in this pipeline.
    """
    import torch

    accepted = inspect.signature(pipeline.__call__).parameters
    without_effect = ("width", "height") if request.image is not None else ("strength",)
    arguments = {}
    for name, declaration in DECLARATIONS.items():
        value = getattr(request, name)
        if not declaration.is_argument or value is None:
            continue
        if name in accepted:
            arguments[name] = value
        elif name not in without_effect and value:
            raise RequestError(f"{name} has no effect with an image here; leave it out", param=name)
    arguments |= read_schedule(request)
    if request.negative_prompt_2 is not None:
        arguments.setdefault("negative_prompt", "")  # otherwise diffusers takes zeros for both
    if request.mask_image is not None:
        arguments["image"], mask = prepare_drawing(request)
        arguments["mask_image"] = cover_cells(mask, pipeline.vae_scale_factor)
    return {**arguments, "generator": torch.Generator().manual_seed(request.get_seed(index))}
