"""The commands of docs/migrate.md as they stand there: requests of other services become events of a real one."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.asking import SHIPPED_MODELS
from tests import local
from tests.e2e.process import Service
from tests.needs import program

PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"
HOURS = [(datetime(2026, 9, 1, tzinfo=UTC) + timedelta(hours=i)).strftime("%Y-%m-%dT%H:%M:%SZ") for i in range(400)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path / "data", model=Path(SHIPPED_MODELS), wait=True, forked=True) as running:
        yield running


def commands(starts: str) -> str:
    """The one block of shell commands on the page that begins like this."""
    [found] = [block for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL) if block.startswith(starts)]
    return str(found)


def run(command: str, folder: Path, service: Service) -> str:
    program("jq", "jq")
    program("curl", "curl")
    command = command.replace("localhost:8080", f"127.0.0.1:{service.port}").replace("python -m", f"'{sys.executable}' -m")
    said = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    return said.stdout


def test_a_request_of_azures_univariate_detector_is_answered_in_its_shape_and_its_window_counts_once(
    tmp_path: Path, service: Service
) -> None:
    values = [round(100 + 20 * math.sin(i / 24 * 2 * math.pi) + (i * 7919 % 13) / 4, 2) for i in range(400)]
    values[300] += 90
    series = [{"timestamp": hour, "value": value} for hour, value in zip(HOURS, values, strict=True)]
    (tmp_path / "request.json").write_text(json.dumps({"series": series[:-1], "granularity": "hourly", "sensitivity": 95}))
    answer: dict[str, list[Any]] = json.loads(run(commands("jq -c '.series"), tmp_path, service))
    assert {len(part) for part in answer.values()} == {399}
    assert answer["isAnomaly"][300] is answer["isPositiveAnomaly"][300] is True
    assert not answer["isNegativeAnomaly"][300]
    assert answer["severity"][300] > 0.1
    assert sum(answer["isAnomaly"]) <= 8
    assert answer["upperMargins"][0] is None
    assert all(margin > 0 for margin in answer["upperMargins"][100:])
    (tmp_path / "request.json").write_text(json.dumps({"series": series}))
    again = json.loads(run(commands("jq -c '.series"), tmp_path, service))
    assert again["expectedValues"][:399] == answer["expectedValues"]
    assert local.get(f"{service.url}/v1/streams/sales").json()["state_version"] == 400


def test_a_request_of_azures_multivariate_detector_becomes_a_row_a_time(tmp_path: Path, service: Service) -> None:
    variables = [
        {"variable": name, "timestamps": HOURS[:30], "values": [i * factor for i in range(30)]} for name, factor in (("value", 1), ("x", 2))
    ]
    (tmp_path / "last.json").write_text(json.dumps({"variables": variables, "topContributorCount": 3}))
    whole = commands("jq -c '.variables")
    rows = run(whole[: whole.rindex("|")], tmp_path, service).splitlines()
    assert [json.loads(row) for row in rows] == [
        {"timestamp": hour, "event_id": hour, "values": {"value": i, "x": 2 * i}} for i, hour in enumerate(HOURS[:30])
    ]
    variables.pop()  # the shipped detector knows one
    (tmp_path / "last.json").write_text(json.dumps({"variables": variables}))
    said = run(whole.replace("?model=pump", ""), tmp_path, service).splitlines()
    assert [json.loads(line)["state_version"] for line in said] == list(range(1, 31))


def test_a_csv_for_each_variable_becomes_a_file_for_the_machine(tmp_path: Path, service: Service) -> None:
    (tmp_path / "variables").mkdir()
    for name in ("flow", "pressure"):
        lines = [f"{hour},{len(name)}.{i}" for i, hour in enumerate(HOURS[:20])]
        (tmp_path / "variables" / f"{name}.csv").write_text("\n".join(["timestamp,value", *lines, ""]))
    [first, second, *_] = commands("for f in").splitlines()
    run(f"{first}\n{second}", tmp_path / "variables", service)
    written = (tmp_path / "machines" / "pump.csv").read_text().splitlines()
    assert written[:2] == ["timestamp,flow,pressure", "2026-09-01T00:00:00Z,4.0,8.0"]
    assert len(written) == 21
