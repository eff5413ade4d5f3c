"""The page in a real browser, over a real service: a disturbance is seen, looked into, acknowledged and accepted."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from tests import local
from tests.e2e.process import Service
from tests.needs import program
from tests.servers import Valkey
from tests.times import wait
from tests.tiny import build_tiny
from tests.tiny_log import build_tiny_log

ROOT = Path(__file__).parents[2]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STREAMS = [f"plant-{1 + i % 2}/pump-{i}/temperature" for i in range(8)]
expect.set_options(timeout=20_000)
BAD = "plant-2/pump-7/temperature"
PAGE = 100
"""Alerts that the page asks for at once."""
HISTORY = 560
"""Events of each: a stream is settled after 500, and its alerts then last as long as what they are about."""
VIEWS = ["fleet", f"stream/{BAD}", "alerts", "alerts?status=acknowledged", "model", "backtest"]
BAND = """canvas => {
  const one = new OffscreenCanvas(1, 1).getContext('2d');
  one.fillStyle = getComputedStyle(document.documentElement).getPropertyValue('--blue-soft');
  one.fillRect(0, 0, 1, 1);
  const soft = one.getImageData(0, 0, 1, 1).data;
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const near = i => pixels[i + 3] > 0 && pixels[i + 3] < 120 && [0, 1, 2].every(j => Math.abs(pixels[i + j] - soft[j]) < 12);
  let found = 0;
  for (let i = 0; i < pixels.length; i += 4) found += near(i);
  return found / (pixels.length / 4);
}"""
"""The share of a canvas that has the colour of the band."""

PICTURED = """place => {
  const plot = document.querySelector(`.rows li[aria-posinset="${place}"] .plot`).getBoundingClientRect();
  let found = 0;
  for (const canvas of document.querySelectorAll('.rows canvas')) {
    const box = canvas.getBoundingClientRect();
    if (box.top > plot.top || box.bottom < plot.bottom) continue;
    const scale = canvas.width / box.width;
    const pixels = canvas.getContext('2d').getImageData(0, (plot.top - box.top) * scale, canvas.width, plot.height * scale).data;
    for (let i = 3; i < pixels.length; i += 4) found += pixels[i] > 0;
  }
  return found > 300;
}"""
"""Whether a picture is where a row has room for it."""
IN_ORDER = "[...document.querySelectorAll('.rows li')].every((row, i, all) => !i || +row.ariaPosInSet === +all[i - 1].ariaPosInSet + 1)"
"""Whether the rows come in the document as they do on the screen."""
CUT = """() => [...document.querySelectorAll(':is(header, main) :is(a, button, select, input, dt, dd, th, td, h1, h2), header, main')]
  .filter(one => one.checkVisibility() && !one.matches('.skip'))
  .filter(one => one.getBoundingClientRect().right > innerWidth || (one.matches('dd, header') && one.scrollWidth > one.clientWidth))
  .map(one => one.outerHTML.slice(0, 120))"""
"""What is to be read or pressed and lies beyond the edge of the screen, or is cut off in its place."""


def until(page: Page, expression: str, argument: object = None) -> None:
    """Wait until it is true; the page's policy forbids Playwright's own way of waiting for an expression."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, (expression, argument)
        page.wait_for_timeout(50)


