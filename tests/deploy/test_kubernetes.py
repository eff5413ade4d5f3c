"""The manifests, read as files; and, where kubectl is, as kustomize builds them."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from service.console.trial import TrialLimits
from service.settings import Settings
from service.sources import options
from tests.deploy.files import (
    BASE,
    K8S,
    SINGLE,
    STREAM_BYTES,
    Document,
    compose,
    env_file,
    find,
    image_environment,
    instructions,
    manifests,
    settings_from,
    tool,
    version,
)
from tests.needs import program

FOLDERS = [path.parent for path in sorted(K8S.rglob("kustomization.yaml"))]
MANIFESTS = [path for path in sorted(K8S.rglob("*.yaml")) if path.name not in ("kustomization.yaml", "sources.yaml")]
KAFKA = K8S / "overlays" / "kafka"
SCHEMA = Path(__file__).with_name("scaledobject.schema.json")
WORKLOADS = ("Deployment", "StatefulSet")


def name_of(path: Path) -> str:
    return str(path.relative_to(K8S))


def kustomization(folder: Path) -> Document:
    document: Document = yaml.safe_load((folder / "kustomization.yaml").read_text())
    return document


def build(folder: Path) -> list[Document]:
    kubectl = program("kubectl", "kubectl")  # which holds kustomize
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(name="deployment")
def deployment_fixture() -> Document:
    return find(manifests(BASE), "Deployment", "onset")


@pytest.fixture(name="pod")
def pod_fixture(deployment: Document) -> Document:
    pod: Document = deployment["spec"]["template"]["spec"]
    return pod


@pytest.fixture(name="container")
def container_fixture(pod: Document) -> Document:
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container


@pytest.fixture(name="settings")
def settings_fixture() -> Settings:
    return settings_from(image_environment() | env_file(BASE / "onset.env"))


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_a_manifest_fulfils_the_api_schema_strictly(path: Path) -> None:
    done = tool("kubernetes-validate", "--strict", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_kustomization_names_every_file_of_its_folder_and_no_other(folder: Path) -> None:
    content = kustomization(folder)
    resources = [entry for entry in content["resources"] if not (folder / entry).is_dir()]
    patches = [patch["path"] for patch in content.get("patches", []) if "path" in patch]
    env_files = [
        name for generator in content.get("configMapGenerator", []) for kind in ("envs", "files") for name in generator.get(kind, [])
    ]
    there = {path.name for path in folder.iterdir()} - {"kustomization.yaml"}
    assert {*resources, *patches, *env_files} == there
    assert all((folder / entry / "kustomization.yaml").exists() for entry in content["resources"] if entry not in resources)


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_what_kustomize_builds_fulfils_the_api_schema_strictly(folder: Path, tmp_path: Path) -> None:
    built = tmp_path / "built.yaml"
    built.write_text(yaml.safe_dump_all(build(folder)))
    done = tool("kubernetes-validate", "--strict", built)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != KAFKA], ids=name_of)
def test_every_selector_finds_a_workload_of_the_same_folder(folder: Path) -> None:
    documents = manifests(folder)
    pods = [d["spec"]["template"]["metadata"]["labels"] for d in documents if d["kind"] in WORKLOADS]
    selectors = [d["spec"]["selector"]["matchLabels"] for d in documents if d["kind"] in (*WORKLOADS, "PodDisruptionBudget")]
    selectors += [d["spec"]["selector"] for d in documents if d["kind"] == "Service"]
    selectors += [d["spec"]["podSelector"]["matchLabels"] for d in documents if d["kind"] == "NetworkPolicy"]
    spread = [c for d in documents if d["kind"] in WORKLOADS for c in d["spec"]["template"]["spec"].get("topologySpreadConstraints", [])]
    selectors += [constraint["labelSelector"]["matchLabels"] for constraint in spread]
    assert selectors
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in pods), selector


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_every_named_port_is_a_port_of_the_pods_behind_it(folder: Path) -> None:
    documents = manifests(folder)
    for service in (d for d in documents if d["kind"] == "Service"):
        behind = [
            d["spec"]["template"]["spec"]["containers"]
            for d in documents
            if d["kind"] in WORKLOADS and service["spec"]["selector"].items() <= d["spec"]["template"]["metadata"]["labels"].items()
        ]
        names = {port["name"] for containers in behind for container in containers for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_every_pod_fulfils_the_restricted_security_standard_with_a_read_only_root(folder: Path) -> None:
    for pod in (d["spec"]["template"]["spec"] for d in manifests(folder) if d["kind"] in WORKLOADS):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert all(set(volume) & {"emptyDir", "configMap", "secret", "persistentVolumeClaim"} for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_every_setting_is_known_to_the_service_and_accepted(settings: Settings, container: Document) -> None:
    assert settings.host == "0.0.0.0"
    assert container["ports"] == [{"name": "http", "containerPort": settings.port, "protocol": "TCP"}]
    assert {entry["name"].removeprefix("ONSET_").lower() for entry in container["env"]} == {"redis_url", "instance"}


def test_a_restart_in_its_pod_is_known_by_the_pods_uid(container: Document) -> None:
    (instance,) = [entry for entry in container["env"] if entry["name"] == "ONSET_INSTANCE"]
    assert instance["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.uid"}}


def test_the_stores_url_comes_from_a_secret_and_is_in_no_file_of_the_base(container: Document) -> None:
    (url,) = [entry for entry in container["env"] if entry["name"] == "ONSET_REDIS_URL"]
    assert url["valueFrom"] == {"secretKeyRef": {"name": "onset-redis", "key": "url"}}
    assert not [path for path in BASE.iterdir() if "redis://" in path.read_text()]


def test_kubernetes_waits_longer_than_the_pause_and_both_halves_of_the_drain(
    settings: Settings, pod: Document, container: Document
) -> None:
    command, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= float(pause) + 2 * settings.drain_seconds + 10


def test_a_backtest_of_the_page_fits_beside_the_replica(settings: Settings, container: Document) -> None:
    trial = TrialLimits(settings.backtest_bytes, settings.backtest_rows, settings.backtest_seconds)
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    busy, begun = 600 * 2**20, 100 * 2**20  # a replica of many streams; the backtest's process before it reads the file
    assert busy + begun + trial.memory < limit


def test_a_lost_store_takes_a_pod_out_of_the_service_and_restarts_none(container: Document) -> None:
    assert container["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}
    assert container["startupProbe"]["httpGet"] == {"path": "/health/live", "port": "http"}


def test_service_links_are_off_because_they_would_overwrite_the_port_setting(pod: Document) -> None:
    assert find(manifests(BASE), "Service", "onset")["metadata"]["name"] == "onset"
    assert pod["enableServiceLinks"] is False


def test_pods_run_as_the_images_user(pod: Document) -> None:
    (user,) = [rest for name, rest in instructions() if name == "USER"]
    assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"


def test_a_rollout_and_a_drained_node_leave_replicas_serving(deployment: Document) -> None:
    scaler = find(manifests(BASE), "HorizontalPodAutoscaler", "onset")["spec"]
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert find(manifests(BASE), "PodDisruptionBudget", "onset")["spec"]["maxUnavailable"] == 1
    assert scaler["minReplicas"] >= 2
    assert "replicas" not in deployment["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}


def test_traffic_in_is_http_and_traffic_out_is_names_and_the_store(settings: Settings) -> None:
    policy = find(manifests(BASE), "NetworkPolicy", "onset")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == ["http"]
    assert [port["port"] for rule in policy["egress"] for port in rule["ports"]] == [53, 53, 6379, 6380]


def test_images_and_labels_name_the_projects_version() -> None:
    base = kustomization(BASE)
    assert base["images"] == [{"name": "onset", "newTag": version()}]
    assert base["labels"][0]["pairs"]["app.kubernetes.io/version"] == version()
    assert base["labels"][0]["includeSelectors"] is False


def test_the_cluster_runs_the_store_that_compose_runs() -> None:
    (store,) = find(manifests(SINGLE), "StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"]
    assert store["image"] == compose()["services"]["redis"]["image"]
    assert store["args"] == compose()["services"]["redis"]["command"]


def test_the_built_overlay_joins_the_service_to_its_store() -> None:
    documents = build(SINGLE)
    (container,) = find(documents, "Deployment", "onset")["spec"]["template"]["spec"]["containers"]
    secret = find(documents, "Secret", "onset-redis")
    assert container["env"][0]["valueFrom"]["secretKeyRef"]["name"] == secret["metadata"]["name"]
    assert container["envFrom"][0]["configMapRef"]["name"] == find(documents, "ConfigMap", "onset")["metadata"]["name"]
    assert container["image"] == f"onset:{version()}"
    assert {d["metadata"].get("namespace", "onset") for d in documents} == {"onset"}
    assert secret["data"].keys() == {"url"}


def test_new_streams_are_refused_before_the_overlays_store_is_full() -> None:
    documents = build(SINGLE)
    settings = settings_from(find(documents, "ConfigMap", "onset")["data"])
    (store,) = find(documents, "StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"]
    memory = store["args"][store["args"].index("--maxmemory") + 1]
    assert settings.max_streams * STREAM_BYTES < int(memory.removesuffix("mb")) * 2**20


def test_the_built_overlay_lets_only_the_service_reach_the_store_and_the_service_only_the_store() -> None:
    documents = build(SINGLE)
    service = find(documents, "Deployment", "onset")["spec"]["template"]["metadata"]["labels"]
    store = find(documents, "StatefulSet", "valkey")["spec"]["template"]["metadata"]["labels"]
    (entry,) = find(documents, "NetworkPolicy", "valkey")["spec"]["ingress"]
    names, out = find(documents, "NetworkPolicy", "onset")["spec"]["egress"]
    assert entry["from"][0]["podSelector"]["matchLabels"].items() <= service.items()
    assert not entry["from"][0]["podSelector"]["matchLabels"].items() <= store.items()
    assert [port["port"] for port in names["ports"]] == [53, 53]
    assert out["to"][0]["podSelector"]["matchLabels"].items() <= store.items()


def test_keda_scales_the_deployment_on_the_lag_of_the_group_that_the_source_is_of() -> None:
    done = tool("check-jsonschema", "--schemafile", SCHEMA, KAFKA / "scaledobject.yaml")
    assert done.returncode == 0, done.stdout
    scaled = find(manifests(KAFKA), "ScaledObject", "onset")["spec"]
    lag, cpu = scaled["triggers"]
    [source] = options.read(str(KAFKA / "sources.yaml"))
    assert isinstance(source, options.KafkaSource)
    assert (lag["metadata"]["bootstrapServers"], lag["metadata"]["consumerGroup"]) == (source.brokers, source.group)
    assert [lag["metadata"]["topic"]] == list(source.topics)
    assert lag["metadata"]["offsetResetPolicy"] == source.start
    base = find(manifests(BASE), "HorizontalPodAutoscaler", "onset")["spec"]
    assert scaled["scaleTargetRef"] == base["scaleTargetRef"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (base["minReplicas"], base["maxReplicas"])
    assert cpu["metadata"]["value"] == str(base["metrics"][0]["resource"]["target"]["averageUtilization"])


@pytest.mark.parametrize("change", [{"triggers": []}, {"minReplicas": 2}, {"triggers": [{"type": "kafka", "metadata": {"topic": "a"}}]}])
def test_a_scaled_object_that_means_nothing_is_found(change: Document, tmp_path: Path) -> None:
    document = yaml.safe_load((KAFKA / "scaledobject.yaml").read_text())
    document["spec"] |= change
    wrong = tmp_path / "scaledobject.yaml"
    wrong.write_text(yaml.safe_dump(document))
    assert tool("check-jsonschema", "--schemafile", SCHEMA, wrong).returncode == 1


def test_the_built_kafka_overlay_has_its_sources_and_one_autoscaler() -> None:
    documents = build(KAFKA)
    assert not [d for d in documents if d["kind"] == "HorizontalPodAutoscaler"]
    pod = find(documents, "Deployment", "onset")["spec"]["template"]["spec"]
    [volume] = [volume for volume in pod["volumes"] if volume["name"] == "sources"]
    settings = find(documents, "ConfigMap", "onset")["data"]
    sources = find(documents, "ConfigMap", "onset-sources")
    assert volume["configMap"]["name"] == sources["metadata"]["name"]
    assert {"name": "sources", "mountPath": "/sources", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert settings["ONSET_SOURCES"] == "/sources/sources.yaml"
    assert settings["ONSET_PORT"] == "8080"
    ports = [port["port"] for rule in find(documents, "NetworkPolicy", "onset")["spec"]["egress"] for port in rule["ports"]]
    assert 9092 in ports


def documented(page: str, language: str, begins: str) -> str:
    """A block of a page of docs/, by its language and how it begins."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", (K8S.parent / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [text for text in (textwrap.dedent(block) for _, block in blocks) if text.startswith(begins)]
    return found


def test_the_documented_password_is_the_stores_its_probes_and_the_services(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    mine = tmp_path / "k8s" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(
        f"namespace: onset\nresources: [../single]\n{documented('deploy.md', 'yaml', 'secretGenerator:')}"
    )
    documents = build(mine)
    (store,) = find(documents, "StatefulSet", "valkey")["spec"]["template"]["spec"]["containers"]
    [variable] = store["env"]
    secret = find(documents, "Secret", variable["valueFrom"]["secretKeyRef"]["name"])
    password = base64.b64decode(secret["data"][variable["valueFrom"]["secretKeyRef"]["key"]]).decode()
    assert store["args"][-2:] == ["--requirepass", f"$({variable['name']})"]
    assert (variable["name"], "valkey-cli ping" in store["readinessProbe"]["exec"]["command"][-1]) == ("REDISCLI_AUTH", True)
    url = base64.b64decode(find(documents, "Secret", "onset-redis")["data"]["url"]).decode()
    assert url == f"redis://:{password}@valkey:6379/0"
    (service,) = find(documents, "Deployment", "onset")["spec"]["template"]["spec"]["containers"]
    assert service["env"][0]["valueFrom"]["secretKeyRef"]["name"] == find(documents, "Secret", "onset-redis")["metadata"]["name"]


def test_what_keeps_the_autoscaler_still_amid_a_rollout_patches_the_one_that_is_there(tmp_path: Path) -> None:
    scaler, policies = BASE / "horizontalpodautoscaler.yaml", []
    before = yaml.safe_load(scaler.read_text())
    for command in documented("deploy.md", "sh", "kubectl --namespace onset patch hpa").splitlines():
        words = shlex.split(command)
        if "patch" in words:
            kind, name = words[words.index("patch") + 1 :][:2]
            assert (kind, name, words[words.index("--type") + 1]) == ("hpa", before["metadata"]["name"], "merge")
            local = f"patch --local --type merge --output yaml --filename {scaler} -p".split()
            done = subprocess.run(
                [program("kubectl", "kubectl"), *local, words[-1]], capture_output=True, text=True, check=True, timeout=60
            )
            patched = yaml.safe_load(done.stdout)
            policies.append(patched["spec"]["behavior"]["scaleUp"].pop("selectPolicy"))
            assert patched["spec"] == before["spec"], "nothing else is changed"
            scaler = tmp_path / "patched.yaml"
            scaler.write_text(yaml.safe_dump(patched))
    assert policies == ["Disabled", "Max"]


def test_the_documented_scrape_job_finds_the_pods_that_run_under_the_name_that_the_rules_ask_for(
    deployment: Document, tmp_path: Path
) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    found = {f"__meta_kubernetes_pod_label_{re.sub('[^a-z]', '_', name)}": value for name, value in labels.items()}
    found |= {"__meta_kubernetes_pod_container_port_name": "http", "__meta_kubernetes_pod_phase": "Running"}
    strangers = [
        {"__meta_kubernetes_pod_label_app_kubernetes_io_component": "store"},
        {"__meta_kubernetes_pod_container_port_name": "other"},
        {"__meta_kubernetes_pod_phase": "Failed"},
    ]
    pods = {f"pod-{i}": found | changes for i, changes in enumerate([{}, *strangers])}
    [job] = yaml.safe_load(documented("monitoring.md", "yaml", "scrape_configs:"))["scrape_configs"]
    assert job.pop("kubernetes_sd_configs")[0]["role"] == "pod"  # Debian's Prometheus knows no Kubernetes: what it would find is given
    job["static_configs"] = [
        {"targets": [f"{name}:8080"], "labels": about | {"__meta_kubernetes_pod_name": name}} for name, about in pods.items()
    ]
    config = tmp_path / "prometheus.yml"
    config.write_text(yaml.safe_dump({"scrape_configs": [job]}))
    look = [program("promtool", "prometheus"), "check", "service-discovery", "--timeout=3s", str(config), job["job_name"]]
    targets = json.loads(subprocess.run(look, capture_output=True, text=True, check=True, timeout=60).stdout)
    kept = [{name: target["labels"][name] for name in ("job", "pod")} for target in targets if target["labels"]]
    assert kept == [{"job": "onset", "pod": "pod-0"}]


def test_the_documented_pod_monitor_finds_the_pods_under_the_name_that_the_rules_ask_for(deployment: Document, container: Document) -> None:
    monitor = yaml.safe_load(documented("monitoring.md", "yaml", "apiVersion: monitoring.coreos.com/v1"))["spec"]
    [endpoint] = monitor["podMetricsEndpoints"]
    assert monitor["selector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert endpoint == {"port": container["ports"][0]["name"], "relabelings": [{"targetLabel": "job", "replacement": "onset"}]}


def test_the_documented_command_makes_a_prometheus_rule_of_the_rules(tmp_path: Path) -> None:
    make = (
        documented("monitoring.md", "sh", "(printf").partition("kubectl")[0].replace("> onset-rules.yaml", f"> {tmp_path / 'rules.yaml'}")
    )
    subprocess.run(["sh", "-ec", make], cwd=K8S.parent, check=True, timeout=60)
    made = yaml.safe_load((tmp_path / "rules.yaml").read_text())
    assert (made["kind"], made["metadata"]["name"]) == ("PrometheusRule", "onset")
    assert made["spec"] == yaml.safe_load((K8S.parent / "monitoring/prometheus/rules.yml").read_text())
