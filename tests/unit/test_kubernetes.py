"""The files for Kubernetes, put together by kubectl and checked without a cluster."""

import functools
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import psutil
import pytest
import requests

from tests.unit.instances import UNKNOWN_USER, Instance, has_ipv6, wait_until
from tests.unit.manifests import (
    KUBECTL,
    KUBERNETES,
    build,
    get_container,
    list_containers,
    list_pods,
    list_volumes,
    read,
    validate,
)
from tests.unit.test_container import read_copied
from tools.postgres import LocalPostgres, find_postgres
from tools.proxy import LocalProxy, find_nginx
from tools.server import ROOT, find_free_ports, read_shipped

OVERLAYS = sorted(
    path.parent.name for path in KUBERNETES.glob("*/kustomization.yaml") if "kind: Kustomization\n" in path.read_text()
)
SCALED = {"keda": ["instances"], "complete-keda": ["instances", "workers"]}
PAGE = (ROOT / "docs/containers.md").read_text()
pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def test_page_has_every_overlay() -> None:
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.M)) == OVERLAYS


@each_overlay
def test_overlays_are_as_kubernetes_takes_them(overlay: str) -> None:
    for resource in read(overlay).values():
        validate(resource)


@pytest.mark.parametrize(
    ("resource", "path", "key"),
    [
        (("Deployment", "instances"), ("spec", "template", "spec"), "initContainer"),
        (("Job", "download"), ("spec",), "backofLimit"),
        (("ScaledObject", "instances"), ("spec",), "pollInterval"),
        (("TriggerAuthentication", "jobs"), ("spec",), "secretTarget"),
    ],
)
def test_misspelt_keys_are_refused(resource: tuple[str, str], path: tuple[str, ...], key: str) -> None:
    wrong = build(KUBERNETES / "complete-keda")[resource]
    functools.reduce(lambda place, name: place[name], path, wrong)[key] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)


