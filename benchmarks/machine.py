"""Describe the machine that figures come from."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8")
_PACKAGES = ("torch", "openvino", "nncf", "diffusers", "transformers")


def describe_machine() -> dict[str, Any]:
    """Return the processor, the memory and the versions."""
    import openvino
    import psutil
    import torch

    return {
        "cpu": _read_info("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "flags": [each for each in _FLAGS if each in (_read_info("/proc/cpuinfo", "flags") or "").split()],
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": torch.get_num_threads(),
        "openvino_capabilities": list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def read_peak_memory() -> float:
    """Return the highest resident memory of this process in gigabytes, with mapped files."""
    return round(int(str(_read_info("/proc/self/status", "VmHWM")).split()[0]) * 1024 / 1e9, 2)


def _read_info(path: str, key: str) -> str | None:
    """Return the first value of a key in a file of /proc, or None."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
