"""Reading a pipeline from its folder, in the type that the device computes in."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdxl_server.config.settings import CompileConfig, HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.model.families import Family
from sdxl_server.model.folders import find_variant
from sdxl_server.model.vaes import check_vae, read_vae
from sdxl_server.schemas import shorten

# An index of shards may name files of any suffix, and what is no safetensors is read as a pickle.
SUFFIXES = frozenset((".jpeg", ".jpg", ".json", ".md", ".model", ".png", ".safetensors", ".txt", ".webp"))
NAMES = frozenset((".gitattributes", ".gitignore", "LICENSE", "NOTICE"))


@contextlib.contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn what goes wrong in a block into a ConfigError that begins with these words: each library has its own kinds.

    Raises:
        ConfigError: one that the block raises passes as it is.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = shorten(" ".join(str(error).split()), length=600)
        raise ConfigError(f"{what}: {type(error).__name__}: {reason}") from error


def check_files(folder: Path, *, remedy: str) -> None:
    """Refuse a folder with files of other kinds than a pipeline has, since they could run code when they are loaded.

    Subfolders that are links are looked into as well.

    Args:
        remedy: the command that copies what is needed of it.

    Raises:
        ConfigError: names the file.
    """

    def fail(error: OSError) -> None:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error

    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(each for each in folders if os.path.realpath(os.path.join(place, each)) not in seen)
        for name in sorted(names):
            if os.path.splitext(name)[1] not in SUFFIXES and name not in NAMES:
                raise ConfigError(
                    f"{os.path.join(place, name)} could run code when it is loaded; the folder of a model takes "
                    f"weights in .safetensors, and {', '.join(sorted(SUFFIXES - {'.safetensors'}))}; what is needed of "
                    f"it is copied by: {remedy}"
                )


def check_device(compilation: CompileConfig, *, device: str) -> None:
    """Refuse OpenVINO beside a pipeline on CUDA.

    Raises:
        ConfigError: says what to set.
    """
    if device != "cpu" and compilation.backend == "openvino":
        raise ConfigError(
            f"deviceType: gpu puts PyTorch's tensors on {device}, and pt2.backend: openvino takes those of the CPU; "
            "use deviceType: cpu (an Intel GPU is chosen by pt2: {options: {device: GPU}}), or another backend"
        )


def choose_dtype(config: HandlerConfig, compilation: CompileConfig, *, device: str) -> tuple[str, CompileConfig]:
    """Return the type of the weights and, where OpenVINO is to compute in another, the options that say so.

    `auto` is the shorter type that the device computes in, or else float32. For OpenVINO's arithmetic on a CPU in
    bfloat16 or 8 bits the weights stay in float16, the type they are published in: they are mapped from the file
    instead of converted.
    """
    if config.dtype != "auto":
        return config.dtype, compilation
    options = dict(compilation.options or {}) if compilation.backend == "openvino" else {}
    if options.get("precision") is not None:
        return "float32" if options["precision"] == "f32" else "float16", compilation
    import openvino

    import openvino_backend

    if device != "cpu":
        return "float16", compilation
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


def read_pipeline(folder: Path, dtype: str, family: Family, *, vae: Path | None = None) -> Any:
    """Read the pipeline from its safetensors; nothing is downloaded and no code of the folder runs.

    Each library raises errors of its own where a part is missing or broken.

    Args:
        vae: the folder of a VAE in the place of the pipeline's own.

    Raises:
        ConfigError: the VAE is another model's.
    """
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    # Pipelines warn with the end of a prompt that is too long; the client is told, and the log holds it once already.
    diffusers.utils.logging.get_logger("diffusers.pipelines").setLevel("ERROR")
    transformers.utils.logging.disable_progress_bar()
    # In float16 SDXL's VAE overflows. diffusers would convert it there and back for each picture, compiled or not.
    dtypes = {"default": torch.float16, "vae": torch.float32} if dtype == "float16" else getattr(torch, dtype)
    _settle_order()
    pipeline_class = getattr(diffusers, family.text_to_image)
    others = {} if vae is None else {"vae": read_vae(vae, dtypes["vae"] if isinstance(dtypes, dict) else dtypes)}
    pipeline = pipeline_class.from_pretrained(
        folder, dtype=dtypes, variant=find_variant(folder), use_safetensors=True, local_files_only=True, **others
    )
    check_vae(pipeline.vae, channels=pipeline.unet.config.out_channels, own=folder / "vae")
    pipeline.set_progress_bar_config(disable=True)
    # The VAE has the type that it is to run in; with this set, diffusers would convert it for each image it encodes.
    pipeline.vae.register_to_config(force_upcast=False)
    return pipeline


def _settle_order() -> None:
    """Make text encoders known to transformers in one order, before diffusers makes them in another in each process.

    transformers keeps the classes of what it has made, and torch's checks of a kept trace see their order.
    """
    import torch
    import transformers

    with torch.device("meta"):
        for kind in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection):
            kind(transformers.CLIPTextConfig(num_hidden_layers=1))
