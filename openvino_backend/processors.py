"""Find the processors that this process may use, from its affinity and its control groups' quotas.

joblib's cpu_count reads the quota of the highest group only. In a container that is the container's. It misses groups
below, such as a systemd unit's. torch, OpenVINO and os.process_cpu_count read no quota.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SET_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Processors:
    """The processors that this process may use.

    Attributes:
        logical: the processors of its affinity mask.
        cores, sockets: the cores and sockets of these processors.
        quota: the processors that its control groups allow it, or None without a limit.
    """

    logical: int
    cores: int
    sockets: int
    quota: float | None

    @property
    def threads(self) -> int | None:
        """The threads that the quota allows, or None where it allows all cores.

        A part of a processor counts as a whole one: with 1.5, two threads do more than one.
        """
        if self.quota is None or math.ceil(self.quota) >= self.cores:
            return None
        return max(math.ceil(self.quota), 1)


def find_processors(root: Path = Path("/")) -> Processors:
    """Return the processors that this process may use.

    Args:
        root: the folder of proc and sys.
    """
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    folders = [root / f"sys/devices/system/cpu/cpu{number}/topology" for number in affinity]
    return Processors(
        logical=len(affinity),
        cores=len({_read_words(folder / "thread_siblings_list") or folder for folder in folders}),
        sockets=len({_read_words(folder / "physical_package_id") for folder in folders}),
        quota=min(_read_quotas(root), default=None),
    )


def limit_torch(processors: Processors) -> None:
    """Limit torch's threads to the quota, unless the environment sets their number."""
    import torch

    limit = processors.threads
    if limit is None or any(name in os.environ for name in _SET_BY_USER):
        return
    if limit < torch.get_num_threads():
        torch.set_num_threads(limit)


def limit_openvino(processors: Processors, device: str) -> dict[str, Any]:
    """Return the properties that limit OpenVINO's threads to the quota."""
    limit = processors.threads
    return {"INFERENCE_NUM_THREADS": limit} if limit is not None and device == "CPU" else {}


def _read_quotas(root: Path) -> Iterator[float]:
    """Yield the quota of each control group of this process. A quota holds for all groups below."""
    groups: dict[str, str] = {}
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    for line in _read_lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        top, point = mount.split()[3:5]
        kind, _, options = system.split()[:3]
        controller = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if controller not in groups or (controller and controller not in options.split(",")):
            continue
        # The mount may be a group itself, as in a container. Groups outside it cannot be read.
        below = Path(os.path.relpath(groups[controller], top))
        parts = () if ".." in below.parts else below.parts
        for depth in range(len(parts) + 1):
            yield from _read_quota(root.joinpath(point.lstrip("/"), *parts[:depth]))


def _read_quota(group: Path) -> Iterator[float]:
    """Yield a control group's quota in processors, if it has one."""
    words = _read_words(group / "cpu.max") or (
        *_read_words(group / "cpu.cfs_quota_us"),
        *_read_words(group / "cpu.cfs_period_us"),
    )
    # Without a limit it is `max` or negative.
    if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
        yield int(words[0]) / int(words[1])


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _read_words(path: Path) -> tuple[str, ...]:
    return tuple(" ".join(_read_lines(path)).split())