class Plant:
    """Eight streams at ten readings a second, one of which can be disturbed."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self._random = random.Random(7)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.disturbed = False

    def __enter__(self) -> Plant:
        now = time.time()
        past = [now - (HISTORY - i) / 10 for i in range(HISTORY)]
        self._post([self._event(name, at) for at in past for name in STREAMS])
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            self._post([self._event(name, time.time()) for name in STREAMS])

    def _event(self, name: str, at: float) -> dict[str, Any]:
        wave = 3 * math.sin(at / 3 + STREAMS.index(name))
        push = 40 if self.disturbed and name == BAD else 0
        return {"stream_id": name, "timestamp": at, "values": {"value": 50 + wave + self._random.gauss(0, 0.3) + push}}

    def _post(self, events: list[dict[str, Any]]) -> None:
        for i in range(0, len(events), 2000):
            self._client.post("/v1/events", json=events[i : i + 2000]).raise_for_status()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if not (ROOT / "service" / "console" / "dist" / "index.html").is_file():
        reason = "the console is not built: make console"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with Service(tmp_path_factory.mktemp("browser") / "data", SILENCE="false") as running:
        yield running


@pytest.fixture(scope="module")
def plant(service: Service) -> Iterator[Plant]:
    with Plant(service.url) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program("chromium", "chromium"), headless=True, args=ARGUMENTS)
        yield running
        running.close()


class Visit:
    """A page, and all it must not do: errors in its console, requests to other hosts."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.url = url
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._requested(request.url))

    def _requested(self, url: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != urlsplit(self.url).netloc:
            self.wrong.append(f"a request to {url}")

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.context.close()
        if error is None:
            assert self.wrong == []


def within_range(page: dict[str, Any]) -> dict[str, Any]:
    """Alerts as they would be of values that lie where they were expected."""
    for alert in page["alerts"]:
        for found in alert["onset"]["contributors"]:
            found["lower"], found["upper"] = found["actual"] - 1, found["actual"] + 1
    return page


def test_a_disturbance_rises_to_the_top_is_looked_into_acknowledged_and_accepted(service: Service, plant: Plant, browser: Browser) -> None:
    with Visit(browser, service.url) as page:
        page.goto(f"{service.url}/#/fleet")
        expect(page.locator(".rows li")).to_have_count(len(STREAMS))
        expect(page.locator(".status")).to_have_text("Live")
        expect(page.locator(f'a[title="{BAD}"] .state')).to_contain_text("Normal")
        plant.disturbed = True
        top = page.locator('.rows li[aria-posinset="1"] a')
        expect(top).to_have_attribute("title", BAD)
        expect(top.locator(".state")).to_contain_text(" alert, onset")

        top.click()
        expect(page.locator("h1")).to_have_text(BAD)
        value, score = page.locator(".chart").first, page.locator(".chart").last
        for chart in (value, score):
            expect(chart).to_have_attribute("data-onsets", re.compile("[1-9]"))
        expect(page.locator("section", has_text="Onsets").last.locator("tbody tr").first).to_be_visible()
        expect(value.locator("canvas")).to_be_visible()
        assert value.locator("canvas").evaluate(BAND) > 0.02
        expect(page.locator(".bars li")).to_contain_text("100 %")

        page.goto(f"{service.url}/#/alerts")
        alert = page.locator(".alert", has_text=BAD)
        expect(alert).to_contain_text("value")
        expect(alert).not_to_contain_text("within its range")
        page.route("**/v1/alerts?*", lambda route: route.fulfill(json=within_range(route.fetch().json())))
        page.reload()
        expect(alert).to_contain_text("within its range: its course is unusual")
        page.unroute("**/v1/alerts?*")
        page.reload()
        alert.get_by_role("button", name="Acknowledge").click()
        page.get_by_label("Your name").fill("Ada")
        page.get_by_label("Note").fill("Looking at the valve")
        page.get_by_role("dialog").get_by_role("button", name="Acknowledge").click()
        expect(page.locator(".alert", has_text=BAD)).to_have_count(0)
        page.get_by_role("button", name="Acknowledged").click()
        expect(page.locator(".alert", has_text=BAD)).to_contain_text("by Ada: Looking at the valve")

        page.goto(f"{service.url}/#/stream/{BAD}")
        page.get_by_role("button", name="Accept as normal").click()
        page.get_by_role("dialog").get_by_role("button", name="Accept as normal").click()
        expect(page.locator(".head .state")).not_to_contain_text("alert open")


def test_a_stream_can_be_paused_zoomed_and_left_by_keys(service: Service, plant: Plant, browser: Browser) -> None:
    with Visit(browser, service.url) as page:
        page.goto(f"{service.url}/#/stream/{STREAMS[0]}")
        chart = page.locator(".chart").first
        expect(chart.locator("canvas")).to_be_visible()
        page.keyboard.press("Space")
        expect(page.get_by_role("button", name="Go on")).to_be_visible()
        points = chart.get_attribute("data-points")
        time.sleep(0.6)
        assert chart.get_attribute("data-points") == points
        page.keyboard.press("Space")
        expect(chart).not_to_have_attribute("data-points", points or "")
        box = chart.bounding_box()
        assert box
        page.mouse.move(box["x"] + 300, box["y"] + 100)
        page.mouse.down()
        page.mouse.move(box["x"] + 500, box["y"] + 100, steps=4)
        page.mouse.up()
        page.mouse.move(5, 5)
        expect(page.locator(".readout").nth(0)).to_contain_text("Zoomed in")
        page.keyboard.press("0")
        expect(page.locator(".readout").nth(0)).not_to_contain_text("Zoomed in")
        page.keyboard.press("Escape")
        expect(page.locator(".rows li").first).to_be_visible()


def test_streams_are_found_and_opened_without_a_mouse(service: Service, plant: Plant, browser: Browser) -> None:
    with Visit(browser, service.url) as page:
        page.goto(service.url)
        expect(page.locator(".rows li")).to_have_count(len(STREAMS))
        page.keyboard.press("/")
        page.keyboard.type("PUMP-3")
        expect(page.locator(".rows li")).to_have_count(1)
        page.keyboard.press("ArrowDown")
        expect(page.locator(".rows a")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("plant-2/pump-3/temperature")
        page.keyboard.press("Tab")
        expect(page.get_by_label("Back to the fleet")).to_be_focused()  # not the beginning of the page again
        page.keyboard.press("g")
        page.keyboard.press("f")
        expect(page.locator(".rows li")).to_have_count(len(STREAMS))
        page.keyboard.press("j")
        page.keyboard.press("j")
        expect(page.locator('.rows li[aria-posinset="2"] a')).to_be_focused()
        page.keyboard.press("?")
        expect(page.get_by_role("dialog")).to_contain_text("Search streams")
        page.keyboard.press("Escape")
        page.keyboard.press("/")
        page.keyboard.type("nowhere")
        expect(page.locator(".empty")).to_contain_text("No stream fits")
        expect(page.get_by_role("link", name="open the stream of exactly this name")).to_have_attribute("href", "#/stream/nowhere")


def test_what_is_searched_for_is_opened_and_left_for_where_one_was(service: Service, plant: Plant, browser: Browser) -> None:
    with Visit(browser, service.url, viewport={"width": 1280, "height": 300}) as page:
        page.goto(service.url)
        expect(page.locator(".rows li").first).to_be_visible()
        page.keyboard.press("/")
        page.keyboard.type("pump-5")
        page.keyboard.press("Enter")  # before the answer to it is there
        expect(page.locator("h1")).to_have_text("plant-2/pump-5/temperature")
        for back in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_label("Back to the fleet").click(), page.go_back):
            back()
            expect(page.get_by_label("Search streams")).to_have_value("pump-5")
            expect(page.locator(".rows li")).to_have_count(1)
            page.locator(".rows a").click()
            expect(page.locator("h1")).to_have_text("plant-2/pump-5/temperature")
        page.get_by_role("link", name="Fleet", exact=True).click()
        expect(page.get_by_label("Search streams")).to_have_value("")
        expect(page.locator(".rows li").nth(3)).to_be_visible()
        page.evaluate("document.querySelector('.rows').scrollTop = 150")
        until(page, "document.querySelector('.rows').scrollTop === 150")
        page.keyboard.press("j")
        page.evaluate("document.querySelector('.rows').scrollTop = 150")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_contain_text("pump")
        page.go_back()
        until(page, "document.querySelector('.rows')?.scrollTop === 150")


def test_a_browser_that_keeps_nothing_shows_the_page_in_the_colours_chosen(service: Service, plant: Plant, browser: Browser) -> None:
    denied = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('denied', 'SecurityError'); }})"
    with Visit(browser, service.url, color_scheme="light") as page:
        page.add_init_script(denied)
        page.goto(service.url)
        expect(page.locator(".rows li").first).to_be_visible()
        page.keyboard.press("t")
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        page.keyboard.press("t")
        expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_a_name_with_a_bare_percent_in_an_address_is_taken_as_it_stands(service: Service, browser: Browser) -> None:
    visit = Visit(browser, service.url)
    with visit as page:
        page.goto(f"{service.url}/#/stream/100%")
        expect(page.locator("h1")).to_have_text("100%")
        expect(page.locator(".notice")).to_contain_text("The service has scored nothing of a stream of this name")
        visit.wrong = [said for said in visit.wrong if "404" not in said]  # Chromium's own line on the answer


