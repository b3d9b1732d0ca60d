"""The resources of deploy/kubernetes, as kubectl puts them together."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import kubernetes_validate
import yaml
from cloudcoil.models.keda import v1alpha1 as keda

from tools.server import ROOT

KUBERNETES = ROOT / "deploy/kubernetes"
VERSION = "1.37"
# `make build/kubectl/kubectl` gets one.
KUBECTL = shutil.which("kubectl", path=f"{ROOT / 'build/kubectl'}{os.pathsep}{os.environ['PATH']}")
Resources = dict[tuple[str, str], dict[str, Any]]


def build(folder: Path) -> Resources:
    done = subprocess.run([KUBECTL or "", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}


@functools.cache
def read(overlay: str) -> Resources:
    return build(KUBERNETES / overlay)


def list_pods(resources: Resources) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the template of each Deployment's and Job's pods."""
    for (kind, name), resource in resources.items():
        if kind in ("Deployment", "Job"):
            yield name, resource["spec"]["template"]


def list_containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def list_volumes(pod: dict[str, Any], kind: str) -> dict[str, Any]:
    return {each["name"]: each[kind] for each in pod["spec"].get("volumes", []) if kind in each}


def get_container(resources: Resources, name: str) -> dict[str, Any]:
    (found,) = resources["Deployment", name]["spec"]["template"]["spec"]["containers"]
    return cast(dict[str, Any], found)


def make_strict(schema: Any) -> Any:
    """Return a schema that refuses the keys that it does not name."""
    if isinstance(schema, dict):
        known = {"additionalProperties": False} if "properties" in schema else {}
        return {**known, **{key: make_strict(value) for key, value in schema.items()}}
    return [make_strict(each) for each in schema] if isinstance(schema, list) else schema


def validate(resource: dict[str, Any]) -> None:
    """By Kubernetes' own schemas, and those of KEDA 2.16, the newest packaged ones."""
    if resource["apiVersion"].startswith("keda.sh/"):
        schema = make_strict(getattr(keda, resource["kind"]).model_json_schema())
        jsonschema.Draft202012Validator(schema).validate(resource)
    else:
        kubernetes_validate.validate(resource, VERSION, strict=True)
