"""What a process may use of the machine: affinity and quotas, from files like the kernel's and from real groups."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from openvino_backend.processors import Processors, find_processors

CPUS = sorted(os.sched_getaffinity(0))
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate"
V1 = "33 25 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct"
CPUSET = "34 25 0:30 {top} /sys/fs/cgroup/cpuset rw shared:12 - cgroup cgroup rw,cpuset"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"


def write_tree(root: Path, groups: str, mounts: str, quotas: Mapping[str, str]) -> Path:
    files = {"proc/self/cgroup": groups, "proc/self/mountinfo": f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mounts}"}
    for path, quota in quotas.items():
        group, _, _ = path.rpartition("/")
        if path.endswith("cpu.max"):
            files[f"sys/fs/cgroup/{path}"] = f"{quota} 100000\n"
        else:
            files[f"sys/fs/cgroup/{path}"] = f"{quota}\n"
            files[f"sys/fs/cgroup/{group}/cpu.cfs_period_us"] = "100000\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "mounts", "quotas", "expected"),
    [
        ("0::/\n", V2.format(top="/"), {"cpu.max": "150000"}, 1.5),
        ("0::/\n", V2.format(top="/"), {"cpu.max": "max"}, None),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "max", "a/cpu.max": "300000", "z/cpu.max": "100"}, 3),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "50000", "a/cpu.max": "300000"}, 0.5),
        ("0::/a/b\n", V2.format(top="/"), {"a/b/cpu.max": "400000", "a/cpu.max": "300000"}, 3),
        ("0::/kube/pod/c\n", V2.format(top="/kube/pod"), {"cpu.max": "200000", "c/cpu.max": "max"}, 2),
        ("0::/../x\n", V2.format(top="/"), {"cpu.max": "200000"}, 2),
        ("4:cpu,cpuacct:/\n0::/\n", V1.format(top="/"), {"cpu,cpuacct/cpu.cfs_quota_us": "-1"}, None),
        ("4:cpu,cpuacct:/a\n", V1.format(top="/"), {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000"}, 2.5),
        ("4:cpu,cpuacct:/docker/1\n", V1.format(top="/docker/1"), {"cpu,cpuacct/cpu.cfs_quota_us": "100000"}, 1),
        (
            "5:cpuset:/\n4:cpu,cpuacct:/a:b\n0::/a\n",
            "\n".join((CPUSET.format(top="/"), V1.format(top="/"), UNIFIED)),
            {"cpu,cpuacct/a:b/cpu.cfs_quota_us": "700000", "unified/a/cpu.max": "600000", "cpuset/cpu.max": "1"},
            6,
        ),
        ("4:cpu,cpuacct:/a\n", "", {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000"}, None),
        ("", V2.format(top="/"), {"cpu.max": "100000"}, None),
    ],
    ids=[
        *("v2", "v2 max", "v2 above", "v2 below", "v2 both", "v2 a mounted group", "v2 another namespace", "v1 none"),
        *("v1", "v1 docker", "hybrid", "not mounted", "in no group"),
    ],
)
def test_quota(tmp_path: Path, groups: str, mounts: str, quotas: dict[str, str], expected: float | None) -> None:
    assert find_processors(write_tree(tmp_path, groups, mounts, quotas)).quota == expected


def test_without_proc_and_sys(tmp_path: Path) -> None:
    assert find_processors(tmp_path) == Processors(logical=len(CPUS), cores=len(CPUS), sockets=1, quota=None)


@pytest.mark.skipif(len(CPUS) < 2, reason="it takes two processors to tell cores and sockets apart")
@pytest.mark.parametrize(
    ("siblings", "packages", "expected"), [(("0,8", "0,8"), "00", (1, 1)), (("0", "1"), "01", (2, 2))]
)
def test_cores_and_sockets(tmp_path: Path, siblings: tuple[str, str], packages: str, expected: tuple[int, int]) -> None:
    for index, number in enumerate(CPUS):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings[min(index, 1)]}\n")
        (folder / "physical_package_id").write_text(f"{packages[min(index, 1)]}\n")
    found = find_processors(tmp_path)
    assert (found.cores, found.sockets) == expected


@pytest.mark.parametrize(
    ("quota", "threads"), [(None, None), (16.0, None), (7.1, None), (7.0, 7), (1.5, 2), (1.0, 1), (0.2, 1)]
)
def test_threads_of_a_quota(quota: float | None, threads: int | None) -> None:
    assert Processors(logical=16, cores=8, sockets=1, quota=quota).threads == threads


PROGRAM = """
import dataclasses, json, os, pathlib, sys
group, config = sys.argv[1:]
if group:
    pathlib.Path(group, "cgroup.procs").write_text(str(os.getpid()))
import torch
from openvino_backend import CompiledFunction, find_processors, limit_torch
found = find_processors()
limit_torch(found)
module = torch.nn.Linear(16, 16).requires_grad_(False)
function = CompiledFunction(module.forward, {"config": json.loads(config)})
function(torch.zeros(4, 16))
openvino = function.backend.reports[0].models[0].threads
print(json.dumps([found.logical, found.quota, torch.get_num_threads(), openvino]))
"""


def run_program(*before: str, group: str = "", config: str = "{}", **environment: str) -> list[float | None]:
    """Return the processors, the quota, and the threads of torch and OpenVINO in a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    command = [*before, sys.executable, "-c", PROGRAM, group, config]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[float | None] = json.loads(done.stdout)
    return found


def test_affinity() -> None:
    assert run_program("taskset", "-c", str(CPUS[-1])) == [1, find_processors().quota, 1, 1]


@pytest.fixture
def group() -> Iterator[str]:
    """A real control group with one processor's time, and in it one without a limit."""
    for top, name, quota in (
        ("/sys/fs/cgroup", "cpu.max", "100000 100000"),
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "100000"),
    ):
        outer = Path(top, f"test-processors-{os.getpid()}")
        try:
            outer.mkdir()
        except OSError:
            continue
        try:
            if not (outer / name).exists():
                continue
            (outer / name).write_text(quota)
            (outer / "inner").mkdir()
            yield str(outer / "inner")
            (outer / "inner").rmdir()
            return
        finally:
            outer.rmdir()
    pytest.skip("no control group can be made here")


@pytest.mark.skipif(len(CPUS) < 2, reason="one processor is no limit")
def test_real_quota(group: str) -> None:
    assert run_program(group=group) == [len(CPUS), 1.0, 1, 1]
    own = run_program(group=group, config='{"INFERENCE_NUM_THREADS": 2}', OMP_NUM_THREADS="2")
    assert own == [len(CPUS), 1.0, 2, 2]