def test_of_many_streams_those_in_view_are_in_the_document_in_order_each_with_its_picture(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    many = 120
    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as service, Visit(browser, service.url) as page:
        events = [{"stream_id": f"pump-{i:03}", "values": {"value": 10.0 + i * j % 7}} for j in range(40) for i in range(many)]
        local.post(f"{service.url}/v1/events", json=events, timeout=30).raise_for_status()
        page.goto(service.url)
        for place in (1, 60, many):
            page.evaluate("place => document.querySelector('.rows').scrollTop = 52 * (place - 4)", place)
            row = page.locator(f'.rows li[aria-posinset="{place}"]')
            expect(row.locator(".name")).to_have_text(f"pump-{place - 1:03}")
            expect(row).to_have_attribute("aria-setsize", str(many))
            expect(row.locator(".reading > span")).to_have_text(f"{10 + (place - 1) * 39 % 7:.2f}")  # its own last value
            until(page, PICTURED, place)
            until(page, IN_ORDER)
            assert page.locator(".rows li").count() < many / 3
        page.locator(f'.rows li[aria-posinset="{many - 1}"] a').focus()
        page.keyboard.press("Tab")
        expect(row.locator("a")).to_be_focused()
        page.evaluate("document.querySelector('.rows').scrollTop = 0")
        expect(page.locator('.rows li[aria-posinset="1"]')).to_be_visible()
        expect(row.locator("a")).to_be_focused()  # out of view, and still where the keyboard is
        page.keyboard.press("k")
        expect(page.locator(f'.rows li[aria-posinset="{many - 1}"] a')).to_be_focused()


def test_an_uploaded_file_is_drawn_with_its_onsets_and_a_bad_one_is_refused_in_words(
    service: Service, browser: Browser, tmp_path: Path
) -> None:
    noise = random.Random(5)
    rows = [f"{1.7e9 + 60 * i},{20 + math.sin(i / 20) + noise.gauss(0, 0.1) + (15 if 700 <= i < 720 else 0)}" for i in range(900)]
    (tmp_path / "boiler.csv").write_text("time,temperature\n" + "\n".join(rows) + "\n")
    (tmp_path / "words.csv").write_text("time,temperature\n1700000000,warm\n")
    with Visit(browser, service.url) as page:
        page.goto(f"{service.url}/#/backtest")
        page.set_input_files("#file", tmp_path / "boiler.csv")
        page.get_by_role("button", name="Run the backtest").click()
        expect(page.locator(".figures")).to_contain_text("900", timeout=60_000)
        charts = page.locator(".chart[data-points]")
        expect(charts).to_have_count(2)
        assert int(charts.first.get_attribute("data-onsets") or 0) >= 1
        assert charts.first.locator("canvas").evaluate(BAND) > 0.02
    visit = Visit(browser, service.url)
    with visit as page:
        page.goto(f"{service.url}/#/backtest")
        page.set_input_files("#file", tmp_path / "words.csv")
        page.get_by_role("button", name="Run the backtest").click()
        expect(page.locator(".notice.wrong")).to_contain_text(
            "words.csv: column 'temperature', row 1: 'warm' is not a number", timeout=60_000
        )
        visit.wrong = [said for said in visit.wrong if "status of 400" not in said]  # Chromium's own line on the refusal


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_view_is_accessible_and_fits_a_phone(service: Service, plant: Plant, browser: Browser, colours: str) -> None:
    check_views(browser, service, VIEWS, colours)


def check_views(
    browser: Browser, service: Service, views: list[str], colours: str, then: Callable[[Page], None] = lambda page: None
) -> None:
    """Each view at four widths, after `then`: nothing wider than the screen or beyond its edge, and nothing that axe finds."""
    axe = (ROOT / "console" / "node_modules" / "axe-core" / "axe.min.js").read_text()
    with Visit(browser, service.url, color_scheme=colours, viewport={"width": 390, "height": 844}) as page:
        for view in views:
            page.goto(f"{service.url}/#/{view}")
            expect(page.locator("main")).not_to_contain_text(re.compile("Loading …|Connecting"))
            then(page)
            for width in (320, 360, 768, 1280):
                page.set_viewport_size({"width": width, "height": 844})
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{view} is wider than {width}"
                assert page.evaluate(CUT) == [], f"{view} at {width}"
                page.evaluate(axe)
                found = page.evaluate(
                    "axe.run().then(result => result.violations.map(v => [v.id, v.nodes.map(n => n.html.slice(0, 200))]))"
                )
                assert found == [], f"{view} at {width}: {json.dumps(found, indent=1)}"


def test_a_machine_whose_features_have_long_names_is_read_and_accepted_on_a_phone_too(tmp_path: Path, browser: Browser) -> None:
    long = "temperature_of_the_bearing_at_the_driven_end_of_the_second_pump"
    with Service(tmp_path / "data", model=build_tiny(tmp_path, ("load", long)), SILENCE="false") as machines:
        events = [{"stream_id": "plant/" * 33, "values": {"load": 1.0, long: 123.4 + i % 3}} for i in range(40)]
        local.post(f"{machines.url}/v1/events", json=events).raise_for_status()
        check_views(browser, machines, ["fleet", "stream/" + "plant/" * 33, "model"], "light")
        with Visit(browser, machines.url, viewport={"width": 360, "height": 740}) as page:
            page.goto(f"{machines.url}/table")
            for part in page.locator("tbody tr > *").all()[:3]:  # name, value, what was expected
                assert part.evaluate("one => one.getBoundingClientRect().right <= innerWidth"), part.inner_text()
            page.goto(machines.url)
            row = page.locator(".rows li a")
            expect(row.locator(".state")).to_be_visible()
            assert row.locator(".state").evaluate("one => one.clientWidth") >= 90, "the state has no room"


def test_a_model_says_whether_it_still_answers_as_published(service: Service, browser: Browser) -> None:
    with Visit(browser, service.url) as page:
        page.goto(f"{service.url}/#/model")
        page.get_by_role("button", name="Run it again").click()
        expect(page.get_by_role("status")).to_contain_text("Passed just now: 32 steps of 8 streams")
        expect(page.locator("canvas.loglog")).to_be_visible()


def test_the_page_works_under_a_path_and_opens_a_linked_stream(service: Service, plant: Plant, browser: Browser) -> None:
    def moved(route: Route) -> None:
        """A proxy that serves /onset/ from /; endless answers are not its strength."""
        url = route.request.url.replace("/onset/", "/", 1)
        if "/v1/live" in url:
            route.fulfill(status=200, content_type="text/event-stream", body="event: bye\ndata: {}\n\n")
        else:
            route.fulfill(response=route.fetch(url=url))

    with Visit(browser, service.url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(urlsplit(request.url).path))
        page.route("**/onset/**", moved)
        page.goto(f"{service.url}/onset/?stream={STREAMS[0]}")
        expect(page.locator("h1")).to_have_text(STREAMS[0])
        page.goto(f"{service.url}/onset/#/model")
        expect(page.locator("h1")).to_contain_text("default")
        page.goto(f"{service.url}/onset/docs")
        policy = page.locator("#operations-default-getPolicy")
        policy.locator(".opblock-summary").click()
        policy.get_by_role("button", name="Try it out").click()
        policy.get_by_role("button", name="Execute").click()
        expect(policy.locator(".live-responses-table .response-col_status").nth(1)).to_contain_text("200")
        assert all(path.startswith("/onset/") for path in asked), asked


def test_the_chart_of_a_bulk_without_times_has_all_of_its_values_and_marks_that_differ(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    """What someone sends by hand first: all of it comes at one instant."""
    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as running, Visit(browser, running.url) as page:
        page.add_init_script(
            "const said = window.said = [], cut = window.cut = []; const fill = CanvasRenderingContext2D.prototype.fillText;"
            "CanvasRenderingContext2D.prototype.fillText = function (...words) { said.push(words[0]);"
            " const [about, x] = words, half = this.measureText(about).width / 2;"
            " const middle = x + ({right: -half, center: 0}[this.textAlign] ?? half);"
            " if (middle + half > this.canvas.width + 1 || middle - half < -1) cut.push(about);"
            " return fill.apply(this, words); };"
        )
        streams = {
            "spike": [5000.0] * 20 + [9000.0],
            "high": [101_325.0 + i % 4 / 4 for i in range(40)],
            "huge": [1e12 + 1e11 * (i % 4) for i in range(40)],
            "still": [42.0] * 39 + [42.00001],  # its band is narrower than float32 tells apart
        }
        for name, values in streams.items():
            events = [{"stream_id": name, "values": {"value": value}} for value in values]
            local.post(f"{running.url}/v1/events", json=events).raise_for_status()
        whole = time.time() // 60 * 60
        minutes = [{"stream_id": "minutes", "values": {"value": 5.0 + i % 3}, "timestamp": whole - i} for i in range(599, -1, -1)]
        local.post(f"{running.url}/v1/events", json=minutes).raise_for_status()
        week = [{"stream_id": "week", "values": {"value": 5.0 + i % 3}, "timestamp": time.time() - 3600 * i} for i in range(150, 0, -1)]
        local.post(f"{running.url}/v1/events", json=week).raise_for_status()
        page.goto(f"{running.url}/#/stream/spike")
        until(page, "said.some(words => ['8,000', '9,000'].includes(words))")
        page.goto("about:blank")
        page.goto(f"{running.url}/#/stream/high")
        until(page, "said.some(words => /^101,325\\.[0-9]+$/.test(words))")
        page.goto("about:blank")
        page.goto(f"{running.url}/#/stream/huge")
        until(page, "said.some(words => /^1(\\.[0-9])?e12$/.test(words))")  # 1.000e+12 lost its first digit at the edge
        page.goto("about:blank")
        page.goto(f"{running.url}/#/stream/still")
        until(page, "new Set(said.filter(words => /^[34][0-9]/.test(words))).size > 1 && !said.includes('42.00')")
        page.goto("about:blank")
        page.goto(f"{running.url}/#/stream/week")
        until(page, "said.some(words => /^[0-9]+ [A-Z][a-z]+$/.test(words)) && said.includes('12:00')")  # else each day came twice
        page.goto("about:blank")
        page.goto(f"{running.url}/#/stream/minutes")
        until(page, "said.some(words => /^[0-9]+:[0-9]+:00$/.test(words))")
        for name in ("huge", "minutes"):
            page.goto("about:blank")
            page.goto(f"{running.url}/#/stream/{name}")
            until(page, "said.length > 20")
            assert page.evaluate("cut") == []


def test_the_example_of_lines_on_the_page_of_the_api_is_sent_as_lines(service: Service, plant: Plant, browser: Browser) -> None:
    with Visit(browser, service.url) as page:
        page.goto(f"{service.url}/docs")
        events = page.locator("#operations-default-postEvents")
        events.locator(".opblock-summary").click()
        events.locator(".opblock-section-request-body select").first.select_option("application/x-ndjson")
        events.get_by_role("button", name="Try it out").click()
        lines = events.locator("textarea").input_value().splitlines()
        assert [json.loads(line)["event_id"] for line in lines] == ["a-17", "a-18"]
        events.get_by_role("button", name="Execute").click()
        answer = events.locator(".live-responses-table")
        expect(answer).to_contain_text('"model_version"')
        expect(answer).not_to_contain_text("urn:onset:bad-event")


def test_a_page_whose_service_has_gone_says_so_and_finds_it_again(tmp_path: Path, tiny_model_path: Path, browser: Browser) -> None:
    with Service(tmp_path / "data", model=tiny_model_path) as short_lived:
        visit = Visit(browser, short_lived.url)
        with visit as page:
            page.goto(short_lived.url)
            expect(page.locator(".empty pre")).to_contain_text("curl -s")
            short_lived.terminate()
            expect(page.locator(".status")).to_have_text("Not connected")
            page.goto(f"{short_lived.url}/#/model")
            expect(page.locator(".notice.wrong")).to_contain_text("The service does not answer")
            short_lived.start()
            expect(page.locator("h1")).to_contain_text("tiny")
            page.goto(f"{short_lived.url}/#/fleet")
            expect(page.locator(".status")).to_have_text("Live")
            visit.wrong = [said for said in visit.wrong if "ERR_" not in said]  # Chromium's own lines on what it could not reach


def test_alerts_stay_as_they_are_for_who_is_about_to_press_a_button_and_are_there_again_after_an_outage(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    midnight = time.time() // 86400 * 86400

    def at_midnight(route: Route) -> None:
        reply = route.fetch()
        alerts = reply.json()
        for alert in alerts["alerts"]:
            alert["started_at"] = midnight
        route.fulfill(response=reply, json=alerts)

    def gone(route: Route) -> None:
        route.abort()

    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as running:
        events = [{"stream_id": "m", "values": {"value": value}} for value in [1.0, 1.1] * 300 + [99.0]]
        local.post(f"{running.url}/v1/events", json=events).raise_for_status()
        visit = Visit(browser, running.url, locale="en-US", timezone_id="UTC")
        with visit as page:
            page.goto(f"{running.url}/#/alerts")
            button = page.get_by_role("button", name="Acknowledge m")
            button.focus()
            page.evaluate("document.activeElement.dataset.same = 'yes'")
            before = page.locator(".alert").inner_text()
            expect(page.locator(".alert")).not_to_have_text(before)  # its age has grown
            expect(button).to_be_focused()
            expect(button).to_have_attribute("data-same", "yes")
            page.route("**/v1/alerts?*", at_midnight)
            page.reload()
            expect(page.locator(".head")).to_contain_text("Times of UTC")
            expect(page.locator(".alert")).to_contain_text("began ")
            expect(page.locator(".alert")).to_contain_text("00:00:00")
            page.route("**/v1/alerts?*", gone)
            expect(page.locator(".notice.wrong")).to_be_visible()
            page.unroute("**/v1/alerts?*", gone)
            expect(page.locator(".notice.wrong")).to_have_count(0)
            visit.wrong = [said for said in visit.wrong if "ERR_" not in said]  # Chromium's own lines on what it could not reach


def test_the_link_of_an_alert_opens_this_one_alone_whatever_became_of_it_and_its_stream_at_that_time(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    began = time.time() - 700
    values = [1.0, 1.1] * 300 + [99.0] * 80
    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false", PUBLIC_URL="https://onset.example/at/") as running:
        for name, length in (("a/1", 680), ("a/2", 680), ("a/3", 601)):
            events = [{"stream_id": name, "values": {"value": value}, "timestamp": began + i} for i, value in enumerate(values[:length])]
            local.post(f"{running.url}/v1/events", json=events).raise_for_status()
        wait(lambda: len(local.get(f"{running.url}/v1/alerts").json()["alerts"]) == 3)
        [alert] = local.get(f"{running.url}/v1/alerts?stream_id=a/2").json()["alerts"]
        assert alert["link"] == f"https://onset.example/at/?alert={alert['id']}"
        linked = f"{running.url}/?alert={alert['id']}"
        visit = Visit(browser, running.url)
        with visit as page:
            page.goto(f"{running.url}/#/alerts")
            expect(page.locator(".alert")).to_have_count(3)
            page.locator(".alert .name", has_text="a/3").get_by_role("link").click()
            expect(page.locator(".chart").first).to_have_attribute("data-onsets", "1")
            expect(page.get_by_role("button", name="All", exact=True)).to_have_attribute("aria-pressed", "true")  # it has just begun
            page.go_back()
            page.locator(".alert", has_text="a/2").get_by_role("link", name="Link").click()
            expect(page.locator(".alert .name")).to_have_text(["a/2"])
            alone = page.url
            page.goto(linked)
            expect(page.locator(".alert .name")).to_have_text(["a/2"])
            assert page.url == alone
            page.locator(".alert .name a").click()
            expect(page.locator(".readout").first).to_have_text(re.compile("^Zoomed in"))
            local.post(f"{running.url}/v1/streams/a/2/accept").raise_for_status()
            page.goto(linked)
            expect(page.locator(".alert")).to_contain_text("Resolved")
            expect(page.locator(".alert")).to_contain_text("after 1 min")  # of the events' own time: they all came at once
            page.get_by_role("button", name="Open").click()
            expect(page.locator(".alert")).to_have_count(2)
            page.goto(f"{running.url}/?alert={'0' * 28}")
            expect(page.locator(".notice.wrong")).to_contain_text("0" * 28)
            page.goto(f"{running.url}/#/stream/a/1?at={began - 60}")
            expect(page.locator(".notice")).to_contain_text("What is held of this stream begins at")
            visit.wrong = [said for said in visit.wrong if "404" not in said]


def test_the_page_of_a_stream_has_its_alerts_which_are_acknowledged_noted_upon_and_taken_back_there(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    began = time.time() - 700
    values = [1.0, 1.1] * 300 + [99.0] * 20 + [1.0, 1.1] * 30
    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as running, Visit(browser, running.url) as page:
        for name in ("a/1", "a/2"):
            events = [{"stream_id": name, "values": {"value": value}, "timestamp": began + i} for i, value in enumerate(values)]
            local.post(f"{running.url}/v1/events", json=events).raise_for_status()
        local.post(f"{running.url}/v1/events", json={"stream_id": "a/1", "values": {"value": 500.0}}).raise_for_status()
        wait(lambda: len(local.get(f"{running.url}/v1/alerts?status=open").json()["alerts"]) == 1)

        def acknowledgement() -> dict[str, Any] | None:
            [alert] = local.get(f"{running.url}/v1/alerts?status=open,acknowledged").json()["alerts"]
            found: dict[str, Any] | None = alert["acknowledgement"]
            return found

        page.goto(f"{running.url}/#/stream/a/1")
        now, earlier = page.get_by_label("Alerts of this stream").locator(".alert"), page.locator(".card .alert")
        expect(now).to_contain_text("value 500.0")
        expect(earlier).to_contain_text("the stream is back to normal")
        page.keyboard.press("a")
        page.get_by_label("Your name").fill("Ada")
        page.get_by_label("Note", exact=True).fill("Looking at the valve")
        page.keyboard.press("Enter")
        expect(now).to_contain_text("by Ada: Looking at the valve")
        page.get_by_role("button", name="Change the note on a/1").click()
        expect(page.get_by_label("Your name")).to_have_value("Ada")
        page.get_by_label("Note", exact=True).fill("Valve ordered")
        page.get_by_role("button", name="Save").click()
        expect(now).to_contain_text("by Ada: Valve ordered")
        assert (acknowledgement() or {})["note"] == "Valve ordered"
        page.goto(f"{running.url}/#/alerts?status=acknowledged")
        page.get_by_role("button", name="Change the note on a/1").click()
        page.get_by_label("Note", exact=True).fill("Valve came")
        page.keyboard.press("Enter")
        expect(page.locator(".alert")).to_contain_text("by Ada: Valve came")  # without leaving the list
        page.get_by_role("button", name="Change the note on a/1").click()
        page.get_by_role("button", name="Take back").click()
        expect(page.locator(".empty")).to_be_visible()
        assert acknowledgement() is None
        page.goto(f"{running.url}/#/stream/a/1")
        page.get_by_role("button", name="Acknowledge a/1").click()
        page.go_back()
        expect(page.locator("dialog[open]")).to_have_count(0)  # it would lie over what has nothing to do with it
        page.goto(f"{running.url}/#/stream/a/2")
        expect(earlier).to_have_count(1)
        expect(now).to_have_count(0)


def test_streams_are_muted_until_a_time_and_their_alerts_stand_apart_until_someone_ends_it(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    values = [1.0, 1.1] * 300 + [99.0] * 20
    settings = {"SILENCE": "false", "ALERTS_RESEND_SECONDS": "1"}
    with (
        Service(tmp_path / "data", model=tiny_model_path, wait=True, forked=True, **settings) as running,
        Visit(browser, running.url) as page,
    ):
        page.add_init_script("const right = Date.now; Date.now = () => right() + 86_400_000;")  # until when is by the service's clock
        page.goto(f"{running.url}/#/alerts")
        expect(page.locator(".empty")).to_be_visible()
        title, mute_button = page.locator("h1").bounding_box(), page.get_by_role("button", name="Mute …").bounding_box()
        assert title
        assert mute_button
        assert mute_button["y"] < title["y"] + title["height"], "beside the title, not below it"
        page.get_by_role("button", name="Mute …").click()
        page.get_by_label("Your name").fill("Ada")
        page.get_by_role("button", name="Mute", exact=True).click()
        expect(page.locator("dialog[open]")).to_contain_text("Which streams is missing.")
        page.get_by_label("Streams, one a line").fill("hall-2\nhall-2/*\n")
        page.get_by_label("Note", exact=True).fill("inspection")
        page.get_by_role("button", name="Mute", exact=True).click()
        expect(page.locator(".mutes li")).to_contain_text("hall-2 · hall-2/* until")
        expect(page.locator(".mutes li")).to_contain_text("by Ada: inspection")
        [mute] = local.get(f"{running.url}/v1/mutes").json()["mutes"]
        assert 7.9 * 3600 < mute["ends_at"] - time.time() <= 8 * 3600, "of an 8 hours' shift, if nobody says how long"
        for name in ("hall-1/a", "hall-2/a"):
            events = [{"stream_id": name, "values": {"value": value}} for value in values]
            local.post(f"{running.url}/v1/events", json=events).raise_for_status()
        alerts = page.locator(".alert")
        expect(alerts).to_have_count(1)
        expect(alerts).to_contain_text("hall-2/a")
        expect(alerts).to_contain_text("nobody is told")
        page.get_by_role("button", name="Open").click()
        expect(page.locator(".alert .name")).to_have_text(["hall-1/a"])
        expect(page.locator(".badge")).to_have_text("1")
        page.get_by_role("button", name="Muted", exact=True).click()
        page.get_by_role("button", name="End … the mute of hall-2, hall-2/*").click()
        page.get_by_role("button", name="End it").click()
        expect(page.locator(".empty")).to_contain_text("No alert is open that nobody is told of.")
        expect(page.locator(".mutes")).to_be_hidden()
        page.get_by_role("button", name="Open").click()
        expect(alerts).to_have_count(2)


def test_an_alert_says_how_rare_its_beginning_was_and_what_its_stream_shows_by_now(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    """The shipped detector tells that a course is unusual where each event is ordinary; that it went far since is the news."""
    newest = {"p_value": 0.0001, "direction": "up", "actual": 471.7}

    def slow(route: Route) -> None:
        reply = route.fetch()
        alerts = reply.json()
        for alert in alerts["alerts"]:  # none where it is asked for before it is listed
            alert["onset"] |= {"p_value": 1.0, "alert_score": 1.02}
            alert["onset"]["contributors"][0] |= {"actual": 169.2, "expected": 169.8, "lower": 166.8, "upper": 172.8}
            last = alert["onset"]["contributors"][0] | {"actual": newest["actual"], "expected": 173.4, "lower": 166.1, "upper": 180.6}
            later = newest | {"timestamp": alert["started_at"] + 60, "alert_score": 0.0, "contributors": [last]}
            alert["last"] = alert["onset"] | later
        route.fulfill(response=reply, json=alerts)

    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as running, Visit(browser, running.url) as page:
        events = [{"stream_id": "m", "values": {"value": value}} for value in [1.0, 1.1] * 300 + [99.0]]
        local.post(f"{running.url}/v1/events", json=events).raise_for_status()
        page.route("**/v1/alerts?*", slow)
        page.goto(f"{running.url}/#/alerts")
        alert = page.locator(".alert")
        expect(alert).to_contain_text("value 169.2, expected 169.8, within its range: its course is unusual · alert score 1.02 · Link")
        expect(alert).to_contain_text("value 471.7, expected 173.4 (up) · chance if normal: 1 in 10,000")
        newest |= {"p_value": 0.7, "direction": "none", "actual": 174.0}
        page.reload()
        expect(alert.locator("> p").last).to_have_text(re.compile(r": value 174\.0, expected 173\.4 · ordinary by itself$"))


def test_alerts_are_narrowed_to_those_of_a_model(tmp_path: Path, browser: Browser) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("line-1", "line-2"):
        build_tiny(models, name=name)
    with Service(tmp_path / "data", model=models, DEFAULT_MODEL="line-1", SILENCE="false") as running, Visit(browser, running.url) as page:
        for name, stream in (("line-1", "a"), ("line-2", "b")):
            events = [{"stream_id": stream, "values": {"value": value}} for value in [1.0, 1.1] * 10 + [99.0]]
            local.post(f"{running.url}/v1/events?model={name}", json=events).raise_for_status()
        page.goto(f"{running.url}/#/alerts")
        expect(page.locator(".alert")).to_have_count(2)
        page.get_by_label("Model").select_option("line-2")
        expect(page.locator(".alert .name")).to_have_text(["b"])
        page.reload()  # as a link that was copied
        expect(page.locator(".alert .name")).to_have_text(["b"])
        expect(page.get_by_label("Model")).to_have_value("line-2")
        page.get_by_role("button", name="Resolved").click()
        expect(page.locator(".empty")).to_contain_text("None of line-2.")


@pytest.fixture
def dipped(tmp_path: Path, tiny_model_path: Path) -> Iterator[Service]:
    """After a power dip: ten streams of two halls, each with an alert."""
    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as running:
        names = [f"hall-{1 + i % 2}/pump-{i}" for i in range(10)]
        events = [{"stream_id": name, "values": {"value": value}} for value in [1.0, 1.1] * 300 + [99.0] for name in names]
        local.post(f"{running.url}/v1/events", json=events, timeout=60).raise_for_status()
        wait(lambda: local.get(f"{running.url}/v1/alerts/count?status=open").json()["count"] == len(names))
        yield running


def test_many_alerts_are_found_by_their_stream_acknowledged_taken_back_and_accepted_at_once(dipped: Service, browser: Browser) -> None:
    with Visit(browser, dipped.url) as page:
        page.goto(f"{dipped.url}/#/alerts")
        alerts, every, became = page.locator(".alert"), page.locator(".bulk input"), page.locator(".notice[role=status]")
        expect(alerts).to_have_count(10)
        page.get_by_label("Search alerts by stream").fill("HALL-1")
        expect(alerts).to_have_count(5)
        expect(page.locator(".badge")).to_have_text("10")  # of all, whatever is searched for
        assert page.url.endswith("#/alerts?q=HALL-1")
        page.reload()  # as a link that was copied
        expect(alerts).to_have_count(5)
        expect(page.locator(".bulk")).to_contain_text("Select the 5 listed")
        every.check()
        page.get_by_label("Select hall-1/pump-0").uncheck()
        expect(page.locator(".bulk")).to_contain_text("4 of 5 selected")
        page.get_by_role("button", name="Acknowledge 4", exact=True).click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("4 critical alerts: you look after them")
        dialog.get_by_role("button", name="Acknowledge").click()
        expect(dialog).to_contain_text("Your name is missing.")
        dialog.get_by_label("Your name").fill("Ada")
        dialog.get_by_label("Note").fill("power dip")
        page.keyboard.press("Enter")
        expect(became).to_have_text("4 acknowledged.")
        expect(page.locator("main")).to_be_focused()  # the button that was pressed is gone
        expect(page.locator(".alert .name")).to_have_text(["hall-1/pump-0"])
        expect(page.locator(".badge")).to_have_text("6")

        page.get_by_role("button", name="Acknowledged").click()
        expect(became).to_be_hidden()
        expect(alerts).to_have_count(4)
        expect(alerts.first).to_contain_text("by Ada: power dip")
        page.get_by_label("Select hall-1/pump-2").check()
        page.get_by_label("Select hall-1/pump-4").check()
        page.get_by_role("button", name="Take back 2").click()
        dialog.get_by_role("button", name="Take back").click()
        expect(became).to_have_text("2 taken back.")
        expect(alerts).to_have_count(2)
        every.check()
        page.get_by_role("button", name="Accept 2 as normal").click()
        expect(dialog).to_contain_text("2 streams take what they show now for their normal")
        expect(dialog.get_by_label("Your name")).to_have_value("Ada")
        dialog.get_by_role("button", name="Accept as normal").click()
        expect(became).to_have_text("2 accepted as normal.")
        expect(page.locator(".empty")).to_contain_text("None of a stream whose name holds “HALL-1”.")
        page.get_by_role("button", name="Resolved").click()
        expect(alerts).to_have_count(2)
        expect(alerts.first).to_contain_text("accepted as the new normal")


def test_many_alerts_are_acknowledged_without_a_mouse_and_what_is_over_meanwhile_is_said(dipped: Service, browser: Browser) -> None:
    with Visit(browser, dipped.url) as page:
        page.goto(f"{dipped.url}/#/alerts")
        expect(page.locator(".alert")).to_have_count(10)
        page.keyboard.press("/")
        page.keyboard.type("hall-2")
        expect(page.locator(".alert")).to_have_count(5)
        page.keyboard.press("ArrowDown")
        page.keyboard.press("x")
        page.keyboard.press("j")
        page.keyboard.press("Tab")  # whatever the focus is on
        page.keyboard.press("x")
        expect(page.locator(".bulk")).to_contain_text("2 of 5 selected")
        page.keyboard.press("Shift+X")
        expect(page.locator(".bulk")).to_contain_text("5 of 5 selected")
        page.route("**/v1/alerts?*", lambda route: route.abort())  # what is shown stays as it is
        [another, over] = local.get(f"{dipped.url}/v1/alerts?q=hall-2&limit=2").json()["alerts"]
        local.post(f"{dipped.url}/v1/alerts/{another['id']}/acknowledge", json={"by": "bob"}).raise_for_status()
        local.post(f"{dipped.url}/v1/streams/{over['stream_id']}/accept").raise_for_status()
        wait(lambda: local.get(f"{dipped.url}/v1/alerts/{over['id']}").json()["status"] == "resolved")
        page.keyboard.press("a")
        page.keyboard.type("Ada")
        page.unroute("**/v1/alerts?*")
        posted: list[str] = []
        page.on("request", lambda request: posted.append(request.url) if request.method == "POST" else None)
        for _ in range(3):
            page.keyboard.down("Enter")  # held
        page.keyboard.up("Enter")
        expect(page.locator(".notice[role=status]")).to_have_text(
            re.compile("^(?=.*3 acknowledged)(?=.*1 acknowledged before, and left as they are)(?=.*1 over by now)")
        )
        assert len(posted) == 1, "the next answer would be that all were acknowledged before"
        page.keyboard.press("Escape")
        expect(page.get_by_label("Search alerts by stream")).to_have_value("")
        expect(page.locator(".alert")).to_have_count(5)


def test_alerts_that_are_acknowledged_one_after_the_other_by_keys_are_all_of_them_in_their_order(dipped: Service, browser: Browser) -> None:
    with Visit(browser, dipped.url) as page:
        page.goto(f"{dipped.url}/#/alerts?q=hall-1")
        expect(page.locator(".alert")).to_have_count(5)
        names = page.locator(".alert .name a").all_inner_texts()
        page.keyboard.press("j")
        for i, name in enumerate(names):
            expect(page.locator(".alert .name a").first).to_have_text(name)
            expect(page.locator(".alert .name a").first).to_be_focused()  # what follows the one that is gone
            page.keyboard.press("a")
            page.get_by_label("Your name").fill("Ada")
            page.keyboard.press("Enter")
            expect(page.locator(".alert")).to_have_count(len(names) - 1 - i)
        expect(page.locator("main")).to_be_focused()


def test_in_the_fleet_an_alert_that_is_acknowledged_makes_way_for_those_that_are_not(dipped: Service, browser: Browser) -> None:
    with Visit(browser, dipped.url) as page:
        page.goto(dipped.url)
        rows = page.locator(".rows li")
        expect(rows).to_have_count(10)
        first = page.locator(".rows li[aria-posinset='1']")
        [alert] = local.get(f"{dipped.url}/v1/alerts?stream_id={first.locator('.name').inner_text()}").json()["alerts"]
        local.post(f"{dipped.url}/v1/alerts/{alert['id']}/acknowledge", json={"by": "Ada"}).raise_for_status()
        last = page.locator(".rows li[aria-posinset='10']")
        expect(last.locator(".name")).to_have_text(alert["stream_id"])
        expect(last).to_contain_text("Critical alert, acknowledged")
        expect(first).not_to_contain_text("acknowledged")
        local.delete(f"{dipped.url}/v1/alerts/{alert['id']}/acknowledge").raise_for_status()
        expect(page.locator(".rows")).not_to_contain_text("acknowledged")


def test_an_alert_that_a_link_led_to_is_acknowledged_by_one_key(dipped: Service, browser: Browser) -> None:
    [alert] = local.get(f"{dipped.url}/v1/alerts?limit=1").json()["alerts"]
    with Visit(browser, dipped.url) as page:
        page.goto(f"{dipped.url}/?alert={alert['id']}")
        expect(page.locator(".alert")).to_have_count(1)
        page.keyboard.press("a")
        page.get_by_label("Your name").fill("Ada")
        page.keyboard.press("Enter")
        expect(page.locator(".alert")).to_contain_text("by Ada")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_many_alerts_are_accessible_and_fit_a_phone(dipped: Service, browser: Browser, colours: str) -> None:
    check_views(browser, dipped, ["alerts"], colours, lambda page: page.locator(".bulk input").check())


def test_a_replica_of_an_earlier_release_costs_no_page_its_alerts(dipped: Service, browser: Browser) -> None:
    """Behind a balancer, during an update: it has no count."""
    visit = Visit(browser, dipped.url)
    with visit as page:
        page.route("**/v1/alerts/count?*", lambda route: route.fulfill(status=404, content_type="application/problem+json", body="{}"))
        with page.expect_response("**/v1/alerts/count?*"):
            page.goto(dipped.url)
        page.get_by_role("link", name="Alerts").click()
        expect(page.locator(".alert")).to_have_count(10)
        expect(page.locator(".badge")).to_have_text("10")
        visit.wrong = [said for said in visit.wrong if "404" not in said]  # Chromium's own line on the answer


def test_what_is_wrong_with_the_service_or_before_it_is_said_in_every_view(tmp_path: Path, tiny_model_path: Path, browser: Browser) -> None:
    def away(route: Route) -> None:
        problem = {"title": "Store unavailable", "status": 503, "detail": "The state store does not answer."}
        route.fulfill(status=503, content_type="application/problem+json", body=json.dumps(problem))

    def signed_out(route: Route) -> None:
        route.fulfill(status=200, content_type="text/html", body="<h1>Sign in</h1>")

    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as running:
        visit = Visit(browser, running.url)
        with visit as page:
            page.route("**/v1/alerts/**", away)
            page.goto(running.url)
            expect(page.locator(".status")).to_have_text("Live")  # of what is scored, which is nothing
            expect(page.locator(".trouble")).to_contain_text("The state store does not answer.")
            page.unroute("**/v1/alerts/**", away)
            expect(page.locator(".trouble")).to_be_hidden()
            page.route("**/v1/**", signed_out)  # as a proxy does once its session is over
            page.goto(f"{running.url}/#/alerts")
            expect(page.locator(".notice.wrong")).to_contain_text("Something else answered in the service's place")
            page.goto(f"{running.url}/#/fleet")
            expect(page.locator(".empty")).to_contain_text("Load this page again")
            expect(page.locator(".status")).to_have_text("Not connected")
            visit.wrong = [said for said in visit.wrong if "503" not in said]  # Chromium's own line on the answer


def test_open_alerts_are_counted_alike_in_every_view(tmp_path: Path, tiny_model_path: Path, browser: Browser) -> None:
    with Service(tmp_path / "data", model=tiny_model_path, SILENCE="false") as running, Visit(browser, running.url) as page:
        names = [f"m-{i}" for i in range(PAGE + 5)]
        events = [{"stream_id": name, "values": {"value": value}} for value in [1.0, 1.1] * 10 + [99.0] for name in names]
        local.post(f"{running.url}/v1/events", json=events, timeout=30).raise_for_status()
        wait(lambda: len(local.get(f"{running.url}/v1/alerts?limit=1000").json()["alerts"]) == len(names))
        page.goto(running.url)
        expect(page.locator(".badge")).to_have_text(str(len(names)))
        page.goto(f"{running.url}/#/alerts")
        expect(page.locator(".alert")).to_have_count(PAGE)
        expect(page.locator(".more")).to_contain_text(f"The latest {PAGE} of {len(names)}.")
        page.get_by_role("button", name="Show more").click()
        expect(page.locator(".alert")).to_have_count(len(names))
        expect(page.locator(".more")).to_be_empty()
        assert page.locator(".badge").inner_text() == str(len(names))
        page.emulate_media(media="print", color_scheme="dark")
        expect(page.locator("html")).to_have_attribute("data-theme", "light")  # paper is white
        expect(page.locator("header.bar")).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollHeight") > 30 * PAGE  # all of them, not a screen of them


def test_ages_are_by_the_clock_of_the_service_where_that_of_the_browser_is_off(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    with Service(tmp_path / "data", model=tiny_model_path) as running, Visit(browser, running.url) as page:
        local.post(f"{running.url}/v1/events", json={"stream_id": "m", "values": {"value": 1.0}}).raise_for_status()
        page.add_init_script("const right = Date.now; Date.now = () => right() + 3_600_000;")
        page.goto(running.url)
        expect(page.locator(".rows li .age")).to_have_text(re.compile("^(now|[0-9]+ s ago|[1-5] min ago)$"))


def test_an_alert_that_opened_before_a_restart_can_be_accepted_before_its_stream_speaks_again(
    tmp_path: Path, tiny_model_path: Path, browser: Browser
) -> None:
    with Service(tmp_path / "data", model=tiny_model_path) as restarted:
        visit = Visit(browser, restarted.url)
        with visit as page:
            events = [{"stream_id": "m", "values": {"value": value}} for value in [1.0, 1.1] * 300 + [99.0]]
            assert local.post(f"{restarted.url}/v1/events", json=events).json()[-1]["status"] == "frozen"
            page.goto(f"{restarted.url}/#/stream/m")
            expect(page.locator(".head .state")).to_contain_text("alert open")
            restarted.terminate()
            restarted.start()
            expect(page.locator(".notice")).to_contain_text("601 events of this stream have been scored, the last one")
            expect(page.locator(".notice")).to_contain_text("value 99.00, expected ")
            expect(page.locator(".head .state")).to_have_text("")
            page.get_by_role("button", name="Accept as normal").click()
            page.locator("dialog[open] .primary").click()
            expect(page.locator("dialog[open]")).to_have_count(0)
            assert local.get(f"{restarted.url}/v1/streams/m").json()["status"] == "ready"
            visit.wrong = [said for said in visit.wrong if "ERR_" not in said]  # Chromium's own lines on what it could not reach


@pytest.mark.parametrize(
    ("features", "drawn"), [(("value",), "Recent values; score of each event"), (("load", "heat"), "Score of each event")]
)
def test_a_row_says_what_its_picture_shows(tmp_path: Path, browser: Browser, features: tuple[str, ...], drawn: str) -> None:
    model = build_tiny(tmp_path, features)
    with Service(tmp_path / "data", model=model) as machines, Visit(browser, machines.url) as page:
        local.post(f"{machines.url}/v1/events", json={"stream_id": "m", "values": dict.fromkeys(features, 1.0)}).raise_for_status()
        page.goto(machines.url)
        expect(page.locator(".rows li")).to_have_count(1)
        expect(page.locator(".columns")).to_contain_text(drawn)
        assert ("Recent values" in page.locator(".columns").inner_text()) is (len(features) == 1)


def test_the_page_of_one_replica_shows_what_the_others_score(tmp_path: Path, tiny_model_path: Path, browser: Browser) -> None:
    folders = [tmp_path / name / "data" for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(parents=True)
    with Valkey(tmp_path / "valkey") as store, contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(Service(folder, model=tiny_model_path, REDIS_URL=store.url, SILENCE="false")) for folder in folders)

        def post(service: Service, name: str, *values: float) -> None:
            events = [{"stream_id": name, "values": {"value": value}} for value in values]
            local.post(f"{service.url}/v1/events", json=events, timeout=30).raise_for_status()

        calm = [10 + 0.1 * (i % 3) for i in range(20)]
        for values in (calm, calm):
            for service in (one, two):
                post(service, "spread", *values)
        post(one, "at one", *calm)
        post(two, "at two", *calm, *calm)
        with Visit(browser, one.url) as page:
            page.goto(one.url)
            expect(page.locator(".rows li")).to_have_count(3)
            expect(page.locator(".summary")).to_contain_text("2 replicas")
            post(two, "at two", 99.0)
            top = page.locator('.rows li[aria-posinset="1"] a')
            expect(top).to_have_attribute("title", "at two")
            expect(top.locator(".state")).to_contain_text(" alert, onset")
            page.goto(f"{one.url}/#/stream/spread")
            chart = page.locator(".chart").first
            expect(chart).to_have_attribute("data-points", "80")
            post(two, "spread", *calm)
            post(one, "spread", *calm)
            expect(chart).to_have_attribute("data-points", "120")
            expect(page.locator(".figures")).to_contain_text("120")
            two.terminate()
            page.goto(f"{one.url}/#/fleet")
            expect(page.locator(".rows li")).to_have_count(3)
            expect(page.locator(".summary")).not_to_contain_text("replicas")


LOG_VIEWS = ["fleet", "stream/web-1", "alerts", "patterns", "model"]


class Web:
    """Sessions of a web server's log, as the tiny log model knows them; one goes wrong."""

    def __init__(self, url: str) -> None:
        self._url = url

    def say(self, stream: str, *messages: str) -> None:
        body = [{"stream_id": stream, "message": message} for message in messages]
        local.post(f"{self._url}/v1/events", json=body, timeout=30).raise_for_status()

    def session(self, stream: str) -> None:
        self.say(stream, "Accepted connection from 10.0.0.7:4711", *(f"Took {9 + i}.5 ms for /page/{i}?id=77" for i in range(3)))
        self.say(stream, "Closed connection from 10.0.0.7:4711")
        local.post(f"{self._url}/v1/events", json={"stream_id": stream, "end": True}).raise_for_status()

    def fault(self, stream: str) -> None:
        self.say(stream, "Accepted connection from 10.0.0.9:80", "Took 9.5 ms for /page/1", "Disk sda is 97 percent full")
        local.post(f"{self._url}/v1/events", json={"stream_id": stream, "end": True}).raise_for_status()
        self.say(
            stream, "Accepted connection from 10.0.0.9:80", "Took 9.5 ms for /page/2", "Kernel panic: not syncing, attempted to kill init"
        )


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory, service: Service) -> Iterator[Service]:
    """A service of a log model, to which all is quiet on web-2 and not on web-1. `service` only says whether the page is built."""
    folder = tmp_path_factory.mktemp("web")
    with Service(folder / "data", model=build_tiny_log(folder), SILENCE="false", CANARY_SECONDS="0") as running:
        lines = Web(running.url)
        for name in ("web-1", "web-2"):
            for _ in range(5):
                lines.session(name)
        lines.fault("web-1")
        yield running


def test_a_log_stream_is_shown_as_its_lines_with_what_was_expected_in_place_of_an_odd_one(web: Service, browser: Browser) -> None:
    with Visit(browser, web.url) as page:
        page.goto(f"{web.url}/#/fleet")
        top = page.locator('.rows li[aria-posinset="1"] a')
        expect(top).to_have_attribute("title", "web-1")
        expect(top).to_contain_text("Kernel panic: not syncing")
        top.click()
        expect(page.locator("h1")).to_have_text("web-1")
        lines = page.locator(".lines > li")
        expect(lines).to_have_count(37)
        expect(lines.first).to_contain_text("new pattern")
        disk = page.locator(".lines > li", has_text="Disk sda is 97 percent full")
        expect(disk).to_have_attribute("data-kind", "onset")
        expect(disk.locator("var")).to_have_text(["sda", "97"])
        disk.locator("summary").focus()
        page.keyboard.press("Enter")
        expect(disk.locator(".shares li").first).to_contain_text("Took <NUM> ms for <*>")
        expect(disk.locator(".shares li").first).to_contain_text("%")
        expect(disk.locator(".before li")).to_have_text(["Took <NUM> ms for <*>", "Accepted connection from <IP>"])
        page.get_by_role("button", name=re.compile("^Anomalous")).click()
        expect(lines).to_have_count(2)
        page.get_by_role("button", name=re.compile("^All [0-9]")).click()
        page.get_by_role("button", name="Pause").click()
        Web(web.url).say("web-1", "Took 9.5 ms for /paused")
        time.sleep(0.5)
        expect(lines).to_have_count(37)
        page.get_by_role("button", name="Go on").click()
        expect(lines.first).to_contain_text("/paused")
        page.goto(f"{web.url}/#/alerts")
        alert = page.locator(".alert", has_text="web-1")
        expect(alert.locator(".message")).to_have_text("Disk sda is 97 percent full")
        expect(alert.locator(".shares")).to_contain_text("Took <NUM> ms for <*>")


def test_an_alert_of_a_line_says_what_about_it_was_unusual_and_only_what_was_likelier(web: Service, browser: Browser) -> None:
    def slow(route: Route) -> None:
        """As if the line had been likely, and late."""
        reply = route.fetch()
        alerts = reply.json()
        for alert in alerts["alerts"]:
            onset = alert["onset"]
            onset["expected"] = {"Took <NUM> ms for <*>": 0.6, onset["line"]["template"]: 0.3, "Closed connection from <IP>": 0.1}
            parts = {"gap": (0.7, 40.0, 0.2), "number_1": (0.2, 97.0, 41.0), "number_2": (0.04, 1.0, 2.0), "template": (0.06, 4.0, None)}
            onset["contributors"] = [
                dict(zip(("contribution", "actual", "expected"), parts[name], strict=True), feature=name) for name in parts
            ]
        route.fulfill(response=reply, json=alerts)

    with Visit(browser, web.url) as page:
        page.route("**/v1/alerts?*", slow)
        page.goto(f"{web.url}/#/alerts")
        alert = page.locator(".alert", has_text="web-1")
        expect(alert.locator(".shares li")).to_have_count(1)
        expect(alert.locator(".shares li")).to_contain_text("Took <NUM> ms for <*>")
        expect(alert.locator(".evidence")).to_contain_text("How long after the line before: 40.00 s, expected 0.2 s · 70 % of the error")
        expect(alert.locator(".evidence")).to_contain_text("Its first number: 97.00, expected 41.00 · 20 % of the error")
        expect(alert.locator(".evidence")).not_to_contain_text("second number")


def test_new_patterns_are_listed_with_how_often_and_an_example(web: Service, browser: Browser) -> None:
    with Visit(browser, web.url) as page:
        page.goto(f"{web.url}/#/fleet")
        page.get_by_role("link", name="Patterns").click()
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page.locator("tbody .pattern")).to_contain_text("Kernel panic: not syncing")
        Web(web.url).say("web-3", "Unheard of 17 times", "Unheard of 18 times")
        row = page.locator("tbody tr", has_text="Unheard of")
        expect(row.locator("td").nth(1)).to_have_text("2")
        expect(row.locator("var")).to_have_text("<NUM>")
        expect(row).to_contain_text("Unheard of 17 times")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_view_of_logs_is_accessible_and_fits_a_phone(web: Service, browser: Browser, colours: str) -> None:
    check_views(browser, web, LOG_VIEWS, colours)


def test_an_alert_of_a_line_that_is_over_can_be_accepted_and_it_is_said_where_that_teaches_nothing(web: Service, browser: Browser) -> None:
    """Who came in the morning found what a release had said resolved, and nothing to accept."""
    lines = Web(web.url)
    for _ in range(5):
        lines.session("web-9")
    lines.say("web-9", "Kernel panic: not syncing, attempted to kill init")
    for _ in range(4):
        lines.session("web-9")
    wait(lambda: bool(local.get(f"{web.url}/v1/alerts?stream_id=web-9&status=resolved").json()["alerts"]))
    [alert] = local.get(f"{web.url}/v1/alerts?stream_id=web-9").json()["alerts"]
    with Visit(browser, web.url) as page:
        for address in (f"{web.url}/#/alerts?status=resolved&q=web-9", f"{web.url}/?alert={alert['id']}"):
            page.goto(address)
            page.get_by_role("button", name="Accept the lines of web-9 as normal").click()
            dialog = page.get_by_role("dialog")
            expect(dialog).to_contain_text("of web-9: the rare lines that it shows are usual there from now on")
            dialog.get_by_label("Your name").fill("Ada")
            page.keyboard.press("Enter")
            expect(dialog).to_contain_text("It teaches nothing")  # its model is one of sessions
            page.keyboard.press("Escape")
            expect(page.locator("dialog[open]")).to_have_count(0)


def test_the_plain_table_shows_the_last_line_of_a_log_stream(web: Service) -> None:
    page = local.get(f"{web.url}/table").text
    assert "Last line" in page
    assert "(end of session)" in page
    refused = local.post(f"{web.url}/v1/backtest", content=b"time,value\n1,2\n", headers={"content-type": "text/csv"})
    assert (refused.status_code, refused.json()["field"]) == (422, "model")
