"""From a request to its pictures, step by step."""

import inspect
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from sdxl_server.diffusion.denoiser import Denoiser, name_step
from sdxl_server.diffusion.prompt_embedding import choose_chunks, embed_prompts
from sdxl_server.diffusion.stand_ins import Functions, TextEncoder, check_finite, fork_vae
from sdxl_server.errors import RequestError
from sdxl_server.model.adapters.registry import choose_products
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.fields import DECLARATIONS, GenerationRequest
from sdxl_server.request.masks import cover_cells, keep_protected
from sdxl_server.request.prompts import PROMPTS
from sdxl_server.sampling.schedulers import find_schedule, make_scheduler
from sdxl_server.sampling.step_plan import plan_calls


@dataclass(frozen=True)
class Progress:
    """Where a request stands after a denoising step.

    Attributes:
        done, total: steps of the request; a step is a call of the UNet, made or forecast.
        index: the picture under way, from 0.
        step, steps: of this picture.
        denoiser: of this picture.
        share: of the request's calls of the UNet, those forecast left out, that are made; above 0.
    """

    done: int
    total: int
    index: int
    step: int
    steps: int
    denoiser: Denoiser
    share: float


@dataclass(frozen=True)
class Picture:
    """A picture that is finished.

    Attributes:
        image: a Pillow image.
        unet_calls: that were made for it, in whole ones; outside a guidance interval one may be half.
        calls_of_all: what the full schedule would take.
    """

    image: Any
    unet_calls: float
    calls_of_all: int


def generate(loaded: LoadedPipeline, request: GenerationRequest) -> Generator[Progress, None, list[Picture]]:
    """Make the pictures of a request, stopping after each denoising step but the last; return them.

    Several requests can be under way at a time, each in a pipeline of its own around the same compiled parts. A
    picture depends on its own seed only: it is made by itself, whatever is made beside it. Closing the generator ends
    the work where it stands.

    Raises:
        RequestError: a size for which there is no room among the compiled graphs.
        NotFiniteError: the model made NaN or infinity of it; names the step and the seed.
    """
    pictures = []
    for index in range(request.num_images_per_prompt):
        pictures.append((yield from _draw(loaded, request, index)))
    return pictures


def _draw(loaded: LoadedPipeline, request: GenerationRequest, index: int) -> Generator[Progress, None, Picture]:
    """Run a diffusers pipeline in a greenlet, which its callback leaves after each step."""
    import torch
    from greenlet import greenlet

    is_grad_enabled = torch.is_grad_enabled()

    def report_step(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        check_finite(tensors["latents"], "what the scheduler made of the step")
        steps = running.num_timesteps
        share = (index + unet.calls / unet.plan.total) / request.num_images_per_prompt
        done, total = index * steps + step + 1, request.num_images_per_prompt * steps
        if done < total:
            # Each pipeline switches gradients off at its start and back at its end; another one runs in between.
            with torch.set_grad_enabled(is_grad_enabled):
                work.parent.switch(Progress(done, total, index, step + 1, steps, unet, share))
        return tensors

    pipeline = fork_pipeline(loaded, request)
    unet: Denoiser = pipeline.unet
    arguments = list_arguments(pipeline, request, index)
    chunks = choose_chunks(loaded)
    if chunks and (embedded := embed_prompts(pipeline, request, loaded.family, chunks=chunks)):
        arguments = {name: value for name, value in arguments.items() if name not in PROMPTS} | embedded
    work = greenlet(lambda: pipeline(callback_on_step_end=report_step, **arguments).images[0])
    try:
        with name_step(request, index, unet):
            result = work.switch()
            while not work.dead:
                yield result
                result = work.switch()
    except Exception as error:
        if _is_graph_limit(error):
            raise RequestError(
                f"{request.width}x{request.height} would be one more graph than this server may compile; ask for a "
                "size that it has made before, or have allowed_sizes and max_graphs changed",
                param="width",
            ) from error
        raise
    finally:
        if not work.dead:
            work.throw()
    return Picture(keep_protected(result, request), unet.calls, len(unet.plan.costs))


def _is_graph_limit(error: BaseException) -> bool:
    import torch

    from openvino_backend import GraphLimitError

    return isinstance(error, (GraphLimitError, torch._dynamo.exc.FailOnRecompileLimitHit))


def finish(generator: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def fork_pipeline(loaded: LoadedPipeline, request: GenerationRequest) -> Any:
    """Return a pipeline for one picture: parts and a scheduler of its own, the class that the request needs."""
    import diffusers

    family, pipeline = loaded.family, loaded.pipeline
    name = family.text_to_image
    if request.image is not None:
        name = family.image_to_image if request.mask_image is None else family.inpainting
    chosen = getattr(diffusers, name)
    scheduler = make_scheduler(pipeline.scheduler, request)
    plan = plan_calls(scheduler, request, unet_config=pipeline.unet.config, half=loaded.contract.half)
    functions = bind_adapters(loaded, request)
    parts = {
        "scheduler": scheduler,
        "unet": Denoiser(pipeline.unet, functions["unet"], request, scheduler, plan),
        "vae": fork_vae(loaded),
        **{each: TextEncoder(getattr(pipeline, each), functions[each]) for each in family.text_encoders},
    }
    given = {**pipeline.config, **pipeline.components, **parts}
    accepted = inspect.signature(chosen.__init__).parameters
    forked = chosen(**{each: value for each, value in given.items() if each in accepted})
    forked.set_progress_bar_config(disable=True)
    return forked


def bind_adapters(loaded: LoadedPipeline, request: GenerationRequest) -> Functions:
    """Return the functions of the parts, those with the adapters that a request names that these change."""
    products = choose_products(loaded.adapters, request.adapters or ())
    return {
        name: run.bind(products[name]) if name in products else run  # type: ignore[attr-defined]
        for name, run in loaded.functions.items()
    }


def list_arguments(pipeline: Any, request: GenerationRequest, index: int) -> dict[str, Any]:
    """Return a pipeline's keyword arguments for picture `index` of a request.

    Raises:
        RequestError: a field that this pipeline has no use for.
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
    arguments |= find_schedule(request)
    if request.negative_prompt_2 is not None:
        arguments.setdefault("negative_prompt", "")  # without one diffusers takes zeros for both
    if request.mask_image is not None:
        arguments["mask_image"] = cover_cells(request.mask_image, pipeline.vae_scale_factor)
    return {**arguments, "generator": torch.Generator().manual_seed(request.get_seed(index))}
