"""The page without its build, over real HTTP: a table, its headers, and the events behind it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import local
from tests.e2e.process import Service

PACKAGE = Path(__file__).parents[2] / "service"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("console") / "data", model=tiny_model_path, CONSOLE_WATCHERS="2") as running:
        yield running


def post(service: Service, *events: tuple[str, float]) -> None:
    body = [{"stream_id": name, "values": {"value": value}} for name, value in events]
    assert local.post(f"{service.url}/v1/events", json=body).status_code == 200


@pytest.mark.parametrize("address", ["/", "/table"])
def test_the_page_runs_nothing_inline_and_nothing_from_elsewhere(service: Service, address: str) -> None:
    response = local.get(f"{service.url}{address}")
    policy = response.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in response.text
    assert " style=" not in response.text
    assert "http://" not in response.text
    assert "https://" not in response.text


def test_the_plain_table_shows_each_stream_with_its_state_and_no_name_as_markup(service: Service) -> None:
    post(service, *(("<b>pump</b>", 1.0 + 0.01 * (i % 3)) for i in range(40)))
    post(service, ("<b>pump</b>", 99.0))
    page = local.get(f"{service.url}/table").text
    assert "&lt;b&gt;pump&lt;/b&gt;" in page
    assert "<b>" not in page
    assert " alert open" in page
    assert "<polyline" in page
    assert local.get(f"{service.url}/table.css").headers["content-type"].startswith("text/css")


def test_without_the_built_page_its_address_has_the_plain_table_and_says_how_to_get_it_until_it_is_built(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    shutil.copytree(PACKAGE, tmp_path / "service", ignore=shutil.ignore_patterns("dist", "__pycache__"))
    plain = Service(tmp_path / "data", model=tiny_model_path, forked=False)
    plain.source = tmp_path
    with plain:
        post(plain, *(("pump-7", 1.0 + 0.01 * (i % 3)) for i in range(40)))
        page = local.get(f"{plain.url}/").raise_for_status().text
        built = tmp_path / "service" / "console" / "dist"
        for name, gone in (("a.js", "b.js"), ("b.js", "a.js")):
            shutil.rmtree(built, ignore_errors=True)
            (built / "assets").mkdir(parents=True)
            (built / "assets" / name).write_text(f"// {name}")
            (built / "index.html").write_text(f'<script src="assets/{name}"></script>')
            assert name in local.get(f"{plain.url}/").raise_for_status().text
            script = local.get(f"{plain.url}/assets/{name}").raise_for_status()
            assert script.text == f"// {name}"
            assert script.headers["content-encoding"] == "gzip"
            plainly = local.get(f"{plain.url}/assets/{name}", headers={"accept-encoding": "identity"})
            assert (plainly.text, plainly.headers.get("content-encoding")) == (script.text, None)
            assert plainly.headers["content-type"] == script.headers["content-type"]
            assert "immutable" in script.headers["cache-control"]
            assert local.get(f"{plain.url}/assets/{gone}").status_code == 404
        assert local.get(f"{plain.url}/assets/..%2Findex.html").status_code == 404
    assert "pump-7" in page
    assert "<polyline" in page
    assert "make console" in page
    assert "<script" not in page


def test_events_of_the_fleet_are_sent_as_they_are_scored(service: Service) -> None:
    with local.stream("GET", f"{service.url}/v1/live?q=sent", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        names = []
        for line in lines:
            if line.startswith("event: fleet"):
                fleet = json.loads(next(lines).removeprefix("data: "))
                names = [one["id"] for one in fleet["new"]]
                if names:
                    break
                post(service, ("sent/1", 1.0), ("other", 1.0))
    assert names == ["sent/1"]


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("?limit=0", 422, "limit"),
        ("?limit=501", 422, "limit"),
        ("?state=odd", 422, "state"),
        (f"?q={'x' * 300}", 422, "q"),
        ("?model=none", 404, None),
    ],
)
def test_what_cannot_be_watched_is_a_problem_that_names_it(service: Service, query: str, status: int, field: str | None) -> None:
    problem = local.get(f"{service.url}/v1/live{query}")
    assert (problem.status_code, problem.json().get("field")) == (status, field)


def test_a_watcher_too_many_is_told_when_to_come_back(service: Service) -> None:
    with local.stream("GET", f"{service.url}/v1/live"), local.stream("GET", f"{service.url}/v1/live/some/stream"):
        refused = local.get(f"{service.url}/v1/live")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "5"
        with local.stream("GET", f"{service.url}/v1/live", headers={"X-Scope-OrgID": "another"}) as given:
            assert given.status_code == 200  # the address that has both gives one up


def test_a_stopping_service_does_not_wait_for_those_who_watch(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, DRAIN_SECONDS="120") as running:
        with local.stream("GET", f"{running.url}/v1/live", timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            began = time.monotonic()
            os.kill(running.pid, signal.SIGTERM)
            rest = list(lines)
        running.terminate()
        assert time.monotonic() - began < 60
        assert "event: bye" in rest


def test_a_console_turned_off_leaves_nothing_behind(tmp_path: Path, tiny_model_path: Path) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, CONSOLE="false") as running:
        assert local.get(f"{running.url}/").headers["location"] == "docs"
        assert local.get(f"{running.url}/v1/live").status_code == 404
