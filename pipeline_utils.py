"""The Stable Diffusion side: configuration, load → compile → warm up, request → pictures, picture → file."""

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import logging
import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from generation_request import MIN_SIDE, STREAM_FIELDS, Contract, GenerationRequest, Limits, RequestError, shorten

logger = logging.getLogger(__name__)

# OpenVINO and NNCF report each import to Google Analytics, from a process that they fork. Where this module is not
# installed they leave it out.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

PUBLISHED_KEYS_WITHOUT_EFFECT = {
    "change_comp_config": "Inductor's settings go in pt2: {options: ...}",
    "compile_mode": "use pt2: {mode: ...}",
    "do_quant": "no quantisation is done",
    "enable_fused_projections": "the compilers fuse by themselves",
    "no_bf16": "use dtype: float32",
    "no_sdpa": "scaled_dot_product_attention is always used",
    "upcast_vae": "with dtype: float16 the VAE always stays in float32",
}
PIPELINE_CLASSES = {True: "StableDiffusionXLPipeline", False: "StableDiffusionPipeline"}
IMAGE_PIPELINE_CLASSES = {True: "StableDiffusionXLImg2ImgPipeline", False: "StableDiffusionImg2ImgPipeline"}
MASK_PIPELINE_CLASSES = {True: "StableDiffusionXLInpaintPipeline", False: "StableDiffusionInpaintPipeline"}
# `openvino` is this project's backend; the one that comes with OpenVINO stays selectable for comparison.
BACKEND_NAMES = {"openvino": "openvino_backend", "openvino_stock": "openvino"}
EXECUTABLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py")
VAE_ENCODER = "vae_encoder"
WARM_UP_STEPS = 2  # the first compiles; Inductor may compile again at the second


class ConfigError(ValueError):
    """A setting of model-config.yaml, or what it points to, that cannot be served."""


def _setting(default: Any, accepted: str, is_valid: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"accepted": accepted, "is_valid": is_valid})


def _switch(default: bool) -> Any:
    return _setting(default, "true or false", lambda value: isinstance(value, bool))


def _number(default: Any, low: float, high: float, *, whole: bool = True, multiple_of: int = 1, null: str = "") -> Any:
    def is_valid(value: Any) -> bool:
        if value is None:
            return bool(null)
        kinds = (int,) if whole else (int, float)
        return type(value) in kinds and low <= value <= high and (not whole or value % multiple_of == 0)

    accepted = f"a {'whole ' if whole else ''}number from {low} to {high}"
    if multiple_of > 1:
        accepted += f" that is a multiple of {multiple_of}"
    return _setting(default, f"{accepted}, or null for {null}" if null else accepted, is_valid)


def _choice(default: str, *names: str) -> Any:
    return _setting(default, " | ".join(names), lambda value: value in names)


