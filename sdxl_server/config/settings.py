"""The `handler` section of model-config.yaml and TorchServe's own keys, each setting declared once."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sdxl_server.config.adapter_settings import read_adapter_settings
from sdxl_server.config.control_settings import read_control_settings
from sdxl_server.config.declaration import SCHEDULER, declare, read_section
from sdxl_server.config.embedding_settings import read_embedding_settings
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import any_text, choice, describe_schema, is_valid, real, shares, shorten, switch, whole

logger = logging.getLogger(__name__)

MIN_SIDE, MAX_SIDE = 64, 4096  # pixels
MIN_CALLS = 4  # UNet calls, if some steps are extrapolated
DEVICE_TYPES = ("cpu", "gpu")  # of TorchServe, which takes another one for cpu or gpu
TORCHSERVE_COUNT = whole(1, 2**31 - 1)  # TorchServe's integers
PUBLISHED_KEYS_WITHOUT_EFFECT = {
    "change_comp_config": "Inductor's settings go in pt2: {options: ...}",
    "compile_mode": "use pt2: {mode: ...}",
    "do_quant": "8-bit weights are an option of openvino: pt2: {options: {weight_compression: int8_sym, ...}}",
    "enable_fused_projections": "the compilers fuse projections themselves",
    "no_bf16": "use dtype: float32",
    "no_sdpa": "scaled_dot_product_attention is always used",
    "upcast_vae": "with weights in float16 the VAE is in float32 already",
}


@dataclass(frozen=True)
class HandlerConfig:
    """The `handler` section of model-config.yaml."""

    model_path: str = declare(
        any_text("a folder"),
        "folder of the diffusers pipeline, inside the archive or absolute",
        value="Base_Diffusion_model",
    )
    vae_path: str | None = declare(
        any_text("a folder"),
        "folder of another VAE, such as sdxl-vae-fp16-fix, inside the archive or absolute; a tiny one "
        "(AutoencoderTiny, TAESDXL) decodes faster, without fine detail: lossy",
        value=None,
        null="the model's own",
    )
    safety_checker: str | None = declare(
        choice("model"),
        "`model`: the model's own safety checker (Stable Diffusion 1.x) checks each image; a flagged one is an error; "
        "previews are off; see docs/models.md",
        value=None,
        null="no check",
    )
    filter: str | None = declare(
        {"type": "string", "pattern": r"^[\w.]+:\w+$", "x-accepted": "package.module:function"},
        "your function that sees each request, image and preview, and may refuse it; see docs/security.md",
        value=None,
        null="no filter",
    )
    weights_sha256: str | None = declare(
        {"type": "string", "pattern": "^[0-9a-f]{64}$", "x-accepted": "a SHA-256 in 64 hexadecimal digits"},
        "required digest of the weights, as `describe` reports it; it depends on `dtype`",
        value=None,
        null="any weights",
    )
    is_xl: bool | None = declare(
        switch(),
        "true: Stable Diffusion XL; false: Stable Diffusion 1.x or 2.x; another model is an error",
        value=None,
        null="as the model says",
    )
    dtype: str = declare(
        choice("auto", "float32", "bfloat16", "float16"),
        "type of the weights, and of the arithmetic unless `pt2` changes it; `auto`: float16 on a GPU and for OpenVINO "
        "on a CPU (computed in bfloat16 or 8 bits), float32 for float32 arithmetic and openvino_stock, bfloat16 for "
        "other backends",
        value="auto",
    )
    scheduler: str | Mapping[str, Any] | None = declare(
        SCHEDULER,
        "default sampler, such as DPM++ 2M Karras or {name: UniPC, solver_order: 3}",
        value=None,
        null="the model's own",
    )
    adapters: Sequence[Any] | None = declare(
        {"type": "array", "maxItems": 100, "x-accepted": "a list of adapters, each of the keys below"},
        "adapters (LoRA)",
        value=None,
        null="none",
    )
    max_adapter_rank: int = declare(whole(1, 1024), "maximum sum of the ranks of a request's adapters", value=128)
    embeddings: Sequence[Any] | None = declare(
        {"type": "array", "maxItems": 100, "x-accepted": "a list of embeddings, each of the keys below"},
        "embeddings (textual inversion), which prompts name",
        value=None,
        null="none",
    )
    controls: Sequence[Any] | None = declare(
        {"type": "array", "maxItems": 20, "x-accepted": "a list of controls, each of the keys below"},
        "models that follow a control image, such as edges (ControlNet, T2I-Adapter, IP-Adapter)",
        value=None,
        null="none",
    )
    max_controls: int = declare(whole(1, 10), "maximum controls of a request, each with an image", value=2)
    upscaler_path: str | None = declare(
        any_text("a .safetensors file"),
        "file of an upscaler (ESRGAN, Real-ESRGAN, SPAN and others that spandrel reads), inside the archive or "
        "absolute; needs `pip install --no-deps -r requirements-upscaler.txt`; see docs/models.md",
        value=None,
        null="none",
    )
    num_inference_steps: int | None = declare(
        whole(1, 1000),
        "default denoising steps",
        value=None,
        null="30, or the steps of a few-step model: see docs/models.md",
    )
    guidance_scale: float | None = declare(
        real(0, 100),
        "default guidance: how strongly the prompt guides the image; 1 or less: no guidance",
        value=None,
        null="5, or the guidance of a few-step model",
    )
    unet_calls: int | None = declare(
        whole(MIN_CALLS, 2000),
        "default UNet calls per image; other steps are extrapolated: lossy, see docs/benchmarks.md",
        value=None,
        null="all",
    )
    guidance_interval: Sequence[float] | None = declare(
        shares(),
        "from which to which share of the denoising guidance applies; other steps cost half: lossy",
        value=None,
        null="all",
    )
    width: int | None = declare(
        whole(MIN_SIDE, MAX_SIDE, multiple_of=8),
        "default width in pixels",
        value=None,
        null="the model's own, 1024 for SDXL base",
    )
    height: int | None = declare(
        whole(MIN_SIDE, MAX_SIDE, multiple_of=8), "default height in pixels", value=None, null="the model's own"
    )
    vae_tile_side: int | None = declare(
        whole(MIN_SIDE, MAX_SIDE, multiple_of=32),
        "pixels; larger images are decoded in overlapping tiles of this side, which limits the memory: lossy, see "
        "docs/models.md",
        value=None,
        null="no tiles",
    )
    jpeg_quality: int = declare(whole(1, 100), "default quality of JPEG and WebP", value=90)
    embed_parameters: bool = declare(
        switch(), "store prompt, seed and all other parameters in each image file", value=True
    )
    marking: str = declare(
        choice("xmp", "c2pa", "none"),
        "how files say that a model made the image, for machines: `xmp`: XMP with IPTC's DigitalSourceType; `c2pa`: a "
        "signed C2PA manifest as well, which needs `pip install c2pa-python`; see docs/security.md",
        value="xmp",
    )
    c2pa_certificate: str | None = declare(
        any_text("a PEM file"), "the certificate chain that signs C2PA manifests, in PEM", value=None, null="none"
    )
    c2pa_key: str | None = declare(
        any_text("a PEM file"), "the certificate's private key, in PEM", value=None, null="none"
    )
    c2pa_algorithm: str = declare(
        choice("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"),
        "the algorithm of that key",
        value="es256",
    )
    weighted_prompts: bool = declare(
        switch(),
        "accept A1111's prompt syntax, `(word:1.3)`, `[word]` and `BREAK`, and more than 77 tokens in chunks; brackets "
        "are then not plain text",
        value=False,
    )
    lora_tags: bool = declare(
        switch(),
        "apply A1111's tags in prompts, such as `<lora:outline:0.8>`, as adapters; false: they are left out, with a "
        "warning",
        value=False,
    )
    empty_negative_prompt: str = declare(
        choice("text", "zeros"),
        'what `negative_prompt: ""` means; `text`: the embedding of an empty text, as in diffusers; `zeros`: the same '
        "as without the field, which SDXL draws with zeros, as in A1111",
        value="text",
    )
    preview: str = declare(
        choice("fast", "exact"),
        "previews during generation; `exact`: by the VAE, each as slow as the decoding of the image; `fast`: in "
        "milliseconds without fine detail, with colours fitted to the VAE at the warm-up. The final image is the same",
        value="fast",
    )
    allowed_sizes: Sequence[str] | None = declare(
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "string", "pattern": r"^[1-9]\d{1,3}x[1-9]\d{1,3}$"},
            "x-accepted": "a list of sizes such as 1024x1024, in multiples of 8",
        },
        "the only sizes of images",
        value=None,
        null="any size",
    )
    max_side: int = declare(whole(MIN_SIDE, MAX_SIDE), "largest width and height of an image, in pixels", value=2048)
    max_upscaled_side: int = declare(
        whole(MIN_SIDE, 4 * MAX_SIDE), "largest width and height of an upscaled image, in pixels", value=4096
    )
    max_steps: int = declare(whole(1, 1000), "maximum denoising steps of a request", value=150)
    max_images: int = declare(whole(1, 100), "maximum images of a request", value=10)
    max_megapixel_steps: float = declare(
        real(0.001, 1e6),
        "maximum of images × UNet calls × megapixels of a request; a step has one call or two",
        value=350,
    )
    max_prompt_characters: int = declare(whole(1, 3000), "maximum characters of each prompt", value=2000)
    max_timeout: float = declare(real(1, 1e6), "maximum seconds of work on a request", value=3600)
    graphs: str | None = declare(
        choice("static", "dynamic", "both"),
        "image sizes of openvino's graphs; `dynamic`: one graph for all sizes; `static`: one for each of "
        "`allowed_sizes`, or only for the default size: faster, with a copy of the weights in each graph; `both`: one "
        "for the default size and one for all others",
        value=None,
        null="static if `allowed_sizes` has one size, dynamic otherwise",
    )
    max_running: int = declare(
        whole(1, 1000),
        "requests that make steps: the current one, and the next ones, which make their first step",
        value=3,
    )
    max_waiting: int = declare(
        whole(0, 1000), "requests that wait behind them and get their place in the queue; one more gets 503", value=5
    )
    compile_unet: bool = declare(switch(), "compile the UNet with `pt2`", value=True)
    compile_vae: bool = declare(
        switch(), "compile the VAE with `pt2`; its encoder at the first request with an image", value=True
    )
    compile_text_encoders: bool = declare(switch(), "compile the text encoders with `pt2`", value=True)
    warm_up: bool = declare(
        switch(),
        "before the worker is ready, generate an image of few steps for each graph, so that no user waits for "
        "compilation; the VAE's encoder waits for the first uploaded image, except for inpainting models",
        value=True,
    )
    metrics_address: str | None = declare(
        {
            "type": "string",
            "pattern": r"^([\w.-]+|\[[\w:.%]+\]):\d{1,5}$",
            "x-accepted": "host:port, or [IPv6 address]:port",
        },
        "where each worker serves GET /metrics, for Prometheus, and /ready, without an API key; one per worker, on "
        "loopback or a private network, such as 127.0.0.1:9108",
        value=None,
        null="nowhere",
    )
    drain_file: str | None = declare(
        {"type": "string", "minLength": 1, "x-accepted": "a path"},
        "while this file exists, /ready of `metrics_address` answers 503, so that a balancer sends no new requests",
        value=None,
        null="never",
    )
    profile: bool = declare(switch(), "log the time of each stage of each request, in milliseconds", value=False)

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
        config = dataclasses.replace(
            config,
            adapters=read_adapter_settings(config.adapters or ()) or None,
            embeddings=read_embedding_settings(config.embeddings or ()) or None,
            controls=read_control_settings(config.controls or ()) or None,
        )
        for width, height in config.read_sizes():
            if width % 8 or height % 8 or not MIN_SIDE <= min(width, height) <= max(width, height) <= config.max_side:
                raise ConfigError(
                    f"handler.allowed_sizes takes sides that are multiples of 8 from {MIN_SIDE} to max_side, "
                    f"{config.max_side}, not {width}x{height}"
                )
        return config

    def read_sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the allowed sizes (width, height) in pixels, none if any size is allowed."""
        split = (size.partition("x") for size in self.allowed_sizes or ())
        return tuple((int(width), int(height)) for width, _, height in split)


