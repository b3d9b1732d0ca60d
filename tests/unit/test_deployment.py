"""The files for HAProxy, containers and Kubernetes, checked without a cluster."""

import re
import shutil
import subprocess
from math import factorial
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

from tools.instances import find_haproxy
from tools.server import ROOT, read_shipped

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VERSION = "1.37"


def read_resources() -> list[dict[str, Any]]:
    """Return the resources of the base."""
    names = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())["resources"]
    return [each for name in names for each in yaml.safe_load_all((KUBERNETES / "base" / name).read_text())]


@pytest.mark.parametrize("resource", read_resources(), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_resources_are_as_kubernetes_takes_them(resource: dict[str, Any]) -> None:
    kubernetes_validate.validate(resource, VERSION, strict=True)


def test_a_misspelt_key_is_refused() -> None:
    resource = read_resources()[0]
    resource["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, VERSION, strict=True)


def make_strict(schema: Any) -> Any:
    """Return a schema that refuses the keys that it does not name."""
    if isinstance(schema, dict):
        known = {"additionalProperties": False} if "properties" in schema else {}
        return {**known, **{key: make_strict(value) for key, value in schema.items()}}
    return [make_strict(each) for each in schema] if isinstance(schema, list) else schema


def test_keda_takes_what_scales() -> None:
    """By the schema of KEDA 2.16, the newest packaged one."""
    schema = jsonschema.Draft202012Validator(make_strict(ScaledObject.model_json_schema()))
    scaled = yaml.safe_load((KUBERNETES / "keda/scaledobject.yaml").read_text())
    schema.validate(scaled)
    scaled["spec"]["pollInterval"] = scaled["spec"].pop("pollingInterval")
    with pytest.raises(jsonschema.ValidationError, match="'pollInterval' was unexpected"):
        schema.validate(scaled)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", ["base", "keda"])
def test_kustomize_puts_them_together(name: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert ("replicas" in made["Deployment", "instances"]["spec"]) == (name == "base")
    assert (("ScaledObject", "instances") in made) == (name == "keda")


def test_probes_ask_for_readiness() -> None:
    (instances,) = (
        each for each in read_resources() if each["metadata"]["name"] == "instances" and "replicas" in each["spec"]
    )
    (container,) = instances["spec"]["template"]["spec"]["containers"]
    probes = {name: container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {each["httpGet"]["path"] for each in probes.values()} == {"/ready"}
    startup = probes["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= read_shipped()["startupTimeout"]


def test_numbers_of_the_balancers_agree() -> None:
    balancer = (KUBERNETES / "base/haproxy.cfg").read_text()
    scaled = yaml.safe_load((KUBERNETES / "keda/scaledobject.yaml").read_text())
    assert set(re.findall(r"server-template sdxl (\d+)", balancer)) == {str(scaled["spec"]["maxReplicaCount"])}
    (query,) = (each["metadata"]["query"] for each in scaled["spec"]["triggers"])
    assert set(re.findall(r'proxy="(\w+)"', query)) <= set(re.findall(r"^backend (\w+)", balancer, re.M))
    limit = re.findall(r"queue\(pictures\) ge (\d+)", balancer)
    assert limit == re.findall(r"queue\(pictures\) ge (\d+)", (DEPLOY / "haproxy.cfg").read_text())


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
@pytest.mark.parametrize("path", [DEPLOY / "haproxy.cfg", KUBERNETES / "base/haproxy.cfg"])
def test_haproxy_takes_its_configuration(path: Path) -> None:
    done = subprocess.run([find_haproxy() or "", "-c", "-f", path], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_is_made_of_what_there_is() -> None:
    text = (DEPLOY / "container/Dockerfile").read_text()
    taken = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()}
    assert all((ROOT / name).exists() for name in taken)
    let_in = re.findall(r"^!(\S+)$", (DEPLOY / "container/Dockerfile.dockerignore").read_text(), re.M)
    assert taken == set(let_in)
    compose = yaml.safe_load((DEPLOY / "container/compose.yaml").read_text())
    assert compose["services"]["sdxl"]["read_only"]


def test_erlang_c_in_the_docs_is_right() -> None:
    """One worker waits for its load, two at a load of 1 for a third; Erlang's sum gives the others."""
    scaling = (ROOT / "docs/scaling.md").read_text()
    (code,) = re.findall(r"```python\n(.+?)```", scaling, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # the formula as a reader runs it
    share = names["compute_waiting_share"]
    assert [share(1, 0.5), share(2, 1)] == pytest.approx([0.5, 1 / 3])
    for line in re.findall(r"^\| (\d+) \| ([\d. |]+) \|$", scaling, re.M):
        workers, cells = int(line[0]), list(map(float, line[1].split(" | ")))
        for busy, shown in zip((0.5, 0.7, 0.8, 0.9, 0.95), cells, strict=True):
            load = workers * busy
            queued = load**workers / factorial(workers) / (1 - busy)
            waiting = queued / (sum(load**n / factorial(n) for n in range(workers)) + queued)
            assert share(workers, load) == pytest.approx(waiting)
            assert shown == pytest.approx(waiting / (workers - load), abs=0.006)
