import re
from pathlib import Path

import pytest
import yaml

from service import remote_write
from tests.deploy.files import COMPOSE, STREAM_BYTES, Document, compose, image_environment, settings_from, tool, version


@pytest.fixture(name="services")
def services_fixture() -> Document:
    services: Document = compose()["services"]
    return services


def seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)s", text)
    assert match, text
    return int(match[1])


def megabytes(text: str) -> float:
    match = re.fullmatch(r"(\d+)(mb|M|G)", text)
    assert match, text
    return int(match[1]) * (1024 if match[2] == "G" else 1)


def test_the_file_fulfils_the_compose_specification() -> None:
    done = tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert done.returncode == 0, done.stdout


def test_every_setting_is_known_to_the_service_and_accepted(services: Document) -> None:
    settings = settings_from(image_environment() | services["service"]["environment"])
    assert settings.redis_url == "redis://redis:6379/0"
    assert services["service"]["ports"] == [f"${{PUBLISH:-127.0.0.1:8080}}:{settings.port}"]


def test_docker_waits_longer_than_both_halves_of_the_drain(services: Document) -> None:
    settings = settings_from(services["service"]["environment"])
    assert seconds(services["service"]["stop_grace_period"]) > 2 * settings.drain_seconds + 5


def test_the_service_starts_once_the_store_answers(services: Document) -> None:
    assert services["service"]["depends_on"]["redis"]["condition"] == "service_healthy"
    assert "PONG" in services["redis"]["healthcheck"]["test"][1]


def test_the_store_survives_a_restart_and_never_evicts_a_state(services: Document) -> None:
    command = services["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "always"
    assert options["--maxmemory-policy"] == "noeviction"
    assert "redis-data:/data" in services["redis"]["volumes"]
    assert "redis-data" in compose()["volumes"]
    assert megabytes(options["--maxmemory"]) * 1.5 <= megabytes(services["redis"]["deploy"]["resources"]["limits"]["memory"])


def test_new_streams_are_refused_before_the_store_is_full(services: Document) -> None:
    settings = settings_from(services["service"]["environment"])
    command = services["redis"]["command"]
    assert settings.max_streams * STREAM_BYTES < megabytes(command[command.index("--maxmemory") + 1]) * 2**20


def test_the_store_is_reached_by_the_service_alone(services: Document) -> None:
    assert "ports" not in services["redis"]
    assert services["redis"]["networks"] == ["store"]
    assert compose()["networks"]["store"]["internal"] is True
    assert set(services["service"]["networks"]) == {"edge", "store"}


def test_every_container_is_bounded_and_comes_back(services: Document) -> None:
    for name, service in services.items():
        assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
        assert service["restart"] == ("on-failure" if name == "nats-streams" else "unless-stopped")
        assert service.get("read_only", False) is (name not in ("kafka", "rabbitmq")), "their images write their configuration at the start"
        assert "no-new-privileges:true" in service["security_opt"]


def test_images_are_pinned_to_a_minor_version(services: Document) -> None:
    assert services["service"]["image"] == f"onset:{version()}"
    assert re.fullmatch(r"valkey/valkey:\d+\.\d+-alpine", services["redis"]["image"])
    for name in ("prometheus", "alertmanager", "grafana"):
        assert re.fullmatch(r"(prom|grafana)/[a-z]+:v?\d+\.\d+\.\d+", services[name]["image"])


@pytest.mark.parametrize("path", sorted((COMPOSE.parent / "sources").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_broker_is_asked_for_by_its_profile_and_its_source_names_it(services: Document, path: Path) -> None:
    brokers = {name: service for name, service in services.items() if service.get("profiles") == [path.stem]}
    assert path.stem in brokers
    assert re.search(rf"\b{path.stem}:\d+\b", path.read_text())
    assert "./sources:/sources:ro" in services["service"]["volumes"]
    for service in brokers.values():
        assert re.fullmatch(r"[a-z/-]+:\d+\.\d+(\.\d+)?(-[a-z]+)?", service["image"])
        assert service["networks"] == ["edge"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_monitoring_is_asked_for_and_mounts_what_ships(services: Document) -> None:
    watching = {name: service for name, service in services.items() if service.get("profiles") == ["prometheus"]}
    assert {"prometheus", "alertmanager", "grafana"} <= set(watching)
    sources = [volume.partition(":")[0] for service in watching.values() for volume in service["volumes"] if volume.startswith("./")]
    assert all((COMPOSE.parent / source).is_dir() for source in sources)
    targets = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    [provider] = yaml.safe_load((COMPOSE.parent / "monitoring/grafana/provisioning/dashboards/onset.yml").read_text())["providers"]
    assert targets["./monitoring/grafana/dashboards"] == provider["options"]["path"]
    config = yaml.safe_load((COMPOSE.parent / "monitoring/prometheus/prometheus.yml").read_text())
    assert config["scrape_configs"][0]["dns_sd_configs"][0]["names"] == ["service"]
    port = settings_from(image_environment() | services["service"]["environment"]).port
    assert config["remote_write"][0]["url"] == f"http://service:{port}{remote_write.PATH}"
    assert "--web.enable-remote-write-receiver" in services["prometheus"]["command"]
    assert services["service"]["environment"]["ONSET_ALERTS_ALERTMANAGERS"] == "${ALERTMANAGERS:-}"
    assert config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] == ["alertmanager:9093"]
    assert all(port.startswith("127.0.0.1:") for service in watching.values() for port in service.get("ports", []))
