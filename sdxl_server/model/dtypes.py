"""Choose the type of the weights for the device."""

import dataclasses

from sdxl_server.config.settings import CompileConfig, HandlerConfig
from sdxl_server.errors import ConfigError


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
    options = dict(compilation.options or {}) if compilation.backend == "openvino" else {}
    if options.get("precision") is not None:
        return "float32" if options["precision"] == "f32" else "float16", compilation
    import openvino

    import openvino_backend

    if device != "cpu":
        return "float16", compilation
    core, (_, targets) = openvino.Core(), openvino_backend.split_device(options.get("device", "CPU"))
    capabilities = set.intersection(*(set(core.get_property(name, "OPTIMIZATION_CAPABILITIES")) for name in targets))
    if "FP16" in capabilities and "CPU" not in targets:
        return "float16", compilation
    if "BF16" not in capabilities:
        return "float32", compilation
    if compilation.backend != "openvino":
        return "bfloat16", compilation
    options["config"] = {"INFERENCE_PRECISION_HINT": "bf16", **options.get("config", {})}
    return "float16", dataclasses.replace(compilation, options=options)
