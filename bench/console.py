"""Whether the page is smooth: frames of a real browser while hundreds of streams speak ten times a second.

    python -m bench.console [--quick] [--streams 300] [--hz 10] [--seconds 20] [--json FILE] [--pictures DIR]

A service with the shipped detector, a sender that posts one event of each stream HZ times a second, and Chromium (headless, drawing by the
processor) on the fleet view; then while it is scrolled; then on one stream. Floor: an empty page of the same browser under the same load.
A frame takes from one requestAnimationFrame to the next; a long task is what holds the page's thread for more than 50 ms; an update is a
frame in which the list or the chart has changed. *Busy* is the processor time of the page's thread (Chromium's own TaskDuration in thread
ticks): unlike frames it hardly moves when something else takes the processors. Of it *script* is our code, the rest the browser's style,
layout and paint. *Browser* is what its other threads take beside: rasters, compositor, display; a GPU takes most of that off the processor.

`--pictures` also takes the views at three sizes, light and dark. Needs the built page (`make console`), Debian's chromium, and playwright
(extra `dev`).
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import numpy as np
import typer
from playwright.sync_api import Browser, sync_playwright
from rich.table import Table

from bench.report import Goal, JsonFile, Machine, report, table
from bench.servers import service

BUILT = Path(__file__).parents[1] / "service" / "console" / "dist" / "index.html"
BROWSER = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZE = {"width": 1280, "height": 800}
PICTURES = ((1280, 800), (820, 1180), (390, 844))
HISTORY = 150
"""Events of each stream before anything is measured: beyond the warm-up."""
BODY = 5000
DISTURBED = 7
KINDS = (
    ("pump", "temperature", 74.0),
    ("fan", "pressure", 1480.0),
    ("valve", "flow", 2.3),
    ("motor", "vibration", 6.4),
    ("boiler", "current", 18.0),
)
"""Of streams: machine, quantity, usual value."""
LONG_MS = 50.0
SETTLE_SECONDS = 3.0
FRAMES = """([seconds, watched, scrolled]) => new Promise(done => {
  const frames = [], long = [];
  let changed = false, updates = 0;
  const tasks = new PerformanceObserver(list => long.push(...list.getEntries().map(one => one.duration)));
  tasks.observe({entryTypes: ['longtask']});
  const seen = new MutationObserver(() => changed = true);
  const target = watched && document.querySelector(watched);
  if (target) seen.observe(target, {subtree: true, childList: true, characterData: true, attributes: true});
  const box = scrolled && document.querySelector(scrolled);
  let last = performance.now();
  const end = last + 1000 * seconds;
  const frame = now => {
    frames.push(now - last);
    last = now;
    updates += changed;
    changed = false;
    if (box) box.scrollTop = (box.scrollHeight - box.clientHeight) * (0.5 - 0.5 * Math.cos(now / 1000));
    if (now < end) return void requestAnimationFrame(frame);
    tasks.disconnect();
    seen.disconnect();
    done({frames, long, updates});
  };
  requestAnimationFrame(frame);
})"""


@dataclass(frozen=True)
class Spent:
    """Processor seconds: of the page's thread, of its code in it, of the whole browser."""

    page: float
    script: float
    browser: float

    def __sub__(self, before: Spent) -> Spent:
        return Spent(self.page - before.page, self.script - before.script, self.browser - before.browser)


@dataclass(frozen=True)
class Smoothness:
    """Of one view."""

    view: str
    seconds: float
    frames_per_second: float
    p50_ms: float
    p99_ms: float
    longest_ms: float
    long_tasks: int
    longest_task_ms: float
    updates_per_second: float
    busy_share: float
    """Of one processor, by the page's thread."""
    script_share: float
    """Of one processor, by the page's own code: a part of `busy_share`."""
    browser_share: float
    """Of one processor, by all other threads of the browser."""
    busy_ms_an_update: float

    @classmethod
    def of(cls, view: str, measured: dict[str, Any], spent: Spent) -> Smoothness:
        frames, tasks = np.array(measured["frames"][1:]), measured["long"]
        seconds = float(frames.sum()) / 1000
        p50, p99 = np.percentile(frames, (50, 99))
        return cls(
            view,
            round(seconds, 1),
            round(len(frames) / seconds, 1),
            round(float(p50), 1),
            round(float(p99), 1),
            round(float(frames.max()), 1),
            len(tasks),
            round(max(tasks, default=0.0), 1),
            round(measured["updates"] / seconds, 1),
            round(spent.page / seconds, 3),
            round(spent.script / seconds, 3),
            round((spent.browser - spent.page) / seconds, 3),
            round(1000 * spent.page / measured["updates"], 1) if measured["updates"] else 0.0,
        )


def name_of(stream: int) -> str:
    machine, quantity, _ = KINDS[stream % len(KINDS)]
    return f"plant-{1 + stream % 3}/{machine}-{stream:03}/{quantity}"


