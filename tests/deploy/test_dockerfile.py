import json
import re
from pathlib import Path

from tests.deploy.files import DOCKERFILE, ROOT, image_environment, instructions, settings_from, tool, version


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def test_hadolint_has_nothing_to_say() -> None:
    done = tool("hadolint", "--no-color", DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_as_a_numeric_user_that_is_not_root() -> None:
    user, group = last("USER").split(":")
    assert int(user) >= 10000
    assert int(group) >= 10000


def test_the_process_is_started_without_a_shell_so_that_it_gets_the_stop_signal_itself() -> None:
    assert json.loads(last("ENTRYPOINT")) + json.loads(last("CMD")) == ["python", "-m", "service", "serve"]
    assert last("STOPSIGNAL") == "SIGTERM"


def test_the_images_settings_are_known_to_the_service_and_accepted() -> None:
    settings = settings_from(image_environment())
    assert settings.host == "0.0.0.0"
    assert settings.port == int(last("EXPOSE"))
    assert str(settings.data_dir) == last("VOLUME")


def test_the_healthcheck_asks_readiness_with_python_alone_and_gives_up_in_time() -> None:
    options, _, command = last("HEALTHCHECK").partition("CMD ")
    assert json.loads(command) == ["python", "-I", "/opt/onset/healthcheck.py"]
    timing = dict(re.findall(r"--([a-z-]+)=(\d+)", options))
    assert int(timing["timeout"]) < int(timing["interval"])


def test_nothing_of_the_build_stage_but_its_virtual_environment_reaches_the_image() -> None:
    from_build = [rest for name, rest in instructions() if name == "COPY" and "--from=" in rest]
    console = "--from=console /source/service/console/dist source/service/console/dist"  # into the build stage
    assert from_build == [console, "--from=build /opt/onset /opt/onset"]


def test_the_labels_name_the_projects_version() -> None:
    assert f"VERSION={version()}" in [rest for name, rest in instructions() if name == "ARG"]
    assert 'org.opencontainers.image.version="${VERSION}"' in last("LABEL")


def test_only_named_files_enter_the_build_context_and_each_exists() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert "training" not in allowed
    assert all((ROOT / name).exists() for name in allowed - {"wheelhouse"})
    copied = {word.rstrip("/") for name, rest in instructions() if name == "COPY" and "--from=" not in rest for word in rest.split()[:-1]}
    assert all(any(Path(name).is_relative_to(rule) for rule in allowed) for name in copied - {"wheel[h]ouse"})
