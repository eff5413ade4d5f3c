"""The tail: its constants against plain NumPy, and what its probabilities promise."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.calibrate import (
    PRIOR,
    PRIOR_START,
    SENSORS,
    Observed,
    Rules,
    Watched,
    _band,
    calibrate,
    evidence_of,
    heights_of,
    on_curve,
    onsets_of,
)
from training.data import Float64
from training.detector import DetectorStep
from training.signals import MemorySignals
from training.tail import HOLD, LEVELS, LOG10, Band, Calibration, Curve, Onsets, Tail

ALPHA = torch.tensor([1e-3])  # asked of every stream: expand(B)
K = len(MemorySignals.names)
CHAINS = K + 1
SUM = K  # the chain of the sum comes after the signals'
EXPOSED = CHAINS * (LEVELS + 1)  # row of `counts` with the events of an old stream
STRENGTHS = slice(EXPOSED + 2, None)


def onsets(chain: int) -> int:
    """Row of `counts` with the onsets of a chain."""
    return chain * LEVELS


def test_the_graphs_evidence_and_onsets_equal_the_calibrations(observed: Observed, univariate: DetectorStep) -> None:
    tail, calibration = univariate.tail, univariate.calibration
    T, B, _ = observed.strengths.shape
    parts = {slot.name: torch.zeros(slot.size, B) for slot in tail.slots}
    onset_p, emitted = np.ones((T, B)), np.zeros((T, B))
    with torch.no_grad():
        for i in range(T):
            valid = torch.from_numpy(observed.valid[i])[None]
            age = torch.from_numpy(observed.age[i])[None]
            answer, parts = tail(torch.from_numpy(observed.strengths[i]).t(), valid, age, ALPHA.expand(B), parts)
            onset_p[i] = answer.onset_p.numpy()
            emitted[i] = np.where(parts["onset_hold"][SUM].numpy() == HOLD, parts["onset_height"][SUM].numpy(), 0.0)
    heights = heights_of(evidence_of(observed, calibration, tail.burn), observed, calibration, tail.burn)
    heights = onsets_of(heights, observed)
    assert (heights > 0).sum() > 10
    np.testing.assert_allclose(emitted, heights, atol=0.03)
    assert ((onset_p < 1) <= (heights > 0)).all()
    assert (onset_p < 1).sum() > 0.9 * (heights > 0).sum()
    # A stream's first onset is judged by the pooled rate, shrunk by its exposure, and its age.
    for b in range(B):
        found = np.flatnonzero(heights[:, b] > 0)
        if len(found) and observed.age[found[0], b] < 200:
            growth, begun = (1 + calibration.onsets.tau / (age + 1) for age in (observed.age[found[0], b], tail.burn + HOLD))
            start = calibration.start * np.log10(max(growth / begun, 1.0))
            pooled = -on_curve(calibration.onsets.tail, heights[found[0], b]) + np.log10(growth) + start
            assert abs(np.log10(onset_p[found[0], b]) - min(pooled, 0)) < 0.6


def test_onsets_come_about_as_often_as_asked_in_the_streams_they_were_calibrated_on(observed: Observed, univariate: DetectorStep) -> None:
    tail = univariate.tail
    parts = {slot.name: torch.zeros(slot.size, observed.strengths.shape[1]) for slot in tail.slots}
    asked, found, events = 1e-3, 0, 0
    with torch.no_grad():
        for strengths, valid, age in zip(observed.strengths, observed.valid, observed.age, strict=True):
            judge = torch.from_numpy(valid)[None]
            answer, parts = tail(torch.from_numpy(strengths).t(), judge, torch.from_numpy(age)[None], ALPHA.expand(len(age)), parts)
            settled = valid & (age >= 600)
            found, events = found + int((answer.onset_p.numpy()[settled] < asked).sum()), events + int(settled.sum())
    assert 0.2 < found / events / asked < 4


def test_how_much_faster_onsets_get_rarer_at_the_start_is_found_from_their_ages() -> None:
    burn, start, onsets = 100, 2.0, Onsets(Curve((0.0, 1.0), (3.0, 4.0), 1.0), tau=1000.0, shape=10.0, weight=10.0)
    ages = np.arange(600.0)[:, None].repeat(400, axis=1)
    growth, begun = 1 + onsets.tau / (ages + 1), 1 + onsets.tau / (burn + HOLD + 1)
    chance = 1e-3 * growth * np.maximum(growth / begun, 1.0) ** start
    emitted = np.random.default_rng(3).random(ages.shape) < chance
    heights = np.where(emitted, 1 + ages, 0.0)  # each higher than the last, so each is an onset
    watched = Observed(np.zeros((600, 400, 1), np.float32), np.zeros((600, 400, 1), np.float32), ages >= 0, ages.astype(np.float32))
    fitted = {streams: Watched(watched, burn, streams, SENSORS).start(heights, onsets) for streams in (400, 4)}
    assert fitted[400] == pytest.approx(start, rel=0.1)
    assert fitted[4] == pytest.approx((PRIOR_START * fitted[400]) ** 0.5)
    assert Watched(watched, burn, 400, Rules(ageing=False)).start(heights, onsets) == 0


def test_onsets_are_judged_more_mildly_where_a_stream_begins_and_events_are_not(observed: Observed, univariate: DetectorStep) -> None:
    calibration = replace(univariate.calibration, start=2.0)
    tail = Tail(K, univariate.tail.burn, calibration)
    held = tail.burn + HOLD
    ages = torch.tensor([[float(tail.burn), held, held + 1]])
    growth = (1 + calibration.onsets.tau / (ages[0] + 1)).numpy()
    strength, judge = torch.full((K, 3), 30.0), torch.ones(1, 3, dtype=torch.bool)
    parts = {slot.name: torch.zeros(slot.size, 3) for slot in tail.slots}
    with_start, _ = tail(strength, judge, ages, ALPHA.expand(3), parts)
    without, _ = Tail(K, tail.burn, replace(calibration, start=0.0))(strength, judge, ages, ALPHA.expand(3), parts)
    milder = torch.log(with_start.onset_p / without.onset_p).numpy()
    np.testing.assert_allclose(milder, [2 * np.log(growth[0] / growth[1]), 0, 0], atol=1e-4)
    assert torch.equal(with_start.p_value, without.p_value)


def test_a_larger_strength_never_has_a_larger_p_value(univariate: DetectorStep) -> None:
    tail = univariate.tail
    strength = torch.cat([torch.zeros(1), torch.logspace(-4, 2, 200)]).expand(K, -1)
    rows = strength.shape[1]
    parts = {slot.name: torch.zeros(slot.size, rows) for slot in tail.slots}
    answer, _ = tail(strength, torch.ones(1, rows, dtype=torch.bool), torch.full((1, rows), 500.0), ALPHA.expand(rows), parts)
    p_value, onset_p = answer.p_value, answer.onset_p
    assert p_value[0] == onset_p[0] == 1
    assert (torch.diff(p_value) <= 1e-7).all()
    assert (torch.diff(onset_p) <= 1e-7).all()
    assert p_value[-1] < 1e-3
    assert onset_p[-1] < 1e-3


def test_a_young_stream_is_judged_more_mildly(univariate: DetectorStep) -> None:
    tail = univariate.tail
    strength, ones = torch.full((K, 2), 5.0), torch.ones(1, 2, dtype=torch.bool)
    parts = {slot.name: torch.zeros(slot.size, 2) for slot in tail.slots}
    answer, _ = tail(strength, ones, torch.tensor([[150.0, 20000.0]]), ALPHA.expand(2), parts)
    p_value, onset_p = answer.p_value, answer.onset_p
    assert p_value[0] > p_value[1]
    assert onset_p[0] > onset_p[1]


def test_only_the_first_of_equal_errors_is_an_onset(univariate: DetectorStep) -> None:
    tail = univariate.tail
    ones = torch.ones(1, 1, dtype=torch.bool)
    parts = {slot.name: torch.zeros(slot.size, 1) for slot in tail.slots}
    told = []
    for _ in range(130):
        answer, parts = tail(torch.full((K, 1), 3.0), ones, torch.full((1, 1), 500.0), ALPHA.expand(1), parts)
        parts["counts"][STRENGTHS] = 0
        told.append(float(answer.onset_p) < 1)
    assert told[0]
    assert not any(told[1:126])
    assert told[126]


def test_a_stream_with_many_onsets_gets_milder_p_values(univariate: DetectorStep) -> None:
    tail = univariate.tail
    ones, age = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 5000.0)
    parts = {slot.name: torch.zeros(slot.size, 2) for slot in tail.slots}
    parts["counts"][EXPOSED] += 3000.0
    parts["counts"][onsets(SUM), 1] += 60.0
    answer, _ = tail(torch.full((K, 2), 3.0), ones, age, ALPHA.expand(2), parts)
    assert answer.onset_p[1] > 3 * answer.onset_p[0]
    assert abs(LOG10 - np.log(10)) < 1e-12


def test_what_could_be_rounding_is_an_onset_of_nothing(univariate: DetectorStep) -> None:
    tail = univariate.tail
    parts = {slot.name: torch.zeros(slot.size, 1) for slot in tail.slots}
    ones, age = torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), 5000.0)
    tiny = 1e-4 * torch.tensor(tail.calibration.quantile).unsqueeze(1)
    answer, after = tail(tiny, ones, age, ALPHA.expand(1), parts)
    assert answer.p_value == answer.onset_p == 1
    assert (after["onset_hold"] == 0).all()
    _, after = tail(1e4 * tiny, ones, age, ALPHA.expand(1), parts)
    assert (after["onset_hold"][:K] == HOLD).all()


def test_a_signal_that_is_often_new_in_a_stream_counts_for_less_there_and_the_others_as_before(univariate: DetectorStep) -> None:
    tail = univariate.tail
    ones, age = torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), 5000.0)
    parts = {slot.name: torch.zeros(slot.size, 3) for slot in tail.slots}
    parts["counts"][EXPOSED] += 3000.0
    parts["counts"][onsets(0), 1:] += 200.0  # the value of the second and the third stream
    strengths = torch.zeros(K, 3)
    strengths[0, :2] = strengths[1, 2] = 3.0  # the third's level is new this time
    _, after = tail(strengths, ones, age, ALPHA.expand(3), parts)
    usual, often, other = after["onset_height"][SUM].tolist()
    assert often < usual - 0.5
    strengths[0], strengths[1] = 0.0, 3.0
    _, after = tail(strengths, ones, age, ALPHA.expand(3), parts)
    assert after["onset_height"][SUM].tolist() == pytest.approx([other] * 3, abs=1e-4)


def test_the_audit_follows_the_realised_rate_up_to_a_decade(univariate: DetectorStep) -> None:
    tail = univariate.tail
    ones, age = torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2), 5000.0)
    parts = {slot.name: torch.zeros(slot.size, 2) for slot in tail.slots}
    parts["audit"] -= torch.tensor([[0.0, 0.5]])
    strengths, audits = torch.tensor([[0.0, 9.0]]).expand(K, 2), []
    for _ in range(60):
        # Every event of the second stream is an onset rarer than alpha; the first is never surprised.
        parts["counts"][STRENGTHS] = 0
        answer, parts = tail(strengths, ones, age, ALPHA.expand(2), {**parts, "onset_hold": torch.zeros(CHAINS, 2)})
        audits.append(parts["audit"][0].tolist())
    assert answer.onset_p[1] < 1
    assert audits[-1][0] == pytest.approx(-60 * tail.audit_step * 1e-3, rel=1e-3)
    assert audits[-1][1] == 0  # an alert gives back what quiet has earned and no more: it never makes the next one harder
    parts["audit"] = torch.full((1, 2), -tail.audit_limit)
    _, parts = tail(torch.zeros(K, 2), ones, age, ALPHA.expand(2), parts)
    assert (parts["audit"] == -tail.audit_limit).all()


def test_few_streams_are_drawn_to_the_generators_constants_and_say_so(observed: Observed) -> None:
    few, many = calibrate(observed, 100, streams=1), calibrate(observed, 100, streams=64)
    assert few.support is not None
    assert many.support is not None
    assert (few.support.enough, many.support.enough) == (False, True)
    for name, prior in PRIOR.items():
        for own, drawn in zip(many.signals, few.signals, strict=True):
            assert abs(np.log(getattr(drawn, name) / prior)) < abs(np.log(getattr(own, name) / prior)) + 1e-9
        # Its heights are of other signals than many's, whose tau is a quarter of the prior's.
        assert abs(np.log(getattr(few.onsets, name) / prior)) < np.log(3)
    assert abs(np.log(few.start / PRIOR_START)) < abs(np.log(many.start / PRIOR_START)) + 1e-9
    assert few.as_dict()["support"]["streams"] == 1


def test_an_edge_of_what_was_seen_is_not_taken_for_the_edge_of_what_there_is() -> None:
    """A slow cycle is new to each stream at its start; what old ones show ends sharply below that, and so started with p < 1e-12."""
    rng = np.random.default_rng(5)
    seen = rng.uniform(0.9, 1.0, size=(3000, 4, 2)).astype(np.float32)
    seen[100:140] *= 1.3
    ages = np.repeat(np.arange(3000, dtype=np.float32)[:, None], 4, axis=1)
    observed = Observed(seen, np.zeros((3000, 4, 1), np.float32), ages >= 0, ages)
    smallest = {}
    for steepest in (SENSORS.steepest, np.inf):
        calibration = calibrate(observed, 100, rules=replace(SENSORS, steepest=steepest))
        assert all(signal.tail.slope <= steepest for signal in calibration.signals)
        tail = Tail(2, 100, calibration)
        parts, p = {slot.name: torch.zeros(slot.size, 4) for slot in tail.slots}, []
        with torch.no_grad():
            for strengths, age in zip(seen[:140], ages[:140], strict=True):
                judge = torch.from_numpy(age >= 100)[None]
                answer, parts = tail(torch.from_numpy(strengths).t() * judge, judge, torch.from_numpy(age)[None], ALPHA.expand(4), parts)
                p.append(answer.onset_p.numpy())
        smallest[steepest] = float(np.nanmin(p))
    assert smallest[np.inf] < 1e-12
    assert smallest[SENSORS.steepest] > 1e-6


@pytest.mark.parametrize("rows", [3000, 300])
def test_how_much_streams_differ_is_not_learned_from_eight_of_them_nor_from_few_onsets(rows: int) -> None:
    """Eight that happen to be alike do not say that the next one will be, or that one of them does not change."""
    rng = np.random.default_rng(11)
    alike = rng.exponential(size=(rows, 48, 2)).astype(np.float32)
    ages = np.repeat(np.arange(rows, dtype=np.float32)[:, None], 48, axis=1)
    many = Observed(alike, np.zeros((rows, 48, 1), np.float32), ages >= 0, ages)
    eight = Observed(alike[:, :8], np.zeros((rows, 8, 1), np.float32), ages[:, :8] >= 0, ages[:, :8])
    usual = PRIOR["shape"]
    for onsets in (*calibrate(eight, 100).signals, calibrate(eight, 100).onsets):
        assert usual / 3 < onsets.shape < usual * 3
    if rows == 3000:
        assert all(onsets.shape > usual * 5 for onsets in calibrate(many, 100).signals)


def test_who_asks_for_more_false_alarms_never_gets_fewer(observed: Observed, univariate: DetectorStep) -> None:
    tail, counts = univariate.tail, []
    for asked in (1e-4, 1e-3, 1e-2, 1e-1):
        parts = {slot.name: torch.zeros(slot.size, observed.strengths.shape[1]) for slot in tail.slots}
        found = 0
        for strengths, valid, age in zip(observed.strengths, observed.valid, observed.age, strict=True):
            events = (torch.from_numpy(strengths).t(), torch.from_numpy(valid)[None], torch.from_numpy(age)[None])
            answer, parts = tail(*events, torch.full((len(age),), asked), parts)
            found += int((answer.onset_p < asked).sum())
        counts.append(found)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_the_band_of_a_wide_fleet_is_found_without_copies_of_all_its_rows() -> None:
    """Of 64 machines of 300 columns they were three copies of 1.5 GB, at the height of a fit that had trained for hours."""
    ratio = np.abs(np.random.default_rng(0).standard_normal((4000, 8, 40), dtype=np.float32))
    age = np.repeat(np.arange(4000, dtype=np.float32)[:, None], 8, axis=1)
    observed = Observed(np.zeros((4000, 8, 3), np.float32), ratio, np.ones(age.shape, np.bool_), age)
    tracemalloc.start()
    try:
        _band(observed)
        assert tracemalloc.get_traced_memory()[1] < ratio.nbytes
    finally:
        tracemalloc.stop()


def test_the_band_of_an_event_is_of_what_came_before_it() -> None:
    """Else what is far off would lie within it."""
    spread, after = Band(1)(torch.tensor([[9.0]]), torch.tensor([[50.0]]), {"spread": torch.tensor([[4.0]])})
    assert spread.item() == 2
    assert after["spread"].item() > 4


def test_a_stream_that_stood_still_at_first_gets_a_band_once_it_moves() -> None:
    band = Band(1)
    parts = {slot.name: torch.zeros(slot.size, 1) for slot in band.slots}
    residuals = [0.0] * 100 + np.random.default_rng(0).normal(size=300).tolist()
    for seen, residual in enumerate(residuals):
        spread, parts = band(torch.tensor([[residual]]), torch.tensor([[float(seen)]]), parts)
    assert 0.5 < float(spread) < 1.5


@pytest.mark.parametrize(("first", "events"), [(1, 100), (20, 800)])
def test_a_sensor_that_is_switched_on_widens_its_band_for_some_hundred_events_alone(first: int, events: int) -> None:
    band = Band(1)
    parts = {slot.name: torch.zeros(slot.size, 1) for slot in band.slots}
    residuals = [200.0] * first + np.random.default_rng(0).normal(size=events).tolist()
    for seen, residual in enumerate(residuals, 1):
        spread, parts = band(torch.tensor([[residual]]), torch.tensor([[float(seen)]]), parts)
    assert 0.5 < float(spread) < 1.5


def test_a_signal_of_half_the_weight_counts_half_of_its_decades_above_the_floor(univariate: DetectorStep) -> None:
    calibration, burn = univariate.tail.calibration, univariate.tail.burn
    rng = np.random.default_rng(0)
    strengths = np.exp(rng.normal(2.0, 3.0, (1, 40, K))).astype(np.float32)
    observed = Observed(strengths, strengths, np.ones((1, 40), bool), np.full((1, 40), 500.0, np.float32))
    alone = []
    for k in range(K):
        only = replace(calibration, weights=[float(k == other) for other in range(K)])
        alone.append(_heights(only, observed, burn))
    weights = [0.5, *[1.0] * (K - 1)]
    weighed = replace(calibration, weights=weights)
    assert any(height.max() > 0 for height in alone)
    np.testing.assert_allclose(_heights(weighed, observed, burn), np.tensordot(weights, alone, 1), rtol=1e-6)
    tail, judge = Tail(K, burn, weighed), torch.ones(1, 40, dtype=torch.bool)
    parts = {slot.name: torch.zeros(slot.size, 40) for slot in tail.slots}
    _, after = tail(torch.from_numpy(strengths[0]).t(), judge, torch.full((1, 40), 500.0), ALPHA.expand(40), parts)
    np.testing.assert_allclose(after["onset_height"][K].numpy(), _heights(weighed, observed, burn)[0], rtol=1e-3, atol=2e-3)


def _heights(calibration: Calibration, observed: Observed, burn: int) -> Float64:
    return heights_of(evidence_of(observed, calibration, burn), observed, calibration, burn)
