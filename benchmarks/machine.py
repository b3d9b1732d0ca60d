"""What the figures were measured on: `python -m benchmarks.machine` prints it as JSON."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peak import measure_peak

_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
_PACKAGES = ("torch", "openvino", "nncf", "diffusers", "transformers")


def describe_machine() -> dict[str, Any]:
    """Return the processor, the memory, the versions, and the rate of matrix products in GFLOP/s by type."""
    import openvino
    import psutil
    import torch

    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    capabilities = list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return {
        "cpu": _read_info("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "flags": [each for each in _FLAGS if each in (_read_info("/proc/cpuinfo", "flags") or "").split()],
        "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
        "governor": governor.read_text().strip() if governor.exists() else "not told",
        "threads": torch.get_num_threads(),
        "thread_settings": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "KMP_"))},
        "openvino_capabilities": capabilities,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "peak_gigaflops": measure_peak("BF16" in capabilities),
    }


def _read_info(path: str, key: str) -> str | None:
    """Return the first value of a key in a file of /proc, or None."""
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def read_peak_memory() -> float:
    """Return the most gigabytes that this process has had resident, mapped files included."""
    return round(int(str(_read_info("/proc/self/status", "VmHWM")).split()[0]) * 1024 / 1e9, 2)


if __name__ == "__main__":
    print(json.dumps(describe_machine()))
