"""A real shipper, unchanged, tails a file into a real service: every line is scored once and in order, whoever is killed in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import local
from tests.e2e.process import Service
from tests.log_doors import LINES
from tests.shippers import SyslogNg, documented
from tests.tiny_log import build_tiny_log

BEGUN = datetime(2026, 11, 26, 8, tzinfo=UTC)
BGL = Path(__file__).parents[3] / "shared" / "data" / "loghub_2k" / "BGL_2k.log"
EACH = '\\"n\\":\\"$(md5 $MSG)\\"'
"""A label that makes a stream of every line."""


def lines() -> Iterator[str]:
    """As an application writes them, with what JSON has to escape."""
    i = 0
    while True:
        moment = (BEGUN + timedelta(milliseconds=7 * i)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        yield f'{moment} {LINES[i % 3]} "{i}"\t\\ü'
        i += 1


def with_a_stream_of_each_line(config: str) -> str:
    """Besides the documented destination one that gives every line a stream of its own."""
    template, log = config.index("template t_push"), config.index("log {")
    second = config[template:log].replace("t_push", "t_each").replace("d_onset", "d_each").replace('\\"job\\":\\"shop\\"', EACH)
    second = second.replace("/push", "/push?model=tiny-log")  # syslog-ng tells destinations apart by their URL
    assert second.count("$(md5 $MSG)") == 1
    return config[:log] + second + config[log:].replace("destination(d_onset);", "destination(d_onset); destination(d_each);")


class World:
    """A service, a shipper, and the file between them."""

    def __init__(self, folder: Path, service: Service, shipper: SyslogNg, file: Path) -> None:
        self.folder, self.service, self.shipper, self.file = folder, service, shipper, file

    def append(self, some: list[str]) -> None:
        with self.file.open("a") as file:
            file.writelines(f"{line}\n" for line in some)

    def versions(self) -> dict[str, int]:
        """Events of each stream."""
        found: dict[str, int] = {}
        cursor: str | None = ""
        while cursor is not None:
            page: dict[str, Any] = local.get(
                f"{self.service.url}/v1/streams", params={"cursor": cursor, "limit": "1000"}, timeout=20
            ).json()
            found |= {stream["stream_id"]: stream["state_version"] for stream in page["streams"]}
            cursor = page["next_cursor"]
        return found

    def whole(self) -> int:
        """Lines of the stream that has them all."""
        return next((version for name, version in self.versions().items() if 'job="shop"' in name), 0)

    def until(self, true: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.shipper.runs, self.shipper.log
            assert time.monotonic() < deadline, (self.whole(), self.shipper.log[-2000:], self.service.log.read_text()[-2000:])
            time.sleep(0.1)


@pytest.fixture
def world(tmp_path: Path, empty_server: str) -> Iterator[World]:
    model = build_tiny_log(tmp_path)
    file = tmp_path / "app.log"
    file.touch()
    (tmp_path / "service").mkdir()
    with Service(tmp_path / "service" / "data", model=model, REDIS_URL=empty_server) as service:
        shipper = SyslogNg(tmp_path / "syslog-ng", with_a_stream_of_each_line(documented()), file, service.url)
        with shipper:
            yield World(tmp_path, service, shipper, file)


def test_every_line_is_scored_once_and_in_order_though_service_and_shipper_are_killed(world: World) -> None:
    written = [line for line, _ in zip(lines(), range(2000), strict=False)]
    world.append(written[:500])
    world.until(lambda: world.whole() >= 200)
    world.service.kill()
    world.append(written[500:1000])
    time.sleep(1)
    world.service.start()
    world.until(lambda: world.whole() >= 1000)
    world.append(written[1000:1300])
    world.shipper.kill()
    world.append(written[1300:1500])
    world.shipper.start()
    world.until(lambda: world.whole() >= 1500)
    world.append(written[1500:1800])
    world.shipper.stop()
    world.append(written[1800:])
    world.shipper.start()
    world.until(lambda: len(world.versions()) == 2001)
    world.until(lambda: world.whole() == 2000)
    time.sleep(1)  # nothing comes after
    versions = world.versions()
    assert sorted(versions.values()) == [1] * 2000 + [2000], "a line that came late would not have been scored"


def machine_log(folder: Path) -> Path:
    """Of a real machine (BGL, in loghub) where that is beside this checkout, else of the same form."""
    if BGL.exists():
        return BGL
    began = datetime(2005, 6, 3, 22, 42, 50, tzinfo=UTC)
    times = [began + timedelta(milliseconds=97 * i) for i in range(2000)]
    (folder / "machine.log").write_text(
        "\n".join(
            f"- {when.timestamp():.0f} {when:%Y.%m.%d} R02-M1-N0-C:J12-U11 {when:%Y-%m-%d-%H.%M.%S.%f} "
            f"R02-M1-N0-C:J12-U11 RAS KERNEL INFO instruction cache parity error {i} corrected"
            for i, when in enumerate(times)
        )
    )
    return folder / "machine.log"


def test_a_file_of_a_machine_is_scored_line_by_line(tmp_path: Path, empty_server: str) -> None:
    file = machine_log(tmp_path)
    whole = file.read_text().count("\n")  # its last line has no end, so the shipper waits for the rest of it
    config = documented().replace('"log.time", "log.rest"', '"log.mark", "log.epoch", "log.date", "log.node", "log.time", "log.rest"')
    config = config.replace("%Y-%m-%dT%H:%M:%S.%f%z", "%Y-%m-%d-%H.%M.%S.%f")
    (tmp_path / "service").mkdir()
    with (
        Service(tmp_path / "service" / "data", model=build_tiny_log(tmp_path), REDIS_URL=empty_server) as service,
        SyslogNg(tmp_path / "syslog-ng", config, file, service.url) as shipper,
    ):
        world = World(tmp_path, service, shipper, file)
        world.until(lambda: world.whole() == whole)
        counted = local.get(f"{service.url}/metrics").text
    assert f'onset_events_total{{door="loki",outcome="scored"}} {whole}.0' in counted
    assert 'onset_events_total{door="loki",outcome="late"} 0.0' in counted