@each_overlay
def test_names_lead_to_something(overlay: str) -> None:
    """Services and policies choose pods and their ports, and all that pods mount or read exists."""
    resources = read(overlay)
    pods = [pod for _, pod in list_pods(resources)]
    held = {kind: {name for own, name in resources if own == kind} for kind, _ in resources}
    for (kind, name), resource in resources.items():
        if kind not in ("Service", "NetworkPolicy", "PodDisruptionBudget"):
            continue
        spec = resource["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        labels = selector.get("matchLabels", selector).items()
        chosen = [pod for pod in pods if labels <= pod["metadata"]["labels"].items()]
        assert chosen, name
        ports = {port["name"] for pod in chosen for each in list_containers(pod) for port in each.get("ports", [])}
        assert {each["targetPort"] for each in spec.get("ports", [])} <= ports
    for pod in pods:
        claims = list_volumes(pod, "persistentVolumeClaim").values()
        assert {each["claimName"] for each in claims} <= held["PersistentVolumeClaim"]
        assert {each["name"] for each in list_volumes(pod, "configMap").values()} <= held["ConfigMap"]
        secrets = {each["secretName"] for each in list_volumes(pod, "secret").values()}
        secrets |= {each["secretRef"]["name"] for own in list_containers(pod) for each in own.get("envFrom", [])}
        assert secrets <= set(re.findall(r"kubectl create secret \w+ ([\w-]+)", PAGE))  # the operator's
        volumes = {each["name"] for each in pod["spec"].get("volumes", [])}
        mounted = {each["name"] for own in list_containers(pod) for each in own.get("volumeMounts", [])}
        assert mounted == volumes


@each_overlay
def test_images_come_from_no_registry_by_accident(overlay: str) -> None:
    for _, pod in list_pods(read(overlay)):
        for each in list_containers(pod):
            assert re.fullmatch(r"(localhost|[\w-]+(\.[\w-]+)+)/[\w./-]+:(?!latest)[\w.-]+", each["image"])


def test_one_line_sets_the_image_of_all_overlays(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    images = tmp_path / "kubernetes/images/kustomization.yaml"
    text, edited = images.read_text(), "newName: ghcr.io/me/fox, newTag: v7}"
    images.write_text(re.sub(r"newName: registry.example.org/sdxl, newTag: .*\}", edited, text))
    for overlay in OVERLAYS:
        pods = list_pods(build(tmp_path / "kubernetes" / overlay))
        used = {each["image"] for _, pod in pods for each in list_containers(pod)}
        assert {each for each in used if not each.startswith("docker.io/library/")} == {"ghcr.io/me/fox:v7"}


@each_overlay
def test_pods_run_what_the_image_holds(overlay: str) -> None:
    """The instances ask for no API key: HAProxy has none."""
    known = subprocess.run(
        [sys.executable, "-m", "sdxl_server.serving.container", "--help"], capture_output=True, text=True, timeout=60
    ).stdout
    assert get_container(read(overlay), "instances")["args"] == ["--open"]
    assert "--open" in known
    for _, pod in list_pods(read(overlay)):
        for each in list_containers(pod):
            if each["image"].partition(":")[0].endswith("/sdxl"):
                for path in re.findall(r"/opt/sdxl/([\w./-]+)", repr(each)):
                    assert any(Path(path).is_relative_to(target) for target in read_copied().values()), path


@each_overlay
def test_model_arrives_where_instances_read_it(overlay: str) -> None:
    resources = read(overlay)
    job, instances = resources["Job", "download"]["spec"]["template"], resources["Deployment", "instances"]
    pod = instances["spec"]["template"]
    claims = [list_volumes(each, "persistentVolumeClaim") for each in (job, pod)]
    assert claims == [{"models": {"claimName": "models"}}] * 2
    for each, is_read_only in ((job, False), (pod, True)):
        mounts = {mount["name"]: mount for own in list_containers(each) for mount in own["volumeMounts"]}
        assert mounts["models"]["mountPath"] == "/models"
        assert mounts["models"].get("readOnly", False) == is_read_only


def test_instances_wait_until_the_model_is_complete(tmp_path: Path) -> None:
    """The Job's own command, for the demonstration model, and the wait of the instances."""
    resources = read("base")
    (waiting,) = resources["Deployment", "instances"]["spec"]["template"]["spec"]["initContainers"]
    (download,) = resources["Job", "download"]["spec"]["template"]["spec"]["containers"]

    def localise(words: list[str]) -> list[str]:
        return [
            word.replace("/models", str(tmp_path)).replace("/opt/sdxl", str(ROOT)).replace("sleep 2", "sleep 0.1")
            for word in words
        ]

    with subprocess.Popen(localise(waiting["command"])) as process:
        time.sleep(0.5)
        assert process.poll() is None
        python, *words = localise([*download["command"], "--model", "demo"])
        assert python == "python"
        subprocess.run([sys.executable, *words], check=True, timeout=120, stdout=subprocess.DEVNULL)
        assert process.wait(timeout=30) == 0


@each_overlay
def test_volumes_are_ones_that_clusters_have(overlay: str) -> None:
    """A claim that one node can mount, with all of its pods there. Those that scale need more."""
    resources = read(overlay)
    modes = {
        name: each["spec"]["accessModes"] for (kind, name), each in resources.items() if kind == "PersistentVolumeClaim"
    }
    assert set(map(tuple, modes.values())) == {("ReadWriteMany",) if overlay in SCALED else ("ReadWriteOnce",)}
    for _, pod in list_pods(resources):
        claims = list_volumes(pod, "persistentVolumeClaim")
        affinity = pod["spec"].get("affinity")
        assert (affinity is not None) == (bool(claims) and overlay not in SCALED)
        if affinity:
            (term,) = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
            near = [
                other
                for _, other in list_pods(resources)
                if term["labelSelector"]["matchLabels"].items() <= other["metadata"]["labels"].items()
            ]
            assert near
            assert all(claims.items() <= list_volumes(other, "persistentVolumeClaim").items() for other in near)
        assert all(each.get("sizeLimit") for each in list_volumes(pod, "emptyDir").values())
    assert "cache" in list_volumes(resources["Deployment", "instances"]["spec"]["template"], "emptyDir")


@each_overlay
def test_no_pod_takes_more_than_it_asks_for(overlay: str) -> None:
    for _, pod in list_pods(read(overlay)):
        for each in list_containers(pod):
            assert each["resources"]["requests"] == each["resources"]["limits"]
            assert set(each["resources"]["limits"]) == {"cpu", "memory"}


@each_overlay
def test_pods_finish_their_requests(overlay: str) -> None:
    """An hour for those with requests. The balancer's successor waits, because two would have two queues."""
    resources = read(overlay)
    balancer = resources["Deployment", "balancer"]["spec"]
    assert (balancer["replicas"], balancer["strategy"]) == (1, {"type": "Recreate"})
    queue = re.findall(r"timeout queue (\d+)s", (KUBERNETES / "base/haproxy.cfg").read_text())
    for name, pod in list_pods(resources):
        if name in ("balancer", "instances", "nginx", "workers"):
            assert pod["spec"]["terminationGracePeriodSeconds"] > int(queue[0])


@each_overlay
def test_openshift_chooses_the_users(overlay: str, tmp_path: Path) -> None:
    """Elsewhere they are numbers: Kubernetes cannot see whether a name is root."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [kubernetes/{overlay}]\ncomponents: [kubernetes/openshift]\n"
    )
    for resources, is_open in ((read(overlay), False), (build(tmp_path), True)):
        for _, pod in list_pods(resources):
            context = pod["spec"]["securityContext"]
            assert context["runAsNonRoot"]
            assert ({"runAsUser", "runAsGroup", "fsGroup"} & context.keys() == set()) == is_open
            assert is_open or context["runAsUser"] > 0
            for each in list_containers(pod):
                own = each["securityContext"]
                assert own["readOnlyRootFilesystem"]
                assert "runAsUser" not in own


@each_overlay
def test_prometheus_finds_the_metrics(overlay: str) -> None:
    resources = read(overlay)
    for name in ("instances", "balancer"):
        annotations = resources["Deployment", name]["spec"]["template"]["metadata"]["annotations"]
        ports = {each["name"]: each["containerPort"] for each in get_container(resources, name)["ports"]}
        assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": str(ports["metrics"])}


@pytest.mark.parametrize("overlay", SCALED)
def test_keda_scales_by_every_queue(overlay: str) -> None:
    resources = read(overlay)
    scaled = {name: each["spec"] for (kind, name), each in resources.items() if kind == "ScaledObject"}
    assert sorted(scaled) == SCALED[overlay]
    for name, spec in scaled.items():
        assert "replicas" not in resources["Deployment", spec["scaleTargetRef"]["name"]]["spec"]
        assert spec["fallback"]["replicas"] > spec["minReplicaCount"]
        for trigger in spec["triggers"]:
            if trigger["type"] == "prometheus":
                assert trigger["metadata"]["ignoreNullValues"] == "false"
            else:
                secret = resources["TriggerAuthentication", trigger["authenticationRef"]["name"]]["spec"]
                (reference,) = secret["secretTargetRef"]
                assert (reference["name"], reference["key"]) == ("jobs", "JOBS_DATABASE")
                assert get_container(resources, "workers")["envFrom"] == [{"secretRef": {"name": "jobs"}}]
        kinds = [each["type"] for each in spec["triggers"]]
        assert kinds == ["prometheus"] * (name == "instances") + ["postgresql"] * (overlay == "complete-keda")


def test_numbers_of_the_balancers_agree() -> None:
    balancer = (KUBERNETES / "base/haproxy.cfg").read_text()
    (trigger,) = read("keda")["ScaledObject", "instances"]["spec"]["triggers"]
    most = read("keda")["ScaledObject", "instances"]["spec"]["maxReplicaCount"]
    assert set(re.findall(r"server-template sdxl (\d+)", balancer)) == {str(most)}
    proxies = set(re.findall(r'proxy="(\w+)"', trigger["metadata"]["query"]))
    assert proxies <= set(re.findall(r"^backend (\w+)", balancer, re.M))
    limit = re.findall(r"queue\(pictures\) ge (\d+)", balancer)
    assert limit == re.findall(r"queue\(pictures\) ge (\d+)", (ROOT / "deploy/haproxy.cfg").read_text())


def test_probes_ask_for_readiness() -> None:
    instances = get_container(read("base"), "instances")
    probes = {name: instances[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {each["httpGet"]["path"] for each in probes.values()} == {"/ready"}
    startup = probes["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= read_shipped()["startupTimeout"]


@each_overlay
def test_rollouts_need_no_room_on_one_node(overlay: str) -> None:
    instances = read(overlay)["Deployment", "instances"]["spec"]
    surge = int(overlay in SCALED)
    assert instances["strategy"]["rollingUpdate"] == {"maxUnavailable": 1 - surge, "maxSurge": surge}
    assert instances.get("replicas") == (None if overlay in SCALED else 1 if overlay == "one-node" else 2)


@pytest.mark.skipif(find_nginx() is None, reason="nginx and openssl are not installed")
@pytest.mark.filterwarnings("ignore:Unverified HTTPS")
def test_nginx_of_a_cluster_is_the_shipped_one() -> None:
    """As its pod makes it. Only ports, folders and the addresses of Services differ.

    Where this is root, it runs as a user without a name.
    """
    pod = read("complete")["Deployment", "nginx"]["spec"]["template"]["spec"]
    (files,), (nginx,) = pod["initContainers"], pod["containers"]
    with Instance() as balancer, Instance() as jobs, LocalProxy(1) as keys:
        (port,) = find_free_ports(1)
        folder = keys.folder / "cluster"
        script = files["command"][-1].replace("/files", str(folder)).replace("/opt/sdxl/web", f"{ROOT}/web")
        script = script.replace("/opt/sdxl/deploy", f"{ROOT}/deploy")
        subprocess.run([*files["command"][:-1], script], check=True, timeout=30)
        text = (folder / "nginx.conf").read_text()
        temporary = re.findall(r"\w+_temp_path \w+;\n", keys.make_configuration())
        text = text.replace("\nhttp {\n", "\nhttp {\n" + "".join(temporary))
        command = " ".join([*nginx["command"][1:3], "-p", str(folder), "-e", f"{folder}/error.log"])
        for shipped, changed in {
            "/opt/sdxl": folder,
            "/etc/nginx/sdxl": keys.folder,
            "/etc/nginx/tls": keys.folder,
            "/var/log/nginx": folder,
            "balancer:8079": f"127.0.0.1:{balancer.server_port}",
            "jobs:8090": f"127.0.0.1:{jobs.server_port}",
            "8443": port,
        }.items():
            assert shipped in text
            text, command = text.replace(shipped, str(changed)), command.replace(shipped, str(changed))
        (folder / "nginx.conf").write_text(text)
        user = UNKNOWN_USER if os.geteuid() == 0 else None
        for each in (folder, *keys.folder.glob("*")):
            os.chown(each, user or -1, -1)
        own = nginx["command"][-1].replace("/var/cache/nginx", str(folder))
        process = psutil.Popen([find_nginx() or "nginx", *command.split(), "-g", own], user=user)
        try:
            wait_until(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
            assert len(process.children()) == 2
            for host in ("127.0.0.1", *(["[::1]"] if has_ipv6() else [])):
                url = f"https://{host}:{port}"
                ask = functools.partial(requests.request, timeout=30, verify=False)
                assert "<html" in ask("GET", f"{url}/").text
                assert ask("POST", f"{url}/v1/images/generations", data="{}").status_code == 401
                for path, reached in (("/v1/images/generations", balancer), ("/jobs", jobs)):
                    before = reached.answered
                    assert ask("POST", f"{url}{path}", data="{}", headers=keys.get_headers()).status_code == 200
                    assert reached.answered == before + 1
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.mark.skipif(find_postgres() is None, reason="postgresql is not installed")
def test_jobs_start_and_are_counted(tmp_path: Path) -> None:
    """The pod's own commands, on all addresses, and KEDA's query."""
    resources = read("complete-keda")
    pod = resources["Deployment", "jobs"]["spec"]["template"]["spec"]
    (tables,), (api,) = pod["initContainers"], pod["containers"]
    (query,) = {
        trigger["metadata"]["query"]
        for (kind, _), each in resources.items()
        if kind == "ScaledObject"
        for trigger in each["spec"]["triggers"]
        if trigger["type"] == "postgresql"
    }
    (port,) = find_free_ports(1)
    with LocalPostgres() as postgres:
        own = {"JOBS_DATABASE": postgres.address, "JOBS_RESULTS": str(tmp_path)}
        environment = {**os.environ, **own, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(tables["command"], check=True, cwd=ROOT, env=environment, timeout=60)
        command = [each.replace("8090", str(port)) for each in api["command"]]
        with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
            try:
                for host in ("127.0.0.1", *(["[::1]"] if has_ipv6() else [])):
                    url = f"http://{host}:{port}{api['readinessProbe']['httpGet']['path']}"
                    wait_until(functools.partial(answers, url))
                assert postgres.run_sql(query).strip() == "0"
                assert requests.post(url, json={"prompt": "a red fox"}, timeout=30).status_code == 202
                assert postgres.run_sql(query).strip() == "1"
            finally:
                process.terminate()


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.ConnectionError:
        return False
