"""Generate the images of a request, step by step."""

import contextlib
import contextvars
import dataclasses
import inspect
from collections.abc import Generator
from typing import Any

from sdxl_server.diffusion.controls import bind_controls
from sdxl_server.diffusion.denoiser import Denoiser, name_failed_step
from sdxl_server.diffusion.progress import GeneratedImage, ImageWork, Meter, Progress
from sdxl_server.diffusion.prompt_embedding import choose_chunks, embed_prompts
from sdxl_server.diffusion.safety import check_safety
from sdxl_server.diffusion.stand_ins import Functions, TextEncoderStandIn, build_vae, check_finite
from sdxl_server.diffusion.upscaling import upscale
from sdxl_server.errors import RequestError
from sdxl_server.model.adapters.registry import build_low_rank_matrices
from sdxl_server.model.embeddings import expand_prompts
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.safety_checker import SAFETY_CHECKER
from sdxl_server.model.upscaler import UPSCALER
from sdxl_server.request.fields import DECLARATIONS, GenerationRequest
from sdxl_server.request.masks import cover_cells, keep_protected, prepare_drawing, resize_image
from sdxl_server.request.prompts import PROMPTS
from sdxl_server.sampling.schedulers import build_request_scheduler, read_schedule
from sdxl_server.sampling.step_plan import StepPlan, build_step_plan


class SkippedImage(Exception):
    """Thrown into the generator of `generate`: the image under way is left out, and the next one begins."""


def generate(loaded: LoadedPipeline, request: GenerationRequest) -> Generator[Progress, None, list[GeneratedImage]]:
    """Generate the images of a request, and yield after each step. The last step of each image includes its decoding.

    Several requests can be in progress at a time, in one thread. Each has its own pipeline around the same compiled
    components. An image depends on its own seed only, because it is generated alone. Closing the generator stops the
    work.

    Raises:
        RequestError: this size would need one compiled graph too many.
        FlaggedError: the safety checker flagged an image.
        NotFiniteError: the model returned NaN or infinity; names the step and the seed.
    """
    # Large matrices and control images: once for all images, and dropped with this generator.
    functions = bind_controls(loaded, request, bind_adapters(loaded, request)) if request.is_drawn else {}
    request = expand_prompts(request, loaded.embeddings)
    meter = Meter([_plan_work(loaded, request, index) for index in range(request.num_images_per_prompt)])
    images = []
    for index in range(request.num_images_per_prompt):
        meter.begin(index)
        with contextlib.suppress(SkippedImage):
            images.append((yield from _generate_image(loaded, request, index, functions, meter)))
    return images


def _plan_work(loaded: LoadedPipeline, request: GenerationRequest, index: int) -> ImageWork:
    """Return the work on image `index` of a request."""
    plans = [(each, _plan_steps(loaded, each)) for each in request.list_passes()]
    upscaler, enlargements = loaded.upscaler, request.list_enlargements(index)
    return ImageWork(
        calls=sum(len(plan.costs) for _, plan in plans),
        tiles=0 if upscaler is None else sum(upscaler.count_tiles(*each) for each in enlargements),
        drawing=sum(plan.total * each.megapixels for each, plan in plans),
        upscaling=loaded.contract.measure_upscaling(request, index),
    )


def _plan_steps(loaded: LoadedPipeline, request: GenerationRequest, scheduler: Any = None) -> StepPlan:
    scheduler = scheduler or build_request_scheduler(loaded.pipeline.scheduler, request)
    return build_step_plan(scheduler, request, unet_config=loaded.pipeline.unet.config, half=loaded.contract.half)


def _generate_image(
    loaded: LoadedPipeline, request: GenerationRequest, index: int, functions: Functions, meter: Meter
) -> Generator[Progress, None, GeneratedImage]:
    """Draw an image unless it is uploaded, draw it again and enlarge it as the request says."""
    if request.is_drawn:
        image = yield from _draw_image(loaded, request, index, functions, meter)
        image = keep_protected(image, request)
    else:
        image = request.image[index]
    if request.hires is not None:
        yield meter.measure()
        if loaded.upscaler is not None:
            image = yield from _enlarge(loaded, image, request.hires.factor, meter)
            yield meter.measure()
        second = _start_second_pass(request, image)
        functions = bind_controls(loaded, second, bind_adapters(loaded, second))
        image = yield from _draw_image(loaded, second, index, functions, meter)
    if request.upscale is not None:
        if request.is_drawn:
            yield meter.measure()
        image = yield from _enlarge(loaded, image, request.upscale, meter)
    check_safety(loaded, image, seed=request.get_seed(index) if request.is_drawn else None)
    calls = sum(each.calls for each in meter.denoisers)
    generated = GeneratedImage(image, calls, sum(len(each.plan.costs) for each in meter.denoisers))
    yield meter.measure(generated)
    return generated


def _start_second_pass(request: GenerationRequest, image: Any) -> GenerationRequest:
    """Return the request of the second pass, which starts from an image.

    Its image and the images of controls get the new size.
    """
    size, (_, second) = request.drawn_size, request.list_passes()
    controls = (dataclasses.replace(each, image=resize_image(each.image, size)) for each in request.control or ())
    return dataclasses.replace(second, image=resize_image(image, size), control=tuple(controls) or None)


def _enlarge(loaded: LoadedPipeline, image: Any, factor: int, meter: Meter) -> Generator[Progress, None, Any]:
    """Enlarge an image by the upscaler. Yield after each tile but the last."""
    if loaded.upscaler is None:
        raise ValueError("there is no upscaler")
    enlarged = None
    for enlarged in upscale(loaded.upscaler, loaded.functions[UPSCALER], image, factor):
        meter.count_tile()
        if enlarged is None:
            yield meter.measure()
    return enlarged


def _draw_image(
    loaded: LoadedPipeline, request: GenerationRequest, index: int, functions: Functions, meter: Meter
) -> Generator[Progress, None, Any]:
    """Run a diffusers pipeline in a greenlet. Its callback leaves the greenlet after each step but the last.

    Return a Pillow image.
    """
    import torch
    from greenlet import greenlet

    is_grad_enabled = torch.is_grad_enabled()

    def report_step(_: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        check_finite(tensors["latents"], "the scheduler's result")
        if step + 1 < pipeline.num_timesteps:
            # Each pipeline switches gradients off at its start and back at its end. Another pipeline runs meanwhile.
            with torch.set_grad_enabled(is_grad_enabled):
                work.parent.switch(meter.measure())
        return tensors

    pipeline = build_image_pipeline(loaded, request, functions)
    unet: Denoiser = pipeline.unet
    meter.denoisers.append(unet)
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
    return result


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
    plan = _plan_steps(loaded, request, scheduler)
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