class Sender:
    """Posts one event of each stream `hz` times a second; one stream in a hundred jumps now and then, so that ranks change."""

    def __init__(self, url: str, streams: int, hz: float) -> None:
        self._client = httpx.Client(base_url=url, timeout=30)
        self._names = [name_of(i) for i in range(streams)]
        self._hz, self._random = hz, random.Random(1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.posts = 0

    def __enter__(self) -> Sender:
        now = time.time()
        past = [self._event(i, now - (HISTORY - j) / self._hz) for j in range(HISTORY) for i in range(len(self._names))]
        for i in range(0, len(past), BODY):
            self._post(past[i : i + BODY])
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ended.is_set():
            self._post([self._event(i, time.time()) for i in range(len(self._names))])
            self.posts += 1
            due = max(due + 1 / self._hz, time.monotonic() - 1)
            self._ended.wait(max(0.0, due - time.monotonic()))

    def _event(self, i: int, at: float) -> dict[str, Any]:
        push = 0.5 if i % 100 == DISTURBED and at % 20 < 5 and self._thread.is_alive() else 0.0
        value = KINDS[i % len(KINDS)][2] * (1 + 0.06 * math.sin(at / 3 + i) + self._random.gauss(0, 0.006) + push)
        return {"stream_id": self._names[i], "timestamp": at, "values": {"value": value}}

    def _post(self, events: list[dict[str, Any]]) -> None:
        self._client.post("/v1/events", json=events).raise_for_status()


def main(
    streams: Annotated[int, typer.Option(min=10, max=500)] = 300,
    hz: Annotated[float, typer.Option(min=1, max=50, help="Events a second of each.")] = 10.0,
    seconds: Annotated[float, typer.Option(min=2, help="Of each view.")] = 20.0,
    quick: Annotated[bool, typer.Option("--quick", help="Three seconds of each view: does it run?")] = False,
    json_file: JsonFile = None,
    pictures: Annotated[Path | None, typer.Option(help="Also take the views at three sizes, into this folder.")] = None,
) -> None:
    """Watch a fleet and a stream in a browser, and print how its frames came."""
    chromium = shutil.which("chromium")
    if chromium is None or not BUILT.is_file():
        raise SystemExit("chromium is missing: apt-get install chromium." if chromium is None else "The page is not built: make console.")
    machine = Machine.now()
    with tempfile.TemporaryDirectory(prefix="onset-") as folder, service(Path(folder), settings={"ONSET_SILENCE": "false"}) as server:
        url = f"http://127.0.0.1:{server.port}"
        with Sender(url, streams, hz) as sender:
            began, before = time.monotonic(), sender.posts
            views = watched(chromium, url, 3.0 if quick else seconds, pictures)
            offered = (sender.posts - before) / (time.monotonic() - began)
    figures = {"streams": streams, "asked_hz": hz, "offered_hz": round(offered, 2), "views": [asdict(view) for view in views]}
    title = f"{streams} streams, {offered:.1f} of {hz:g} events a second each, {SIZE['width']} by {SIZE['height']}"
    report([_table(title, views)], _goals(views, hz, offered), machine, figures, json_file)


def watched(chromium: str, url: str, seconds: float, pictures: Path | None) -> list[Smoothness]:
    """The floor, then each view, one after the other in one browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=BROWSER)
        page = browser.new_page(viewport=cast("Any", SIZE))
        inside = page.context.new_cdp_session(page)
        inside.send("Performance.enable", {"timeDomain": "threadTicks"})
        whole = browser.new_browser_cdp_session()

        def spent() -> Spent:
            told = {one["name"]: one["value"] for one in inside.send("Performance.getMetrics")["metrics"]}
            processes = whole.send("SystemInfo.getProcessInfo")["processInfo"]
            return Spent(told["TaskDuration"], told["ScriptDuration"], sum(one["cpuTime"] for one in processes))

        def measured(view: str, watched: str = "", scrolled: str = "") -> Smoothness:
            time.sleep(SETTLE_SECONDS)
            before = spent()
            found = page.evaluate(FRAMES, [seconds, watched, scrolled])
            return Smoothness.of(view, found, spent() - before)

        page.goto("about:blank")
        views = [measured("empty page")]
        page.goto(f"{url}/#/fleet")
        page.wait_for_selector(".rows li")
        views += [measured("fleet", ".rows"), measured("fleet, scrolled", ".rows", ".rows")]
        page.goto(f"{url}/#/stream/{name_of(DISTURBED)}")
        page.wait_for_selector(".chart canvas")
        views.append(measured("stream", ".figures"))
        if pictures:
            take_pictures(browser, url, pictures)
        browser.close()
    return views


def take_pictures(browser: Browser, url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for colours in ("light", "dark"):
        for width, height in PICTURES:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=cast("Any", colours))
            for view, path, drawn in (("fleet", "fleet", ".rows canvas"), ("stream", f"stream/{name_of(DISTURBED)}", ".chart canvas")):
                page.goto(f"{url}/#/{path}")
                page.wait_for_selector(drawn)
                page.wait_for_timeout(1000 * SETTLE_SECONDS)
                page.screenshot(path=folder / f"{view}-{width}-{colours}.png")
            page.close()


def _table(title: str, views: list[Smoothness]) -> Table:
    numbers = (
        "frames/s",
        "p50 ms",
        "p99 ms",
        "longest ms",
        f"tasks > {LONG_MS:g} ms",
        "longest task ms",
        "updates/s",
        "busy",
        "script",
        "browser",
        "ms an update",
    )
    made = table(title, ["view"], numbers)
    for view in views:
        made.add_row(view.view, *(f"{value:g}" for value in list(asdict(view).values())[2:]))
    return made


def _goals(views: list[Smoothness], hz: float, offered: float) -> list[Goal]:
    floor = views[0].frames_per_second
    goals = [Goal("events offered ÷ asked", offered / hz, 0.95)]
    for view in views[1:]:
        goals.append(Goal(f"{view.view}: frames/s ÷ those of an empty page", view.frames_per_second / floor, 0.95))
        goals.append(Goal(f"{view.view}: p99 of a frame, ms (three frames of 60 a second)", view.p99_ms, 50.0, at_least=False))
        goals.append(
            Goal(f"{view.view}: tasks of more than {LONG_MS:g} ms a minute", 60 * view.long_tasks / view.seconds, 3.0, at_least=False)
        )
    return goals


if __name__ == "__main__":
    typer.run(main)
