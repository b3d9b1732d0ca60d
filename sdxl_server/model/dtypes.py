"""Choose PyTorch's device, and the type of the weights for it."""

import dataclasses

from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError


def choose_device(device_type: str | None, *, gpu_id: int | None) -> str:
    """Return PyTorch's device. TorchServe falls back to the CPU without a word; this does not.

    Args:
        device_type: TorchServe's key `deviceType`; see `check_server_keys`.
        gpu_id: the GPU that TorchServe chose for this worker, if any.

    Raises:
        ConfigError: a GPU is configured or chosen, and PyTorch cannot use it.
    """
    import torch

    wanted = (device_type or "").lower()
    if wanted == "cpu" or (not wanted and gpu_id is None):
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu_id is not None and gpu_id < count:
        return f"cuda:{gpu_id}"
    default = "" if wanted else ", TorchServe's default where it finds a GPU,"
    chosen = "found no GPU" if gpu_id is None else f"chose GPU {gpu_id}"
    raise ConfigError(
        f"deviceType: gpu{default} needs a GPU with CUDA: PyTorch {torch.__version__} finds {count}, and TorchServe "
        f"{chosen}. Install PyTorch for CUDA and NVIDIA's driver, or use deviceType: cpu. "
        "(For an Intel GPU use deviceType: cpu and pt2: {backend: openvino, options: {device: GPU}}.)"
    )


def check_device(compilation: CompileConfig, *, device: str) -> None:
    """Refuse OpenVINO for a pipeline on CUDA.

    Raises:
        ConfigError: names the setting to change.
    """
    if device != "cpu" and compilation.backend == "openvino":
        raise ConfigError(
            f"deviceType: gpu puts PyTorch's tensors on {device}, and pt2.backend: openvino takes those of the CPU. "
            "Use deviceType: cpu or another backend. (For an Intel GPU use pt2: {options: {device: GPU}}.)"
        )


def choose_dtype(config: HandlerConfig, compilation: CompileConfig, *, device: str) -> tuple[str, CompileConfig]:
    """Return the type of the weights, and the compile options that make OpenVINO compute in another one.

    `auto` is the shortest type that the device computes in. On a CPU OpenVINO may compute in bfloat16 or 8 bits. Its
    weights then stay in float16, as published: they are mapped from the file and need no conversion.
    """
    if config.dtype != "auto":
        return config.dtype, compilation
    import openvino

    import openvino_backend

    options = openvino_backend.Options.parse(compilation.options if compilation.backend == "openvino" else None)
    if options.arithmetic is not None:
        return "float32" if options.arithmetic == "f32" and not options.is_lossy else "float16", compilation
    if device != "cpu":
        return "float16", compilation
    core, (_, targets) = openvino.Core(), openvino_backend.split_device(options.device)
    capabilities = set.intersection(*(set(core.get_property(name, "OPTIMIZATION_CAPABILITIES")) for name in targets))
    if "FP16" in capabilities and "CPU" not in targets:
        return "float16", compilation
    if "BF16" not in capabilities:
        return "float32", compilation
    if compilation.backend == "openvino_stock":  # in eager PyTorch it would run bfloat16
        return "float32", compilation
    if compilation.backend != "openvino":
        return "bfloat16", compilation
    given = {**(compilation.options or {}), "config": {**options.config, "INFERENCE_PRECISION_HINT": "bf16"}}
    return "float16", dataclasses.replace(compilation, options=given)