def _are_sizes(value: Any) -> bool:
    """Say whether this is a list of WIDTHxHEIGHT, each in multiples of 8."""
    if value is None:
        return True
    sizes = [re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", str(each)) for each in value] if value else []
    return isinstance(value, list) and bool(sizes) and all(each and _is_drawable(*each.groups()) for each in sizes)


def _is_digest(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None)


def _is_drawable(*sides: str) -> bool:
    return all(int(side) % 8 == 0 and MIN_SIDE <= int(side) <= 4096 for side in sides)


def _read_section(cls: type[Any], raw: Any, section: str) -> Any:
    """Return the dataclass made from one section of model-config.yaml, every key checked."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{section} takes keys and values, not {raw!r}")
    settings = {setting.name: setting for setting in fields(cls)}
    for name, value in raw.items():
        if name not in settings:
            raise ConfigError(f"{section}.{name} is not a key; the keys are {', '.join(settings)}")
        accepted = settings[name].metadata
        if not accepted["is_valid"](value):
            raise ConfigError(f"{section}.{name} takes {accepted['accepted']}, not {value!r}")
    return cls(**raw)


@dataclass(frozen=True)
class HandlerConfig:
    """The `handler` section of model-config.yaml; the README's table gives each key's meaning."""

    model_path: str = _setting("Base_Diffusion_model", "a folder", lambda value: isinstance(value, str) and value != "")
    weights_sha256: str | None = _setting(
        None, "a SHA-256 in 64 hexadecimal digits, or null for any weights", _is_digest
    )
    is_xl: bool = _switch(True)
    dtype: str = _choice("auto", "auto", "float32", "bfloat16", "float16")
    scheduler: str | None = _setting(
        None,
        "the name of a diffusers scheduler, or null for the model's own",
        lambda v: v is None or isinstance(v, str),
    )
    num_inference_steps: int = _number(30, 1, 1000)
    guidance_scale: float = _number(5.0, 0, 100, whole=False)
    width: int | None = _number(None, 64, 4096, multiple_of=8, null="the model's own")
    height: int | None = _number(None, 64, 4096, multiple_of=8, null="the model's own")
    jpeg_quality: int = _number(90, 1, 100)
    embed_parameters: bool = _switch(True)
    max_prompt_characters: int = _number(2000, 1, 3000)
    max_side: int = _number(2048, 64, 4096)
    max_steps: int = _number(150, 1, 1000)
    max_images: int = _number(4, 1, 100)
    max_megapixel_steps: float = _number(250, 0.001, 1e6, whole=False)
    max_timeout: float = _number(3600, 1, 1e6, whole=False)
    allowed_sizes: Sequence[str] | None = _setting(
        None, "a list of sizes such as 1024x1024, in multiples of 8, or null for any", _are_sizes
    )
    compile_unet: bool = _switch(True)
    compile_vae: bool = _switch(True)
    compile_text_encoders: bool = _switch(True)
    warm_up: bool = _switch(True)
    profile: bool = _switch(False)

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Check the section and return it.

        Raises:
            ConfigError: names the key, what is accepted and what was given.
        """
        raw = {} if raw is None else raw
        ignored = {key: PUBLISHED_KEYS_WITHOUT_EFFECT[key] for key in raw if key in PUBLISHED_KEYS_WITHOUT_EFFECT}
        if ignored:
            logger.warning(
                "These keys of the handler section have no effect: %s",
                "; ".join(f"{key} ({advice})" for key, advice in ignored.items()),
            )
            raw = {key: value for key, value in raw.items() if key not in ignored}
        return _read_section(cls, raw, "handler")

    def read_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the allowed sizes as width and height in pixels, none where any is allowed."""
        return tuple(
            (int(width), int(height)) for width, _, height in (s.partition("x") for s in self.allowed_sizes or ())
        )


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile's keywords as the `pt2` section gives them. `backend` None means eager PyTorch."""

    backend: str | None = _setting(None, "the name of a torch.compile backend", lambda value: isinstance(value, str))
    mode: str | None = _setting(None, "a mode of torch.compile", lambda value: isinstance(value, str))
    dynamic: bool | None = _setting(None, "true, false or null", lambda value: value is None or isinstance(value, bool))
    fullgraph: bool | None = _setting(
        None, "true, false or null", lambda value: value is None or isinstance(value, bool)
    )
    options: Mapping[str, Any] | None = _setting(
        None, "the backend's options by name", lambda value: value is None or isinstance(value, Mapping)
    )

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Check and return `pt2`: a backend's name, torch.compile's keywords, or TorchServe's {compile: {enable: ...}}.

        Raises:
            ConfigError: names the key, what is accepted and what was given.
        """
        section = "pt2"
        if raw is None:
            return cls()
        if isinstance(raw, str):
            raw = {"backend": raw}
        if isinstance(raw, Mapping) and "compile" in raw:
            if len(raw) > 1 or not isinstance(raw["compile"], Mapping):
                raise ConfigError(f"pt2 with a compile section takes nothing else, not {raw!r}")
            section, raw = "pt2.compile", dict(raw["compile"])
            enable = raw.pop("enable", False)
            if not isinstance(enable, bool):
                raise ConfigError(f"pt2.compile.enable takes true or false, not {enable!r}")
            if not enable:
                return cls()
        if isinstance(raw, Mapping):
            raw = {"backend": "inductor", **raw}  # torch.compile's own default
        config: Self = _read_section(cls, raw, section)
        config._check(section)
        return config

    def _check(self, section: str) -> None:
        import torch

        names = sorted({*torch._dynamo.list_backends(), *BACKEND_NAMES})
        if self.backend not in names:
            raise ConfigError(f"{section}.backend takes one of {', '.join(names)}, not {self.backend!r}")
        if self.backend == "openvino":
            from openvino_backend import Options, OptionsError

            try:
                Options.parse(self.options)
            except OptionsError as error:
                raise ConfigError(f"{section}.options: {error}") from error
            # What dynamo cannot trace would run in eager PyTorch, and OpenVINO is told each shape.
            if self.dynamic or self.fullgraph is False:
                raise ConfigError(f"{section}: openvino compiles each part whole, with dynamic: false, fullgraph: true")
        if self.mode is not None and self.backend != "inductor":
            raise ConfigError(f"{section}.mode belongs to the inductor backend, not to {self.backend!r}")
        if self.mode is not None and self.options is not None:
            raise ConfigError(f"{section} takes mode or options, not both: torch.compile derives one from the other")
        if self.mode is not None and self.mode not in (modes := torch._inductor.list_mode_options()):
            raise ConfigError(f"{section}.mode takes one of {', '.join(modes)}, not {self.mode!r}")


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline that is ready to make pictures.

    Attributes:
        pipeline: the diffusers pipeline, its parts compiled.
        config: what it was loaded with.
        compilation: what it was compiled with.
        dtype: the type of its weights.
        parts: the compiled parts by name, each with its OpenVINOBackend, or None where another backend compiled it.
        contract: what requests may ask of it.
    """

    pipeline: Any
    config: HandlerConfig
    compilation: CompileConfig
    dtype: str
    parts: Mapping[str, Any]
    contract: Contract

    def describe(self) -> dict[str, Any]:
        """Return what runs, read off what was compiled so far; without a warm-up that is nothing before a request."""
        import torch

        report: dict[str, Any] = {
            "model_path": self.config.model_path,
            "dtype": self.dtype,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "backend": self.compilation.backend or "eager",
            "compiled_parts": list(self.parts),
            "weights_sha256": self.weights_sha256,
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        }
        if self.compilation.backend == "openvino":
            report["openvino"] = {
                name: [dataclasses.asdict(graph) for graph in backend.reports] for name, backend in self.parts.items()
            }
            report["graphs"] = sum(len(graphs) for graphs in report["openvino"].values())
        return report

    @functools.cached_property
    def weights_sha256(self) -> str:
        """A digest of all weights as they were loaded; OpenVINO's parts have theirs already."""
        from openvino_backend import digest_weights

        digests = []
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            backend, module = self.parts.get(name), getattr(self.pipeline, name, None)
            if backend and backend.reports:
                digests.append(backend.reports[0].weights_sha256)
            elif module is not None:
                digests.append(digest_weights(dict([*module.named_parameters(), *module.named_buffers()])))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def measure_parts(self) -> dict[str, dict[str, tuple[float, str]]]:
        """Return for each part that OpenVINO runs the figures worth watching: by their name, the value and its unit."""
        if self.compilation.backend != "openvino":
            return {}
        figures = {}
        for name, backend in self.parts.items():
            models = [model for graph in backend.reports for model in graph.models]
            figures[name] = {
                "OpenVINOModels": (len(models), "count"),
                "OpenVINOModelsFromCache": (sum(model.loaded_from_cache for model in models), "count"),
                "OpenVINOOperatorsOutside": (sum(len(each.operators_outside) for each in backend.reports), "count"),
                "OpenVINOCompileTime": (sum(model.seconds for model in models), "s"),
            }
        return figures


def load_pipeline(
    config: HandlerConfig, compilation: CompileConfig, *, model_dir: Path, device: str = "cpu"
) -> LoadedPipeline:
    """Load the model, compile its parts and make one picture, so that no user pays for compilation.

    Args:
        model_dir: the archive's folder; a relative model_path is looked up there.
        device: torch's device.

    Raises:
        ConfigError: the configuration does not fit the model or the machine.
    """
    folder = model_dir / config.model_path
    check_model_folder(folder, is_xl=config.is_xl)
    dtype, compilation = choose_dtype(config, compilation, device=device)
    pipeline = read_pipeline(folder, dtype, is_xl=config.is_xl)
    if device != "cpu":
        pipeline.to(device)
    set_scheduler(pipeline, config.scheduler)
    contract = build_contract(pipeline, config)
    try:
        parts = compile_parts(pipeline, config, compilation)
        unify_inputs(pipeline)
        loaded = LoadedPipeline(pipeline, config, compilation, dtype, parts, contract)
        if config.warm_up:
            warm_up(loaded)
    except ConfigError:
        raise
    except Exception as error:  # each backend has errors of its own
        reason = shorten(" ".join(str(error).split()), length=600)
        raise ConfigError(f"pt2.backend: {compilation.backend} cannot run this model: {reason}") from error
    if config.weights_sha256 is not None and config.weights_sha256 != loaded.weights_sha256:
        raise ConfigError(
            f"handler.weights_sha256 takes the digest of the weights in {folder} as {dtype}, "
            f"{loaded.weights_sha256}, not {config.weights_sha256!r}; other weights than expected, or another dtype"
        )
    return loaded


def check_model_folder(folder: Path, *, is_xl: bool) -> None:
    """Refuse a folder that holds no such pipeline, or files that could run code when they are loaded.

    Raises:
        ConfigError: names the folder or the file.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"handler.model_path takes the folder of a diffusers pipeline, but {folder} has no readable "
            f"model_index.json; python Download_model.py makes one ({error})"
        ) from error
    if index.get("_class_name") != PIPELINE_CLASSES[is_xl]:
        raise ConfigError(
            f"handler.is_xl: {str(is_xl).lower()} takes a {PIPELINE_CLASSES[is_xl]}, "
            f"but {folder} holds a {index.get('_class_name')}"
        )
    for path in sorted(folder.rglob("*")):
        if path.suffix in EXECUTABLE_SUFFIXES:
            raise ConfigError(f"{path} could run code when it is loaded; weights are read from .safetensors only")


def choose_dtype(config: HandlerConfig, compilation: CompileConfig, *, device: str) -> tuple[str, CompileConfig]:
    """Return the type of the weights and, where OpenVINO is to compute in another, the options that say so.

    `auto` is the shorter type that the device computes in, or else float32. For OpenVINO on a CPU with bfloat16 the
    weights stay in float16, the type they are published in: they are mapped from the file instead of converted.
    """
    if config.dtype != "auto":
        return config.dtype, compilation
    import openvino

    import openvino_backend

    if device != "cpu":
        return "float16", compilation
    options = dict(compilation.options or {}) if compilation.backend == "openvino" else {}
    core, (_, targets) = openvino.Core(), openvino_backend.split_device(options.get("device", "CPU"))
    abilities = set.intersection(*(set(core.get_property(name, "OPTIMIZATION_CAPABILITIES")) for name in targets))
    if "FP16" in abilities and "CPU" not in targets:
        return "float16", compilation
    if "BF16" not in abilities:
        return "float32", compilation
    if compilation.backend != "openvino":
        return "bfloat16", compilation
    options["config"] = {"INFERENCE_PRECISION_HINT": "bf16", **options.get("config", {})}
    return "float16", dataclasses.replace(compilation, options=options)


def read_pipeline(folder: Path, dtype: str, *, is_xl: bool) -> Any:
    """Read the pipeline from its safetensors; nothing is downloaded and no code of the folder runs.

    Raises:
        ConfigError: a part is missing or broken.
    """
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # In float16 SDXL's VAE overflows. diffusers would convert it there and back for each picture, compiled or not.
    dtypes = {"default": torch.float16, "vae": torch.float32} if dtype == "float16" else getattr(torch, dtype)
    pipeline_class = getattr(diffusers, PIPELINE_CLASSES[is_xl])
    try:
        pipeline = pipeline_class.from_pretrained(folder, dtype=dtypes, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the pipeline in {folder}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    # The VAE has the type that it is to run in; with this set, diffusers would convert it for each image it encodes.
    pipeline.vae.register_to_config(force_upcast=False)
    return pipeline


def set_scheduler(pipeline: Any, name: str | None) -> None:
    """Replace the scheduler by the named one, with the settings of the model's own.

    Raises:
        ConfigError: not a scheduler that fits this model.
    """
    if name is None:
        return
    schedulers = list_schedulers(pipeline.scheduler)
    if name not in schedulers:
        raise ConfigError(f"handler.scheduler takes one of {', '.join(schedulers)}, not {name!r}")
    pipeline.scheduler = schedulers[name].from_config(pipeline.scheduler.config)


def list_schedulers(scheduler: Any) -> dict[str, Any]:
    """Return by their names the schedulers that can take this one's place and that can be used on this machine."""
    usable = {}
    for each in sorted(scheduler.compatibles, key=lambda each: each.__name__):
        try:
            each.from_config(scheduler.config)
        except (ImportError, TypeError, ValueError):  # a library is missing, or the settings do not fit
            continue
        usable[each.__name__] = each
    return usable


def build_contract(pipeline: Any, config: HandlerConfig) -> Contract:
    """Return what requests may ask of this pipeline under this configuration.

    Raises:
        ConfigError: the defaults are beyond the limits.
    """
    own_side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    size = (config.width or own_side, config.height or own_side)
    defaults = {
        "width": size[0],
        "height": size[1],
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "quality": config.jpeg_quality,
        "scheduler": type(pipeline.scheduler).__name__,
    }
    encoders = (pipeline.text_encoder, *([pipeline.text_encoder_2] if config.is_xl else []))
    contract = Contract.build(
        Limits(
            config.max_prompt_characters,
            config.max_side,
            config.max_steps,
            config.max_images,
            config.max_megapixel_steps,
            config.max_timeout,
            config.read_sizes(),
        ),
        defaults=defaults,
        schedulers=list(list_schedulers(pipeline.scheduler)),
        max_clip_skip=min(encoder.config.num_hidden_layers for encoder in encoders) - 1,
        is_xl=config.is_xl,
    )
    try:
        contract.check({"prompt": "what a request gets that says no more", **defaults})
    except RequestError as error:
        raise ConfigError(f"handler: its defaults are beyond its limits: {error}") from error
    return contract


def compile_parts(pipeline: Any, config: HandlerConfig, compilation: CompileConfig) -> dict[str, Any]:
    """Compile the UNet, the VAE's two halves and the text encoders as configured; see LoadedPipeline.parts.

    Lossless: each part computes the same, in the type of its own weights.

    Raises:
        ConfigError: the machine lacks what the backend needs.
    """
    import torch

    if compilation.backend is None:
        return {}
    if compilation.backend == "inductor":
        check_compiler()
    # Past its limit of recompilations dynamo would go on in eager PyTorch and only warn.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    parts = {}
    for name, module_name, method, is_wanted in (
        ("unet", "unet", "forward", config.compile_unet),
        ("vae", "vae", "decode", config.compile_vae),
        (VAE_ENCODER, "vae", "_encode", config.compile_vae),
        ("text_encoder", "text_encoder", "forward", config.compile_text_encoders),
        ("text_encoder_2", "text_encoder_2", "forward", config.compile_text_encoders and config.is_xl),
    ):
        if not is_wanted:
            continue
        module = getattr(pipeline, module_name)
        if name.startswith("text_encoder"):
            # At its first call transformers hooks up the hidden states, behind a lock that dynamo cannot trace.
            module(torch.zeros(1, 1, dtype=torch.long, device=module.device), output_hidden_states=True)
        compiled = compile_method(getattr(module, method), compilation)
        setattr(module, method, compiled)
        parts[name] = compiled.backend if compilation.backend == "openvino" else None
    return parts


def compile_method(method: Any, compilation: CompileConfig) -> Any:
    """Return a method of a module, compiled as configured."""
    import torch

    if compilation.backend == "openvino":
        from openvino_backend import CompiledFunction

        return CompiledFunction(method, {"release_weights": True, **(compilation.options or {})})
    keywords = {name: getattr(compilation, name) for name in ("mode", "dynamic", "options")}
    backend = BACKEND_NAMES.get(str(compilation.backend), compilation.backend)
    return torch.compile(method, backend=backend, fullgraph=compilation.fullgraph or False, **keywords)


def unify_inputs(pipeline: Any) -> None:
    """Let no part meet inputs of more than one kind, each of which would be compiled for itself.

    Schedulers count timesteps in whole numbers or in float32, which holds them exactly. The VAE stays in float32
    where the rest is in float16, and its decoder has no use for the generator that some pipelines hand it.
    """
    forward, decode, encode = pipeline.unet.forward, pipeline.vae.decode, pipeline.vae._encode
    dtype = pipeline.vae.dtype

    def run_unet(sample: Any, timestep: Any, *inputs: Any, **options: Any) -> Any:
        return forward(sample, timestep.float(), *inputs, **options)

    def run_decoder(latents: Any, return_dict: bool = True, generator: Any = None) -> Any:
        return decode(latents.to(dtype), return_dict=return_dict)

    pipeline.unet.forward = run_unet
    pipeline.vae.decode = run_decoder
    pipeline.vae._encode = lambda pixels: encode(pixels.to(dtype))


def check_compiler() -> None:
    """Refuse Inductor where there is no C++ compiler.

    Raises:
        ConfigError: says which compilers were looked for.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "pt2.backend: inductor needs a C++ compiler, and there is none; install g++ or name one in the "
            "environment variable CXX, or use the openvino backend, which needs none"
        ) from error


def warm_up(loaded: LoadedPipeline) -> None:
    """Make one picture of each size that is allowed, which compiles every part, and check that all were compiled.

    The VAE's encoder is left to the first request with an image.

    Raises:
        ConfigError: a part ran in eager PyTorch although it was to be compiled.
    """
    contract = loaded.contract
    default = (contract.properties["width"]["default"], contract.properties["height"]["default"])
    steps = 1 if loaded.compilation.backend == "openvino" else min(WARM_UP_STEPS, loaded.config.num_inference_steps)
    for width, height in contract.limits.allowed_sizes or (default,):
        fields = {"prompt": "warm-up", "width": width, "height": height, "num_inference_steps": steps}
        request = contract.check(fields)
        encode_picture(finish(generate(loaded, request))[0], request)
    report = loaded.describe()
    warm = [name for name in loaded.parts if name != VAE_ENCODER]
    idle = [name for name, graphs in report.get("openvino", {}).items() if name in warm and not graphs]
    if idle or report["graphs"] < len(warm):
        raise ConfigError(
            f"pt2.backend: {report['backend']} did not compile {', '.join(idle) or 'every part'}: {report}"
        )


@dataclass(frozen=True)
class Progress:
    """Where a request stands after a denoising step.

    Attributes:
        done, total: steps of the request.
        index: the picture under way, from 0.
        step, steps: of this picture.
        prediction: its finished latents as the scheduler expects them; 1, channels, height / 8, width / 8.
    """

    done: int
    total: int
    index: int
    step: int
    steps: int
    prediction: Any


def generate(loaded: LoadedPipeline, request: GenerationRequest) -> Generator[Progress, None, list[Any]]:
    """Make the pictures of a request, stopping after each denoising step but the last; return them as Pillow images.

    Several requests can be under way at a time, each in a pipeline of its own around the same compiled parts. A
    picture depends on its own seed only: it is made by itself, whatever is made beside it. Closing the generator ends
    the work where it stands.

    Raises:
        RequestError: a size for which there is no room among the compiled graphs.
    """
    images = []
    for index in range(request.num_images_per_prompt):
        images.append((yield from _draw(loaded, request, index)))
    return images


def _draw(loaded: LoadedPipeline, request: GenerationRequest, index: int) -> Generator[Progress, None, Any]:
    """Run a diffusers pipeline in a greenlet, which its callback leaves after each step."""
    import torch
    from greenlet import greenlet

    is_grad_enabled = torch.is_grad_enabled()

    def report_step(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps = running.num_timesteps
        done, total = index * steps + step + 1, request.num_images_per_prompt * steps
        progress = Progress(done, total, index, step + 1, steps, prediction[0])
        if done < total:
            # Each pipeline switches gradients off at its start and back at its end; another one runs in between.
            with torch.set_grad_enabled(is_grad_enabled):
                work.parent.switch(progress)
        return tensors

    pipeline = fork_pipeline(loaded.pipeline, request, is_xl=loaded.config.is_xl)
    prediction = keep_prediction(pipeline.scheduler)
    arguments = list_arguments(request, index)
    work = greenlet(lambda: pipeline(callback_on_step_end=report_step, **arguments).images[0])
    try:
        result = work.switch()
        while not work.dead:
            yield result
            result = work.switch()
    except Exception as error:
        if _is_graph_limit(error):
            raise RequestError(
                f"{request.width}x{request.height} would be one more graph than this server may compile; ask for a "
                "size and a kind of guidance that it has made before, or have allowed_sizes and max_graphs changed",
                param="width",
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


def keep_prediction(scheduler: Any) -> list[Any]:
    """Return a list of one that will hold what the scheduler, at its last step, took the finished latents to be."""
    step, kept = scheduler.step, [None]

    @functools.wraps(step)  # pipelines look at its signature
    def keep(*inputs: Any, return_dict: bool = True, **options: Any) -> Any:
        output = step(*inputs, **options)
        kept[0] = getattr(output, "pred_original_sample", None)
        if kept[0] is None:
            history = [each for each in getattr(scheduler, "model_outputs", ()) if each is not None]
            kept[0] = history[-1] if history else output.prev_sample
        return output if return_dict else (output.prev_sample,)

    scheduler.step = keep
    return kept


def draw_preview(loaded: LoadedPipeline, progress: Progress) -> Any:
    """Return the picture, a Pillow image, as it looks from where it stands; it costs one run of the VAE's decoder."""
    import torch

    pipeline = loaded.pipeline
    with torch.no_grad():
        latents = progress.prediction / pipeline.vae.config.scaling_factor
        pixels = pipeline.vae.decode(latents, return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels.cpu())[0]


def finish(generator: Generator[Any, None, Any]) -> Any:
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def fork_pipeline(pipeline: Any, request: GenerationRequest, *, is_xl: bool) -> Any:
    """Return a pipeline for one picture: the same parts, a scheduler of its own, the class that the request needs."""
    import diffusers

    classes = PIPELINE_CLASSES
    if request.image is not None:
        classes = IMAGE_PIPELINE_CLASSES if request.mask_image is None else MASK_PIPELINE_CLASSES
    chosen = getattr(diffusers, classes[is_xl])
    scheduler = make_scheduler(pipeline, request)
    given = {**pipeline.config, **pipeline.components, "scheduler": scheduler}
    accepted = inspect.signature(chosen.__init__).parameters
    forked = chosen(**{name: value for name, value in given.items() if name in accepted})
    forked.set_progress_bar_config(disable=True)
    return forked


def make_scheduler(pipeline: Any, request: GenerationRequest) -> Any:
    """Return the scheduler that a request names, with the settings of the model's own.

    Raises:
        RequestError: it cannot make so few steps.
    """
    import diffusers

    scheduler = getattr(diffusers, str(request.scheduler)).from_config(pipeline.scheduler.config)
    try:
        scheduler.set_timesteps(request.num_inference_steps)
    except (IndexError, ValueError) as error:
        raise RequestError(
            f"num_inference_steps: {request.scheduler} cannot make a picture in {request.num_inference_steps} steps "
            f"({error}); give it more, or another scheduler",
            param="num_inference_steps",
        ) from error
    return scheduler


def list_arguments(request: GenerationRequest, index: int) -> dict[str, Any]:
    """Return a pipeline's keyword arguments for picture `index` of a request."""
    import torch

    names = {each.name for each in fields(request)} - {
        *("seed", "num_images_per_prompt", "scheduler", "output_format", "quality", "timeout"),
        *STREAM_FIELDS,
        *(("width", "height") if request.image is not None and request.mask_image is None else ()),
        *(("guidance_rescale",) if not request.guidance_rescale else ()),
    }
    arguments = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if request.negative_prompt_2 is not None:
        arguments.setdefault("negative_prompt", "")  # without one diffusers takes zeros for both
    return {**arguments, "generator": torch.Generator().manual_seed(request.seed + index)}


def find_cut_prompts(loaded: LoadedPipeline, request: GenerationRequest) -> list[str]:
    """Return a warning for each prompt of which the text encoders read the beginning only."""
    tokenizer = loaded.pipeline.tokenizer
    most = tokenizer.model_max_length
    warnings = []
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        text = getattr(request, name)
        count = len(tokenizer(text).input_ids) if text else 0
        if count > most:
            warnings.append(f"{name} has {count} tokens; the text encoder reads the first {most}")
    return warnings


def describe_picture(loaded: LoadedPipeline, request: GenerationRequest, index: int) -> dict[str, Any]:
    """Return what makes picture `index` again: the fields of the request, and what made it."""
    import diffusers
    import openvino
    import torch

    return {
        "request": request.describe(index),
        "made_with": {
            "model": loaded.config.model_path,
            "weights_sha256": loaded.weights_sha256,
            "dtype": loaded.dtype,
            "backend": loaded.compilation.backend or "eager",
            "versions": {
                "diffusers": diffusers.__version__,
                "torch": torch.__version__,
                "openvino": openvino.__version__,
            },
        },
    }


def encode_picture(image: Any, request: GenerationRequest, *, parameters: Mapping[str, Any] | None = None) -> bytes:
    """Return a Pillow image as JPEG, PNG or WebP.

    Args:
        parameters: kept in the file as JSON: in PNG's text chunk `parameters`, or else in EXIF's UserComment.
    """
    from PIL import ExifTags, Image, PngImagePlugin

    options: dict[str, Any] = {}
    text = json.dumps(parameters, ensure_ascii=False)
    if parameters is not None and request.output_format == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("parameters", text)
    elif parameters is not None:
        options["exif"] = Image.Exif()
        comment = b"UNICODE\0" + text.encode("utf-16-be")
        options["exif"].get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    buffer = io.BytesIO()
    image.save(buffer, request.output_format, quality=request.quality, **options)
    return buffer.getvalue()
