"""Build the contract: what requests may ask for, with this pipeline and configuration."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.model.adapters.registry import Adapter
from sdxl_server.model.compiling import compute_half_cost
from sdxl_server.model.controls.base import Control
from sdxl_server.model.embeddings import Embedding
from sdxl_server.model.families import Family
from sdxl_server.model.upscaler import Upscaler, compute_tile_work
from sdxl_server.request.adapters import RegisteredAdapter
from sdxl_server.request.contract import Contract
from sdxl_server.request.controls import RegisteredControl
from sdxl_server.request.fields import GenerationRequest, build_properties
from sdxl_server.request.limits import Limits
from sdxl_server.request.prompts import PROMPTS
from sdxl_server.request.sampler_names import read_sampler
from sdxl_server.request.samplers import Samplers
from sdxl_server.request.upscaling import RegisteredUpscaler, Size
from sdxl_server.sampling.few_steps import SuitedDefaults, choose_suited_defaults
from sdxl_server.sampling.schedulers import build_request_scheduler, check_schedule, choose_default, list_samplers
from sdxl_server.sampling.step_plan import build_step_plan, has_halves

logger = logging.getLogger(__name__)


def build_contract(
    pipeline: Any,
    family: Family,
    config: HandlerConfig,
    *,
    graphs: str | None,
    adapters: Sequence[Adapter] = (),
    embeddings: Sequence[Embedding] = (),
    controls: Sequence[Control] = (),
    upscaler: Upscaler | None = None,
) -> Contract:
    """Return the contract of a pipeline under a configuration.

    Args:
        graphs: see `choose_graphs`. Static graphs serve the allowed sizes, or else the configured one alone.

    Raises:
        ConfigError: a default is beyond its limit; names the key.
    """
    own, unet_config = pipeline.scheduler, pipeline.unet.config
    samplers = list_samplers(own, unet_config, configured=config.scheduler, is_adapted=bool(config.adapters))
    sampler = choose_default(own, samplers, config.scheduler)
    own_side = unet_config.sample_size * pipeline.vae_scale_factor
    size = (config.width or own_side, config.height or own_side)
    defaults = {
        "width": size[0],
        "height": size[1],
        **_choose_steps(config, choose_suited_defaults(own, unet_config, sampler)),
        "unet_calls": config.unet_calls,
        "guidance_interval": config.guidance_interval,
        "quality": config.jpeg_quality,
        "scheduler": sampler,
    }
    batch = 2 if has_halves(defaults["guidance_scale"], unet_config) else 1
    limits = Limits(
        config=config,
        own_side=own_side,
        multiple=pipeline.vae_scale_factor * 2 ** (len(unet_config.block_out_channels) - 1),
        allowed_sizes=config.read_sizes() or ((size,) if graphs == "static" else ()),
        samplers=samplers,
        max_clip_skip=min(getattr(pipeline, each).config.num_hidden_layers for each in family.text_encoders) - 1,
        adapters=_list_registered(adapters, config, samplers),
        is_xl=family.is_xl,
        controls={each.config.name: RegisteredControl(each.config.scale, each.modes, each.is_map) for each in controls},
        upscaler=None if upscaler is None else _register_upscaler(upscaler, pipeline, size, batch),
    )
    properties = build_properties(limits, defaults=defaults, lacking=family.lacks)
    for name in properties.keys() & set(PROMPTS) if embeddings else ():
        properties[name]["description"] += f"; it may name the embeddings {', '.join(each.name for each in embeddings)}"
    half = compute_half_cost(config, graphs, batch=batch)
    count_calls = functools.partial(_count_calls, pipeline, samplers, half)
    contract = Contract(properties, limits, count_calls, half, batch, family.needs)
    try:
        contract.check_sample({"prompt": "a prompt", **defaults})
    except RequestError as error:
        key = error.param if error.param in {each.name for each in dataclasses.fields(config)} else "jpeg_quality"
        raise ConfigError(f"handler.{key}: its defaults are beyond its limits: {error}") from error
    return contract


def _choose_steps(config: HandlerConfig, suited: SuitedDefaults) -> dict[str, Any]:
    """Return the default steps and guidance, as configured or as the model suggests."""
    steps = suited.num_inference_steps if config.num_inference_steps is None else config.num_inference_steps
    guidance = suited.guidance_scale if config.guidance_scale is None else config.guidance_scale
    if warning := suited.describe_mismatch(steps, guidance):
        logger.warning("%s", warning)
    elif suited.reason:
        logger.info("This is a few-step model (%s): %s suit it", suited.reason, suited)
    return {"num_inference_steps": steps, "guidance_scale": guidance}


def _list_registered(
    adapters: Sequence[Adapter], config: HandlerConfig, samplers: Samplers
) -> dict[str, RegisteredAdapter]:
    """Return the adapters that requests can name.

    Raises:
        ConfigError: an adapter's defaults do not fit the model; names the key.
    """
    registered = {}
    for index, adapter in enumerate(adapters):
        key, defaults = f"handler.adapters[{index}]", adapter.config.list_defaults()
        if "scheduler" in defaults:
            try:
                defaults["scheduler"] = read_sampler(defaults["scheduler"], samplers)
            except ValueError as error:
                raise ConfigError(f"{key}.scheduler {error}") from error
        if defaults.get("num_inference_steps", 1) > config.max_steps:
            raise ConfigError(
                f"{key}.num_inference_steps takes a whole number from 1 to max_steps, {config.max_steps}, not "
                f"{defaults['num_inference_steps']}"
            )
        if not adapter.config.fuse:
            registered[adapter.config.name] = RegisteredAdapter(adapter.config.scale, adapter.rank or 0, defaults)
    return registered


def _register_upscaler(upscaler: Upscaler, pipeline: Any, size: Size, batch: int) -> RegisteredUpscaler:
    """Return the upscaler with its work compared with UNet calls for a default request."""
    tile = compute_tile_work(upscaler, pipeline, size, batch=batch)
    return RegisteredUpscaler(upscaler.title, lambda size, factor: tile * upscaler.count_tiles(size, factor))


def _count_calls(pipeline: Any, samplers: Samplers, half: float, request: GenerationRequest) -> float:
    """Return the number of UNet calls for one image.

    Raises:
        RequestError: there would be none, or the scheduler cannot make these steps.
    """
    check_schedule(pipeline.scheduler, samplers, request)
    scheduler = build_request_scheduler(pipeline.scheduler, request)
    return build_step_plan(scheduler, request, unet_config=pipeline.unet.config, half=half).total
