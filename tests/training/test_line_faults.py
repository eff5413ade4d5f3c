"""Injected faults change a session by one line, and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.training.logs import TEMPLATES, normal, session
from training.line_faults import FAULTS, LONGEST, with_fault
from training.sessions import Session

TRIES = range(30)


def some() -> list[Session]:
    rng = np.random.default_rng(3)
    return [session(normal(rng), rng, f"s{i}") for i in TRIES]


def faulty(kind: str, sessions: list[Session]) -> list[tuple[Session, Session]]:
    rng = np.random.default_rng(4)
    made = [(one, with_fault(kind, rng, one, len(TEMPLATES))) for one in sessions]
    return [(before, after) for before, after in made if after is not None]


@pytest.mark.parametrize(("kind", "more"), [("missing", -1), ("doubled", 1), ("inserted", 1), ("replaced", 0), ("moved", 0)])
def test_a_fault_is_one_line_more_or_less_or_another_one(kind: str, more: int) -> None:
    pairs = faulty(kind, some())
    assert len(pairs) > len(TRIES) / 2
    for before, after in pairs:
        assert len(after) == len(before) + more
        assert after.codes.tolist() != before.codes.tolist()
        assert len(after.gaps) == len(after.numbers) == len(after)
        changed = (Counter(after.codes.tolist()) - Counter(before.codes.tolist())).total()
        assert changed == {"missing": 0, "doubled": 1, "inserted": 1, "replaced": 1, "moved": 0}[kind]
        assert after.ended


def test_a_session_that_is_cut_short_is_the_beginning_of_itself() -> None:
    for before, after in faulty("cut short", some()):
        assert 0 < len(after) < len(before)
        assert after.codes.tolist() == before.codes[: len(after)].tolist()
        assert np.array_equal(after.gaps, before.gaps[: len(after)], equal_nan=True)


def test_a_session_that_never_ends_is_not_cut_short_but_to_what_is_looked_at() -> None:
    endless = [replace(one, ended=False) for one in some()]
    assert faulty("cut short", endless) == []
    rng = np.random.default_rng(0)
    long = session([1, 2] * LONGEST, rng, ended=False)
    [(_, after)] = faulty("doubled", [long])
    assert len(after) == LONGEST + 1
    [(_, after)] = faulty("doubled", [replace(long, ended=True)])
    assert len(after) == LONGEST + 1
    assert not after.ended


def test_behind_a_missing_line_the_gap_is_that_of_both() -> None:
    for before, after in faulty("missing", some()):
        [lost] = [i for i in range(len(before)) if np.array_equal(np.delete(before.codes, i), after.codes)][:1]
        if before.codes.tolist().count(before.codes[lost]) == 1 and 0 < lost < len(before) - 1:
            assert after.gaps[lost] == pytest.approx(before.gaps[lost] + before.gaps[lost + 1], rel=1e-4)


def test_no_gap_is_made_up_around_a_line_that_was_moved() -> None:
    for before, after in faulty("moved", some()):
        longest = max(before.gaps[1:-1] + before.gaps[2:])  # behind the place that it left
        assert np.nanmax(after.gaps[1:]) <= longest * (1 + 1e-4)


def test_a_line_out_of_place_has_no_gap_and_one_that_does_not_belong_no_number() -> None:
    for before, after in faulty("inserted", some()):
        assert np.isnan(after.gaps).sum() >= 2
        assert np.isfinite(after.numbers).sum() == np.isfinite(before.numbers).sum()


@pytest.mark.parametrize("kind", FAULTS)
def test_too_short_sessions_get_no_fault(kind: str) -> None:
    assert faulty(kind, [session([1, 2], np.random.default_rng(0))]) == []
