"""Periodic lines that do not come, in streams that never end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.training.logs import QUICK, TEMPLATES, TINY
from training.data import Float32, Float64
from training.layout import Parts
from training.logfit import _pieces, fit, hold_out
from training.logs import LIKELY, OVERDUE, LogStep
from training.rhythm import LATE, MISSING, Clocks, Rhythm, overdue_of, rhythm_of
from training.sessions import Ints, Session, Sessions

DAY = 86400.0
TRAFFIC, REPLY, HEARTBEAT, HOURLY, SELDOM = 1, 2, 3, 4, 5


def host(days: float, *, seed: int = 0, name: str = "host", every: float = 240.0) -> Session:
    """A request and its reply every four minutes at random, one line every ten minutes and one every hour by the clock, another seldom."""
    rng = np.random.default_rng(seed)
    end = DAY * days
    asked = np.sort(rng.uniform(0, end, rng.poisson(end / every)))
    by_the_clock = [
        (t + rng.uniform(0, 2), code) for code, period in ((HEARTBEAT, 600.0), (HOURLY, 3600.0)) for t in np.arange(30, end, period)
    ]
    seldom = rng.uniform(0, end, int(3 * days))
    return session(
        sorted([(t, TRAFFIC) for t in asked] + [(t + 0.4, REPLY) for t in asked] + by_the_clock + [(t, SELDOM) for t in seldom]), name
    )


def session(said: list[tuple[float, int]], name: str = "host") -> Session:
    times, codes = np.array([t for t, _ in said]), np.array([code for _, code in said], np.int64)
    gaps = np.diff(times, prepend=np.nan).astype(np.float32)
    return Session(name, codes, gaps, np.full((len(said), 4), np.nan, np.float32), ended=False)


def said(one: Session) -> list[tuple[float, int]]:
    return list(zip(np.cumsum(np.nan_to_num(one.gaps.astype(np.float64))).tolist(), one.codes.tolist(), strict=True))


def heard(clocks: Clocks, codes: Ints, gaps: Float32, *, learns: bool = True) -> tuple[Float64, Parts]:
    """What the graph makes of the lines of a stream: nats of what is overdue [T], and its parts."""
    parts, nats = {slot.name: torch.zeros(1, slot.size) for slot in clocks.slots}, []
    for code, gap in zip(torch.from_numpy(codes), torch.from_numpy(gaps), strict=True):
        due, then = clocks.overdue(gap[None, None], parts)
        parts = clocks.after(then, due, code[None], torch.full((1, 1), learns))
        nats.append(float(due.amax()))
    return np.array(nats), parts


@pytest.fixture(scope="module")
def rhythm() -> Rhythm:
    return rhythm_of([host(6)])


@pytest.fixture(scope="module")
def step() -> LogStep:
    return fit(Sessions([host(6), host(6, seed=1, name="other")], TEMPLATES, "0" * 64), TINY, QUICK).step.eval()


@torch.no_grad()
def run(step: LogStep, one: Session, learn: float = 1.0, state: Tensor | None = None) -> tuple[dict[str, Float32], Tensor]:
    state, answers = torch.zeros(1, step.state_size) if state is None else state, []
    for code, gap in zip(one.codes, one.gaps, strict=True):
        x = torch.tensor([[float(code), float(gap)]])
        state, *answer = step(state, x, torch.ones(1, 3), torch.full((1,), learn), torch.full((1,), 1e-3))
        answers.append([part[0].numpy() for part in answer])
    return {name: np.stack(column) for name, column in zip(step.outputs[1:], zip(*answers, strict=True), strict=True)}, state


def test_what_comes_by_the_clock_has_a_clock_and_nothing_else_has(rhythm: Rhythm) -> None:
    assert rhythm.codes.tolist() == [HEARTBEAT, HOURLY]
    np.testing.assert_allclose(rhythm.longest, [600, 3600], atol=3)
    nothing = rhythm_of([replace(host(2), gaps=np.full(len(host(2)), np.nan, np.float32))])
    assert nothing.codes.tolist() == [-1]


def test_where_days_were_left_out_no_interval_leads_over_them() -> None:
    whole = host(6)
    pieces = [whole.cut(i, i + 200) for i in range(0, len(whole), 200)]
    np.testing.assert_array_equal(rhythm_of(pieces).longest, rhythm_of([whole]).longest)
    np.testing.assert_allclose(rhythm_of(pieces[:5] + pieces[9:]).longest, rhythm_of([whole]).longest, atol=3)


def test_training_sees_what_the_graph_sees(rhythm: Rhythm) -> None:
    lines = [line for line in said(host(2.2, seed=3)) if line[1] != HEARTBEAT or not 40_000 < line[0] < 60_000]
    one = session([line for line in lines if not 150_000 < line[0] < 160_000])
    one.gaps[100] = np.nan
    overdue, _ = heard(Clocks(rhythm), one.codes, one.gaps)
    assert (overdue != overdue_of(rhythm, one.codes, one.gaps)).mean() < 2e-3  # float32 may be a second ahead
    assert overdue.max() == MISSING


def test_a_periodic_line_that_does_not_come_is_found_at_the_next_line_and_named(step: LogStep) -> None:
    """A backup whose "done" no longer came, and a heartbeat that stopped, had opened no alert: no line says it."""
    usual = said(host(1.5, seed=5))
    usual_p = run(step, session(usual))[0]["onset_p"]
    assert (usual_p < 1e-4).sum() <= 1
    missing = session([line for line in usual if line[1] != HOURLY or line[0] < 90_000])
    answers, state = run(step, missing)
    times = np.array([t for t, _ in said(missing)])
    told = np.flatnonzero((answers["onset_p"] < 1e-3) & (times > 90_000))
    late = np.array([t for t, code in usual if code == HOURLY and t < 90_000]).max() + 3600
    assert late < times[told[0]] < late + 3600
    assert answers["likely"][told[0], 0] == HOURLY
    assert answers["likely"][told[0], LIKELY] > 0.9
    assert answers["contribution"][told[0]].argmax() == 0
    assert (answers["likely"][-1, 0] == HOURLY) == (step.layout.split(state)["clocks"].min().item() > 0)


def test_what_is_overdue_stays_so_while_an_alert_is_open_and_is_given_up_where_it_is_accepted(rhythm: Rhythm) -> None:
    lines = [line for line in said(host(2, seed=6)) if line[1] != HOURLY or line[0] < 90_000]
    one = session(lines)
    frozen, parts = heard(Clocks(rhythm), one.codes, one.gaps, learns=False)
    assert frozen[-1] == MISSING
    accepted, after = heard(Clocks(rhythm), one.codes, one.gaps)
    assert accepted.max() == MISSING
    assert accepted[-1] == 0
    assert (parts["clocks"] > 0).all()
    assert (after["clocks"] > 0).tolist() == [[True, False]]
    again = session([*lines, (lines[-1][0] + 10, HOURLY), (lines[-1][0] + 600, HEARTBEAT), (lines[-1][0] + 6000, HEARTBEAT)])
    clocks = Clocks(replace(rhythm, silence=1e6))
    assert heard(clocks, again.codes, again.gaps)[0][-1] > 0, "it is waited for again once it comes"


def test_after_a_silence_of_the_whole_stream_nothing_is_overdue(rhythm: Rhythm) -> None:
    lines = [line for line in said(host(1, seed=7)) if not 30_000 < line[0] < 50_000]
    one = session(lines)
    assert overdue_of(rhythm, one.codes, one.gaps).max() == 0


def test_a_thousand_lines_a_second_do_not_stop_a_clock(rhythm: Rhythm) -> None:
    clocks = Clocks(rhythm)
    parts = {"clocks": torch.full((1, 2), 80_000.0), "second": torch.zeros(1, 1)}
    for _ in range(2500):
        due, then = clocks.overdue(torch.full((1, 1), 1e-3), parts)
        parts = clocks.after(then, due, torch.tensor([TRAFFIC]), torch.zeros(1, 1, dtype=torch.bool))
    assert parts["clocks"].tolist() == [[80_002.0, 80_002.0]]


def test_each_fold_is_judged_by_the_clocks_of_the_others_and_by_all_that_came_before_it() -> None:
    data = Sessions([host(5)], TEMPLATES, "0" * 64)
    gone = np.flatnonzero(data.sessions[0].codes == HOURLY)[60]  # once: in the fold that has it nobody knew of it
    one = session([line for i, line in enumerate(said(data.sessions[0])) if i != gone])
    held = hold_out(_pieces([one]), replace(data, sessions=[one]), TINY, replace(QUICK, steps=1), 0, lambda _: None)
    overdue = np.concatenate([nats[:, OVERDUE] for nats in held.nats])
    assert set(overdue[overdue > 0]) == {LATE, MISSING}
    assert overdue_of(rhythm_of([one]), one.codes, one.gaps).max() == 0
    assert len(held.nats[0]) < np.flatnonzero(overdue)[0], "what came before the piece is known"
