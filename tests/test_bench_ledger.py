"""The ledger of `bench.chaos` finds what it is there to find: each kind of wrong answer is a violation, and a right one is none."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from bench.ledger import Ledger, Reference, Sent
from service.detector import Detector
from service.events import Event, Result

SENT = [Sent(i, Event(stream_id="s", values={"value": float(i % 7)}, timestamp=1e9 + i, event_id=f"s-{i}")) for i in range(20)]


@pytest.fixture
async def served(tiny_detector: Detector) -> AsyncIterator[Reference]:
    """A run of its own, in the place of the service."""
    reference = Reference(tiny_detector)
    reference.start()
    yield reference
    await reference.stop()


@pytest.fixture
async def ledger(tiny_detector: Detector) -> AsyncIterator[Ledger]:
    reference = Reference(tiny_detector)
    reference.start()
    yield Ledger({tiny_detector.manifest.version: reference})
    await reference.stop()


async def answers(served: Reference, first: int = 0, last: int = len(SENT)) -> list[tuple[Sent, Result]]:
    return list(zip(SENT[first:last], await served.step([sent.event for sent in SENT[first:last]]), strict=True))


def now() -> float:
    return time.monotonic()


async def test_right_answers_and_the_same_ones_as_duplicates_are_no_violation(served: Reference, ledger: Ledger) -> None:
    right = await answers(served)
    await ledger.enter(right, now())
    await ledger.enter([(sent, replace(result, duplicate=True)) for sent, result in right], now())
    assert not ledger.violations
    assert (ledger.counts["step"], ledger.counts["duplicate_with_result"]) == (20, 20)


async def test_a_score_that_differs_in_its_last_bit_is_a_violation(served: Reference, ledger: Ledger) -> None:
    right = await answers(served)
    sent, result = right[-1]
    assert result.p_value is not None
    await ledger.enter([*right[:-1], (sent, replace(result, p_value=math.nextafter(result.p_value, 1)))], now())
    assert ["p_value" in violation.what for violation in ledger.violations] == [True]


@pytest.mark.parametrize("other", [{"timestamp": 1e9}, {"event_id": "s-1"}, {"stream_id": "t"}])
async def test_an_answer_to_another_event_is_a_violation(served: Reference, ledger: Ledger, other: dict[str, Any]) -> None:
    right = await answers(served)
    sent, result = right[-1]
    await ledger.enter([*right[:-1], (sent, replace(result, **other))], now())
    assert ["answered with stream" in violation.what for violation in ledger.violations] == [True]


async def test_an_event_that_was_lost_is_a_violation_at_the_next_one(served: Reference, ledger: Ledger) -> None:
    right = await answers(served)
    await ledger.enter([*right[:10], *right[11:]], now())
    assert "as version 12 of a stream at version 10" in ledger.violations[0].what


async def test_an_event_that_is_stepped_twice_is_a_violation(served: Reference, ledger: Ledger) -> None:
    right = await answers(served, last=5)
    await ledger.enter(right, now())
    await ledger.enter([(SENT[4], replace(right[4][1], state_version=6))], now())
    assert "stepped again" in ledger.violations[0].what


async def test_a_fresh_start_without_damage_is_a_violation_and_one_after_it_is_not(served: Reference, ledger: Ledger) -> None:
    await ledger.enter(await answers(served, last=5), now())
    await served.forget("s")
    ledger.damage("s", fatal=True, applied=False)
    ledger.damage("s", fatal=True, applied=True)
    await ledger.enter(await answers(served, 5, 8), now())
    assert not ledger.violations
    await served.forget("s")
    await ledger.enter(await answers(served, 8, 9), now())
    assert "stepped as version 1 of a stream at version 3" in ledger.violations[0].what


async def test_a_stream_that_lives_on_after_its_deletion_is_a_violation(served: Reference, ledger: Ledger) -> None:
    await ledger.enter(await answers(served, last=5), now())
    ledger.damage("s", fatal=True, applied=False)
    ledger.damage("s", fatal=True, applied=True)
    await ledger.enter(await answers(served, 5, 6), now())
    assert "lived on" in ledger.violations[0].what


async def test_a_life_that_nobody_saw_is_not_missed(served: Reference, ledger: Ledger) -> None:
    ledger.damage("s", fatal=True, applied=False)
    ledger.damage("s", fatal=True, applied=True)
    await ledger.enter(await answers(served, last=5), now())
    assert not ledger.violations