def check_server_keys(settings: Any) -> None:
    """Refuse values of TorchServe's own keys that it would replace silently.

    Raises:
        ConfigError: names the key, what is accepted and what was given.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"model-config.yaml takes keys and values, not {shorten(settings)}")
    device = settings.get("deviceType")
    if device is not None and str(device).lower() not in DEVICE_TYPES:
        raise ConfigError(
            f"deviceType takes {' or '.join(DEVICE_TYPES)}, not {shorten(device)}: gpu is one with CUDA. An Intel GPU "
            "is chosen with pt2: {backend: openvino, options: {device: GPU}}"
        )
    for key in ("jobQueueSize", "responseTimeout"):
        if key in settings and not is_valid(settings[key], TORCHSERVE_COUNT):
            raise ConfigError(
                f"{key} takes {describe_schema(TORCHSERVE_COUNT)}, not {shorten(settings[key])}; TorchServe would use "
                "its own default instead"
            )


def check_is_text(file: Path) -> None:
    """Refuse a model-config.yaml that TorchServe cannot read, if it exists.

    Raises:
        ConfigError: it is not UTF-8, with or without a byte order mark.
    """
    raw = file.read_bytes() if file.exists() else b""
    try:
        is_text = "\0" not in raw.decode("utf-8")
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        raise ConfigError(
            f"{file.name} is not UTF-8 (PowerShell's > and some editors write UTF-16): save it as UTF-8, for "
            "example with `iconv -f UTF-16 -t UTF-8`, and make the archive again"
        )
