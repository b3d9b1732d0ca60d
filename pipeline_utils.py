"""The Stable Diffusion side: configuration, request, load → compile → warm up → generate, picture → JPEG."""

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger(__name__)

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
# `openvino` is this project's backend; the one that comes with OpenVINO stays selectable for comparison.
BACKEND_NAMES = {"openvino": "openvino_backend", "openvino_stock": "openvino"}
EXECUTABLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py")
MAX_PROMPT_CHARACTERS = 10_000
WARM_UP_STEPS = 2  # the first compiles; Inductor may compile again at the second


class ConfigError(ValueError):
    """A setting of model-config.yaml, or what it points to, that cannot be served."""


class RequestError(ValueError):
    """A request that cannot be answered with a picture; the client's fault.

    Attributes:
        param: the field at fault, or None for the body as a whole.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def _setting(default: Any, accepted: str, is_valid: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"accepted": accepted, "is_valid": is_valid})


def _switch(default: bool) -> Any:
    return _setting(default, "true or false", lambda value: isinstance(value, bool))


def _number(default: Any, low: int, high: int, *, whole: bool = True, multiple_of: int = 1, null: str = "") -> Any:
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
class GenerationRequest:
    """One picture to make, every field checked.

    Attributes:
        prompt: what the picture shows.
        num_inference_steps: the number of denoising steps.
        guidance_scale: how strongly the prompt steers; at 1 or below not at all.
        width: pixels.
        height: pixels.
    """

    prompt: str
    num_inference_steps: int
    guidance_scale: float
    width: int | None
    height: int | None

    @classmethod
    def parse(cls, body: bytes, content_type: str, config: HandlerConfig) -> Self:
        """Read a request: a JSON object with `prompt`, or the prompt itself as text.

        A body without a content type is JSON when it starts with a brace.

        Raises:
            RequestError: says what is wrong with the body.
        """
        try:
            text = body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from error
        if "json" in content_type or (not content_type and text.lstrip().startswith("{")):
            text = _read_prompt(text)
        _check_prompt(text)
        return cls(text, config.num_inference_steps, config.guidance_scale, config.width, config.height)


def _read_prompt(text: str) -> Any:
    try:
        fields_given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields_given, dict):
        raise RequestError(f'the body is JSON but no object such as {{"prompt": "a red fox"}}: it is {_shorten(text)}')
    for name in fields_given:
        if name != "prompt":
            raise RequestError(f"{_shorten(name)} is not a field; the fields are 'prompt'", param=name)
    if "prompt" not in fields_given:
        raise RequestError("prompt is missing; it takes a text", param="prompt")
    return fields_given["prompt"]


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str):
        raise RequestError(f"prompt takes a text, not {_shorten(prompt)}", param="prompt")
    if not prompt.strip():
        raise RequestError("prompt is empty; it takes a text", param="prompt")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise RequestError(
            f"prompt takes at most {MAX_PROMPT_CHARACTERS} characters, not {len(prompt)}", param="prompt"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError("prompt takes Unicode text, not a lone surrogate such as \\ud800", param="prompt")


def _shorten(value: Any, *, length: int = 60) -> str:
    """Return the value in plain ASCII and at most so many characters, fit for a message or a log line."""
    text = ascii(value)
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline that is ready to make pictures.

    Attributes:
        pipeline: the diffusers pipeline, its parts compiled.
        config: what it was loaded with.
        compilation: what it was compiled with.
        dtype: the type of its weights.
        parts: the compiled parts by name, each with its OpenVINOBackend, or None where another backend compiled it.
    """

    pipeline: Any
    config: HandlerConfig
    compilation: CompileConfig
    dtype: str
    parts: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """Return what runs, read off what was compiled so far; without a warm-up that is nothing before a request."""
        import torch

        report: dict[str, Any] = {
            "model_path": self.config.model_path,
            "dtype": self.dtype,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "backend": self.compilation.backend or "eager",
            "compiled_parts": list(self.parts),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        }
        if self.compilation.backend == "openvino":
            report["openvino"] = {
                name: [dataclasses.asdict(graph) for graph in backend.reports] for name, backend in self.parts.items()
            }
            report["graphs"] = sum(len(graphs) for graphs in report["openvino"].values())
        return report

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
    try:
        parts = compile_parts(pipeline, config, compilation)
        widen_latents(pipeline, dtype)
        loaded = LoadedPipeline(pipeline, config, compilation, dtype, parts)
        if config.warm_up:
            warm_up(loaded)
    except ConfigError:
        raise
    except Exception as error:  # each backend has errors of its own
        reason = _shorten(" ".join(str(error).split()), length=600)
        raise ConfigError(f"pt2.backend: {compilation.backend} cannot run this model: {reason}") from error
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
    return pipeline


