"""The `handler` and `pt2` sections of model-config.yaml; each setting is declared once here."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sdxl_server.config.adapter_settings import read_adapters
from sdxl_server.config.sections import SCHEDULER, any_text, read_section, setting
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import (
    choice,
    describe_schema,
    is_valid,
    real,
    shares,
    shorten,
    switch,
    whole,
)

logger = logging.getLogger(__name__)

MIN_SIDE, MAX_SIDE = 64, 4096  # pixels
MIN_CALLS = 4  # of the UNet, where some are extrapolated
COUNT = whole(1, 2**31 - 1)  # what TorchServe counts with
PUBLISHED_KEYS_WITHOUT_EFFECT = {
    "change_comp_config": "Inductor's settings go in pt2: {options: ...}",
    "compile_mode": "use pt2: {mode: ...}",
    "do_quant": "8 bits are the openvino backend's: pt2: {options: {weight_compression: int8_sym, ...}}",
    "enable_fused_projections": "the compilers fuse by themselves",
    "no_bf16": "use dtype: float32",
    "no_sdpa": "scaled_dot_product_attention is always used",
    "upcast_vae": "beside weights in float16 the VAE is in float32 already",
}
# `openvino` is this project's backend; the one that comes with OpenVINO stays selectable for comparison.
BACKEND_NAMES = {"openvino": "openvino_backend", "openvino_stock": "openvino"}


@dataclass(frozen=True)
class HandlerConfig:
    """The `handler` section of model-config.yaml."""

    model_path: str = setting(
        "Base_Diffusion_model",
        any_text("a folder"),
        "folder of the diffusers pipeline, inside the archive or absolute",
    )
    vae_path: str | None = setting(
        None,
        any_text("a folder"),
        "folder of a VAE in the place of the model's own, inside the archive or absolute, such as sdxl-vae-fp16-fix; "
        "with a tiny one (AutoencoderTiny, TAESDXL) pictures are decoded sooner and lack fine detail: lossy",
        null="the model's own",
    )
    weights_sha256: str | None = setting(
        None,
        {"type": "string", "pattern": "^[0-9a-f]{64}$", "x-accepted": "a SHA-256 in 64 hexadecimal digits"},
        "the digest that the weights must have, as `describe` tells it (it depends on `dtype`)",
        null="any weights",
    )
    is_xl: bool | None = setting(
        None,
        switch(),
        "true: Stable Diffusion XL; false: Stable Diffusion 1.x or 2.x; the load fails where the model is another",
        null="as the model says",
    )
    dtype: str = setting(
        "auto",
        choice("auto", "float32", "bfloat16", "float16"),
        "type of the weights, and of the arithmetic where `pt2` says no other; `auto`: float16 on a GPU and for "
        "OpenVINO on a CPU, which computes in bfloat16 or 8 bits from it, bfloat16 for other backends, and float32 "
        "where the arithmetic is float32",
    )
    scheduler: str | Mapping[str, Any] | None = setting(
        None,
        SCHEDULER,
        "the sampler of requests that name none, such as DPM++ 2M Karras or {name: UniPC, solver_order: 3}",
        null="the model's own",
    )
    adapters: Sequence[Any] | None = setting(
        None,
        {"type": "array", "maxItems": 100, "x-accepted": "a list of adapters, each of the keys below"},
        "adapters (LoRA)",
        null="none",
    )
    max_adapter_rank: int = setting(128, whole(1, 1024), "sum of the ranks of the adapters that a request names")
    num_inference_steps: int | None = setting(
        None,
        whole(1, 1000),
        "denoising steps",
        null="30, or as a few-step model's own scheduler says: see docs/models.md",
    )
    guidance_scale: float | None = setting(
        None,
        real(0, 100),
        "how strongly the prompt steers; at 1 or below not at all",
        null="5, or as such a few-step model needs",
    )
    unet_calls: int | None = setting(
        None,
        whole(MIN_CALLS, 2000),
        "calls of the UNet to make for a picture, the others forecast; lossy, see docs/benchmarks.md",
        null="all",
    )
    guidance_interval: Sequence[float] | None = setting(
        None,
        shares(),
        "shares of the denoising between which the prompt steers; outside it a step costs half",
        null="all",
    )
    width: int | None = setting(
        None, whole(MIN_SIDE, MAX_SIDE, multiple_of=8), "pixels", null="the model's own, 1024 for SDXL base"
    )
    height: int | None = setting(None, whole(MIN_SIDE, MAX_SIDE, multiple_of=8), "pixels", null="the model's own")
    vae_tile_side: int | None = setting(
        None,
        whole(MIN_SIDE, MAX_SIDE, multiple_of=32),
        "pixels; what is larger than its square is decoded in overlapping tiles of this side, which bounds the memory: "
        "lossy, see docs/models.md",
        null="all is decoded whole",
    )
    jpeg_quality: int = setting(90, whole(1, 100), "of JPEG and WebP")
    embed_parameters: bool = setting(
        True, switch(), "keep prompt, seed and all else that makes a picture again in its file"
    )
    weighted_prompts: bool = setting(
        False,
        switch(),
        "read prompts as A1111's users write them, `(word:1.3)`, `[word]` and `BREAK`, and more than 77 tokens in "
        "chunks; brackets are then no longer plain",
    )
    preview: str = setting(
        "fast",
        choice("fast", "exact"),
        "of a picture on its way: `exact`: decoded as the picture is, which costs as much each time; `fast`: in "
        "milliseconds, without fine detail, by colours fitted to the VAE at the warm-up; the picture is the same",
    )
    allowed_sizes: Sequence[str] | None = setting(
        None,
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "pattern": r"^[1-9]\d{1,3}x[1-9]\d{1,3}$"},
            "x-accepted": "a list of sizes such as 1024x1024, in multiples of 8",
        },
        "no others are made",
        null="any",
    )
    max_side: int = setting(2048, whole(MIN_SIDE, MAX_SIDE), "of a picture, in pixels")
    max_steps: int = setting(150, whole(1, 1000), "denoising steps of a request")
    max_images: int = setting(10, whole(1, 100), "pictures of a request")
    max_megapixel_steps: float = setting(
        350, real(0.001, 1e6), "pictures × calls of the UNet × megapixels of a request; a step is one call or two"
    )
    max_prompt_characters: int = setting(2000, whole(1, 3000), "of each of its prompts")
    max_timeout: float = setting(3600, real(1, 1e6), "seconds of work on a request")
    graphs: str | None = setting(
        None,
        choice("static", "dynamic", "both"),
        "of openvino, which sizes a graph is for: `dynamic`: one graph for all sizes; `static`: one for each of "
        "`allowed_sizes`, or for the size above alone, faster, each with a copy of the weights; `both`: one for the "
        "size above and one for all others",
        null="static where `allowed_sizes` holds one size, or else dynamic",
    )
    max_running: int = setting(
        3, whole(1, 1000), "requests that make steps: the picture under way, and those behind it, which make the first"
    )
    max_waiting: int = setting(
        5, whole(0, 1000), "requests behind them that wait, told their place; one more is answered with 503"
    )
    compile_unet: bool = setting(True, switch(), "compile the UNet with `pt2`")
    compile_vae: bool = setting(
        True, switch(), "compile the VAE with `pt2`; its encoder at the first request with an image"
    )
    compile_text_encoders: bool = setting(True, switch(), "compile the text encoders with `pt2`")
    warm_up: bool = setting(
        True,
        switch(),
        "before the worker is ready make a picture for each graph, of `allowed_sizes` or the size above, and a small "
        "one for a graph of any size, in as few steps as compile everything, so that no user waits for compilation; "
        "the VAE's encoder is left to the first image, but for an inpainting model",
    )
    metrics_address: str | None = setting(
        None,
        {"type": "string", "pattern": r"^[\w.-]+:\d{1,5}$", "x-accepted": "host:port"},
        "where each worker answers GET /metrics, for Prometheus, and /ready, without a token; one for each worker, of "
        "loopback or a network that is closed to others, such as 127.0.0.1:9108",
        null="nowhere",
    )
    profile: bool = setting(False, switch(), "log the time of each stage of each request, in milliseconds")

    @classmethod
    def parse(cls, raw: Any) -> Self:
        """Check the section and return it.

        Raises:
            ConfigError: names the key, what is accepted and what was given.
        """
        raw = {} if raw is None else raw
        if isinstance(raw, Mapping):
            ignored = {key: PUBLISHED_KEYS_WITHOUT_EFFECT[key] for key in raw if key in PUBLISHED_KEYS_WITHOUT_EFFECT}
            if ignored:
                logger.warning(
                    "These keys of the handler section have no effect: %s",
                    "; ".join(f"{key} ({advice})" for key, advice in ignored.items()),
                )
                raw = {key: value for key, value in raw.items() if key not in ignored}
        config: Self = read_section(cls, raw, "handler")
        config = dataclasses.replace(config, adapters=read_adapters(config.adapters or ()) or None)
        for width, height in config.read_sizes():
            if width % 8 or height % 8 or not MIN_SIDE <= min(width, height) <= max(width, height) <= config.max_side:
                raise ConfigError(
                    f"handler.allowed_sizes takes sides that are multiples of 8 from {MIN_SIDE} to max_side, "
                    f"{config.max_side}, not {width}x{height}"
                )
        return config

    def read_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the allowed sizes as width and height in pixels, none where any is allowed."""
        split = (size.partition("x") for size in self.allowed_sizes or ())
        return tuple((int(width), int(height)) for width, _, height in split)


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile's keywords as the `pt2` section gives them. `backend` None means eager PyTorch."""

    backend: str | None = setting(
        None,
        any_text("the name of a torch.compile backend"),
        "openvino, inductor, openvino_stock, or another of torch.compile's",
    )
    mode: str | None = setting(
        None, any_text("a mode of torch.compile"), "of inductor, such as reduce-overhead; not beside `options`"
    )
    dynamic: bool | None = setting(None, switch(), "torch.compile's; openvino takes false only", null="its default")
    fullgraph: bool | None = setting(None, switch(), "torch.compile's; openvino takes true only", null="its default")
    options: Mapping[str, Any] | None = setting(
        None,
        {"type": "object", "x-accepted": "the backend's options by name"},
        "the backend's own; those of openvino stand below",
        null="none",
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
                raise ConfigError(f"pt2 with a compile section takes nothing else, not {shorten(raw)}")
            section, raw = "pt2.compile", dict(raw["compile"])
            enable = raw.pop("enable", False)
            if not isinstance(enable, bool):
                raise ConfigError(f"pt2.compile.enable takes true or false, not {shorten(enable)}")
            if not enable:
                return cls()
        if isinstance(raw, Mapping):
            raw = {"backend": "inductor", **raw}  # torch.compile's own default
        config: Self = read_section(cls, raw, section)
        config._check_backend(section)
        return config

    def _check_backend(self, section: str) -> None:
        import torch

        names = sorted({*torch._dynamo.list_backends(), *BACKEND_NAMES})
        if self.backend not in names:
            raise ConfigError(f"{section}.backend takes one of {', '.join(names)}, not {shorten(self.backend)}")
        if self.backend == "openvino":
            from openvino_backend import Options

            try:
                Options.parse(self.options)
            except ValueError as error:  # OptionsError, or a number that Python refuses to write
                raise ConfigError(f"{section}.options: {error}") from error
            # What dynamo cannot trace would run in eager PyTorch, and OpenVINO is told each shape.
            if self.dynamic or self.fullgraph is False:
                raise ConfigError(f"{section}: openvino compiles each part whole, with dynamic: false, fullgraph: true")
        if self.mode is not None and self.backend != "inductor":
            raise ConfigError(f"{section}.mode belongs to the inductor backend, not to {shorten(self.backend)}")
        if self.mode is not None and self.options is not None:
            raise ConfigError(f"{section} takes mode or options, not both: torch.compile derives one from the other")
        if self.mode is not None and self.mode not in (modes := torch._inductor.list_mode_options()):
            raise ConfigError(f"{section}.mode takes one of {', '.join(modes)}, not {shorten(self.mode)}")


def check_server_keys(settings: Any) -> None:
    """Refuse keys of TorchServe's that it reads as something else.

    Raises:
        ConfigError: names the key, what is accepted and what was given.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"model-config.yaml takes keys and values, not {shorten(settings)}")
    for key in ("jobQueueSize", "responseTimeout"):
        if key in settings and not is_valid(settings[key], COUNT):
            raise ConfigError(
                f"{key} takes {describe_schema(COUNT)}, not {shorten(settings[key])}, in whose place TorchServe would "
                "take a number of its own"
            )
