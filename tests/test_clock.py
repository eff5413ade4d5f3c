"""The store's clock as a replica reads it: whatever its own shows, however long an answer takes, and when it steps."""

from __future__ import annotations

import math
import time

import pytest
from structlog.testing import capture_logs

from service.stores.clock import STEP_SECONDS, StoreClock
from tests.times import Clock

STORE = 1.8e9


class World:
    """A store whose clock is `ahead` of the uptime, and who reads it."""

    def __init__(self) -> None:
        self.uptime, self.ahead = Clock(5000.0), STORE
        self.clock = StoreClock(self.uptime)
        self.steps = 0
        self.clock.when_stepped(self._step)

    def ask(self, there: float = 0.0, back: float = 0.0) -> None:
        """Ping the store, to which it takes `there` seconds, and `back` seconds from it."""
        asked = self.uptime.now
        self.uptime.now += there
        said = self.uptime.now + self.ahead
        self.uptime.now += back
        self.clock.read(said, asked)

    @property
    def off(self) -> float:
        return self.clock() - (self.uptime.now + self.ahead)

    def _step(self) -> None:
        self.steps += 1
        assert abs(self.off) < 1, "it is seen as it is by then"


def test_before_it_was_read_it_is_this_machines_and_nobody_can_say_how_far_both_are_apart() -> None:
    world = World()
    assert math.isnan(world.clock.ahead)
    world.ask()
    assert world.clock() == world.uptime.now + STORE
    assert world.clock.ahead == pytest.approx(world.clock() - time.time(), abs=60)
    assert world.steps == 0, "to be read first is no step"


@pytest.mark.parametrize(("there", "back"), [(0.9, 0.0), (0.0, 0.9), (0.4, 0.5)])
def test_a_slow_answer_is_off_by_half_of_what_it_took_and_a_quick_one_puts_that_right(there: float, back: float) -> None:
    world = World()
    world.ask(there, back)
    assert abs(world.off) <= (there + back) / 2 + 1e-6
    world.ask(0.001, 0.001)
    assert abs(world.off) <= 0.002
    world.ask(there, back)
    assert abs(world.off) <= 0.002, "a slow one makes it no worse"
    assert world.steps == 0


def test_it_follows_a_clock_that_is_a_little_faster_without_a_step() -> None:
    world = World()
    for _ in range(3600):
        world.uptime.now += 1
        world.ahead += 5e-4
        world.ask(0.001, 0.001)
        assert abs(world.off) < 0.003
    assert world.steps == 0


@pytest.mark.parametrize("seconds", [3600.0, -3600.0, 1.0, -1.0])
def test_a_step_is_followed_at_once_told_once_and_logged(seconds: float) -> None:
    world = World()
    world.ask(0.001, 0.001)
    world.ahead += seconds
    with capture_logs() as logs:
        world.ask(0.05, 0.05)
        world.ask(0.05, 0.05)
    assert abs(world.off) <= 0.1
    assert world.steps == 1
    [line] = logs
    assert line["event"] == "store_clock_stepped"
    assert line["seconds"] == pytest.approx(seconds, abs=0.2)


def test_less_than_a_step_is_only_followed() -> None:
    world = World()
    world.ask()
    world.ahead += 0.9 * STEP_SECONDS
    world.ask()
    assert world.off == pytest.approx(0, abs=1e-6)
    assert world.steps == 0
