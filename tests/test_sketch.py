"""Thinned for a picture: nothing that stands out is lost, and short series are kept as they are."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from service.backtest import TAIL, Limits, Scored, Series, Tally, score
from service.detector import Detector
from service.policy import Policy
from service.report import Subject, write
from service.sketch import ONSETS, Sketch, allowed, axis, sketch
from tests.tiny import build_tiny

POLICY = Policy(alpha=1e-3)


def series(name: str, rows: int, features: int = 1, *, spike: int | None = None, seed: int = 0) -> Series:
    """Noise around 10, a minute between rows."""
    x = np.random.default_rng(seed).normal(10, 0.1, (rows, features)).astype(np.float32)
    if spike is not None:
        x[spike, features - 1] = 500
    seconds = np.arange(rows, dtype=np.float64) * 60.0 + 1.7e9
    return Series(name, [f"t{i}" for i in range(rows)], seconds, x)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector.load(build_tiny(tmp_path_factory.mktemp("wide"), tuple(f"f{i}" for i in range(12))))


def test_a_short_series_is_drawn_row_by_row(tiny_detector: Detector) -> None:
    one = series("a", 50)
    [drawn] = sketch([one], tiny_detector, POLICY, 100)
    assert not drawn.thinned
    assert np.array_equal(drawn.drawn()["value"][:, 0], one.x[:, 0])
    assert drawn.points().tolist() == list(range(50))


def test_a_single_spike_among_many_rows_is_seen_with_its_score(tiny_detector: Detector) -> None:
    [drawn] = sketch([series("a", 3000, spike=2222)], tiny_detector, POLICY, 100)
    assert drawn.thinned
    columns = drawn.drawn()
    assert np.nanmax(columns["value"]) == 500
    assert np.nanmax(columns["score"]) > 1
    assert columns["anomalous"].sum() >= 2
    onset = next(onset for onset in drawn.onsets if onset.row == 2222)
    assert (onset.timestamp, onset.contributors[0].actual) == ("t2222", 500.0)
    assert len(drawn.points()) == len(columns["value"]) == 200


def test_a_sketch_does_not_depend_on_the_pieces_it_came_in(tiny_detector: Detector) -> None:
    one = series("a", 1000, spike=600)
    [whole] = sketch([one], tiny_detector, POLICY, 70)
    pieces = Sketch.empty(one, ("value",), [0], 70)
    score([one], tiny_detector, POLICY, lambda i, first, scored: pieces.add(first, scored), Limits(chunk_events=37))
    for name in ("low", "high", "expected", "lower", "upper", "score", "anomalous"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name), equal_nan=name != "anomalous"), name
    assert whole.onsets == pieces.onsets
    assert whole.tally == pieces.tally


def test_of_many_features_those_are_drawn_that_carry_the_anomalies(wide: Detector) -> None:
    [drawn] = sketch([series("a", 400, features=12, spike=300)], wide, POLICY, 1000)
    assert len(drawn.features) == 8
    assert 11 in drawn.features
    assert drawn.onsets[-1].contributors[0].feature == "f11"


def test_onsets_beyond_the_limit_are_counted_and_not_listed(tiny_detector: Detector) -> None:
    drawn = Sketch.empty(series("a", 500), ("value",), [0], 500)
    n, nan = 500, np.full((500, 1), np.nan, np.float32)
    flags = np.ones(n, np.bool_)
    every = Scored(
        np.full(n, 2.0),
        np.full(n, 2.0),
        np.full(n, 1e-6, np.float32),
        flags,
        flags,
        nan,
        nan,
        nan,
        nan,
        flags,
        np.zeros(n, np.uint8),
        nan[:, :0],
    )
    drawn.add(0, every)
    assert (len(drawn.onsets), drawn.tally.onsets, drawn.tally.alerts) == (ONSETS, 500, 1)
    assert drawn.tally.rarer == [500 if level > 1e-6 else 0 for level in TAIL]


def test_what_is_drawn_over_never_goes_back() -> None:
    rows = np.arange(4)
    times = np.array([1.7e9, 1.7e9 + 1, 1.7e9 + 1, 1.7e9 + 5])
    assert axis(times, rows)[1]
    for odd in (times[::-1], np.arange(4.0), np.array([math.nan, *times[1:]])):
        over, is_time = axis(odd, rows)
        assert (over.tolist(), is_time) == ([1, 2, 3, 4], False)


def test_what_alpha_allows_is_what_the_policy_promises() -> None:
    assert allowed(Policy(alpha=0.001, strict=True), 10_000, 9_000) == pytest.approx(9.0, rel=1e-3)
    assert allowed(Policy(alpha=0.001, tau=500.0), 10_000, 9_000) > 9.0
    assert allowed(POLICY, 5, 0) == 0


class Parts(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.styled: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.styled += [name for name, _ in attrs if name == "style" or name.startswith("on")]


def test_a_report_is_one_page_that_loads_nothing_and_runs_nothing(tiny_detector: Detector, tmp_path: Path) -> None:
    inputs = [series("calm & <b>steady</b>.csv", 300, seed=1), series("spiky.csv", 4000, spike=3333, seed=2)]
    tallies = [Tally(one.name) for one in inputs]
    score(inputs, tiny_detector, POLICY, lambda i, first, scored: tallies[i].add(first, scored))
    path = tmp_path / "out.html"
    write(path, Subject("Backtest", "Of a test.", tiny_detector, POLICY), tallies, inputs.__getitem__)
    text = path.read_text()
    parts = Parts(text)
    assert "script" not in parts.tags
    assert "link" in parts.tags
    assert all(link.startswith("#") or link == "data:," for link in parts.links)
    assert parts.styled == []
    assert "@import" not in text
    assert "url(" not in text
    assert parts.tags.count("svg") == 3  # two inputs, the calibration
    assert "calm &amp; &lt;b&gt;steady&lt;/b&gt;.csv" in text
    assert text.index('id="i0">spiky.csv') < text.index('id="i1">calm')  # the most alerts first
    assert "t3333" in text
    assert "expected 10" in text
    assert "nan" not in re.sub(r"[A-Za-z]*nan[A-Za-z]+", "", text.lower())
    assert list(tmp_path.iterdir()) == [path]


def test_of_inputs_with_as_many_alerts_the_one_with_the_greatest_score_comes_first(tiny_detector: Detector, tmp_path: Path) -> None:
    inputs = [series("slight.csv", 300, seed=1), series("gross.csv", 300, seed=2)]
    tallies = [Tally("slight.csv", rows=300, alerts=1, greatest=1.1), Tally("gross.csv", rows=300, alerts=1, greatest=3.2)]
    write(tmp_path / "out.html", Subject("Backtest", "Of a test.", tiny_detector, POLICY), tallies, inputs.__getitem__)
    text = (tmp_path / "out.html").read_text()
    assert text.index('href="#i0">gross.csv') < text.index('href="#i1">slight.csv')
    assert "<td>3.20</td>" in text


def test_onsets_are_told_by_date_where_a_file_counts_seconds_since_1970(tiny_detector: Detector, tmp_path: Path) -> None:
    one = series("spiky.csv", 400, spike=333, seed=2)
    one = replace(one, timestamps=[str(at) for at in one.seconds.tolist()])
    tally = Tally(one.name)
    score([one], tiny_detector, POLICY, lambda i, first, scored: tally.add(first, scored))
    write(tmp_path / "out.html", Subject("Backtest", "Of a test.", tiny_detector, POLICY), [tally], lambda i: one)
    text = (tmp_path / "out.html").read_text()
    assert "<td>2023-11-15 03:46:20</td>" in text
    assert "1700019980" not in text