def set_scheduler(pipeline: Any, name: str | None) -> None:
    """Replace the scheduler by the named one, with the settings of the model's own.

    Raises:
        ConfigError: not a scheduler that fits this model.
    """
    if name is None:
        return
    compatible = {scheduler.__name__: scheduler for scheduler in pipeline.scheduler.compatibles}
    if name not in compatible:
        raise ConfigError(f"handler.scheduler takes one of {', '.join(sorted(compatible))}, not {name!r}")
    try:
        pipeline.scheduler = compatible[name].from_config(pipeline.scheduler.config)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"handler.scheduler: {name} cannot be used here: {error}") from error


def compile_parts(pipeline: Any, config: HandlerConfig, compilation: CompileConfig) -> dict[str, Any]:
    """Compile the UNet, the VAE's decoder and the text encoders as configured; see LoadedPipeline.parts.

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
    for name, is_wanted in (
        ("unet", config.compile_unet),
        ("vae", config.compile_vae),
        ("text_encoder", config.compile_text_encoders),
        ("text_encoder_2", config.compile_text_encoders and config.is_xl),
    ):
        if not is_wanted:
            continue
        module = getattr(pipeline, name)
        if name.startswith("text_encoder"):
            # At its first call transformers hooks up the hidden states, behind a lock that dynamo cannot trace.
            module(torch.zeros(1, 1, dtype=torch.long, device=module.device), output_hidden_states=True)
        method = "decode" if name == "vae" else "forward"
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


def widen_latents(pipeline: Any, dtype: str) -> None:
    """Give the VAE, which stays in float32 where the rest is in float16, its latents in float32."""
    if dtype == "float16":
        decode = pipeline.vae.decode
        pipeline.vae.decode = lambda latents, **options: decode(latents.float(), **options)


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
    """Make one picture of the configured size, which compiles every part, and check that all parts were compiled.

    Raises:
        ConfigError: a part ran in eager PyTorch although it was to be compiled.
    """
    config = loaded.config
    steps = 1 if loaded.compilation.backend == "openvino" else min(WARM_UP_STEPS, config.num_inference_steps)
    request = GenerationRequest("warm-up", steps, config.guidance_scale, config.width, config.height)
    encode_jpeg(generate(loaded.pipeline, request), quality=config.jpeg_quality)
    report = loaded.describe()
    idle = [name for name, graphs in report.get("openvino", {}).items() if not graphs]
    if idle or report["graphs"] < len(loaded.parts):
        raise ConfigError(
            f"pt2.backend: {report['backend']} did not compile {', '.join(idle) or 'every part'}: {report}"
        )


def generate(pipeline: Any, request: GenerationRequest, *, on_step: Callable[[int, int], None] | None = None) -> Any:
    """Make one picture and return it as a Pillow image.

    Args:
        on_step: called after each denoising step with its number, from 1, and the number of steps; an exception it
            raises ends the work and reaches the caller.
    """

    def report_step(running: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(index + 1, running.num_timesteps)
        return tensors

    return pipeline(
        prompt=request.prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        callback_on_step_end=report_step,
    ).images[0]


def encode_jpeg(image: Any, *, quality: int) -> bytes:
    """Return a Pillow image as JPEG; quality from 1 to 100."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
