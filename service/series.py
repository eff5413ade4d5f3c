"""Series of single streams, for those who ask for them (ONSET_STREAM_METRICS): reading, expectation, band and score at /metrics.

The names are vmanomaly's, so that its dashboards fit. A stream gets a place while there is one and keeps it until it has not been heard
of for RECENT_SECONDS; then its series end, but for the count of its events, which rates are made of: that ends after COUNTED_SECONDS, or
when another stream needs the place. Written as text by itself, in a thread: 5,000 streams are some 50,000 lines a scrape.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.fleet import RECENT_SECONDS, Gathered, Judged
from service.metrics import Metric, Metrics
from service.policy import THRESHOLD

_STREAM, _FEATURE = {"model": (), "stream": ()}, {"model": (), "stream": (), "feature": ()}
_COMPARE = "Compare it with the band of the same stream."
SERIES = (
    Metric("anomaly_score", "gauge", "score", _STREAM, "The stream's last anomaly score.", "Above 1 it is rarer than the asked rate."),
    Metric(
        "anomaly_grade",
        "gauge",
        "0..1",
        _STREAM,
        "0 while the stream is normal; above 0 while it is anomalous, also where the anomaly lasts and is no longer rare.",
        "Above 0: the service takes the stream for anomalous.",
    ),
    Metric(
        "anomaly_event_timestamp_seconds",
        "gauge",
        "seconds since 1970",
        _STREAM,
        "When the stream's last event that this replica scored was, by its own time.",
        "Of several replicas the one with the greatest shows how the stream is; the others how it was.",
    ),
    Metric(
        "anomaly_onset_timestamp_seconds",
        "gauge",
        "seconds since 1970",
        _STREAM,
        "When the stream's last alert opened, by its event's own time; none = not since it is shown.",
        "Changes: an anomaly begins.",
    ),
    Metric(
        "stream_events",
        "gauge",
        "events",
        _STREAM,
        "Events that the stream has had, log lines or readings: `state_version` of its last one. Shown for an hour after it.",
        "Much faster or slower than at this hour of other days: a flood, or something that says less than it should.",
    ),
    Metric("y", "gauge", "the feature's", _FEATURE, "The last reading.", _COMPARE),
    Metric("yhat", "gauge", "the feature's", _FEATURE, "What the model expected.", _COMPARE),
    Metric("yhat_lower", "gauge", "the feature's", _FEATURE, "Lower end of the band.", _COMPARE),
    Metric("yhat_upper", "gauge", "the feature's", _FEATURE, "Upper end of the band.", _COMPARE),
    Metric("contribution", "gauge", "share", _FEATURE, "The feature's share of the error.", "The largest ones carry the anomaly."),
)
"""The catalogue's entries of single streams."""
# Series of a feature, and the column of the record that they show.
_COLUMNS = (("y", "x"), ("yhat", "expected"), ("yhat_lower", "lower"), ("yhat_upper", "upper"), ("contribution", "contribution"))


LOOK_SECONDS = 10.0
COUNTED_SECONDS = 3600.0
"""For so long after its last event the count of a stream's events is shown: a stream that speaks every ten minutes has a rate, too."""


class Now(NamedTuple):
    """N streams of F features at one moment."""

    labels: Sequence[tuple[str, Sequence[str]]]
    """[N] of the stream, and [F] of its features."""
    single: Mapping[str, NDArray[np.float64]]
    """[N] each."""
    numbers: NDArray[np.float32]
    """[_COLUMNS, N, F]"""
    events: Sequence[tuple[str, int]]
    """Of each stream heard of within COUNTED_SECONDS: its label, and how many it has had."""

    def lines(self, name: str) -> list[str]:
        """The samples of one of SERIES; what is missing has none."""
        if name == "stream_events":
            return [f"{name}{{{label}}} {number}" for label, number in self.events]
        columns = [shown for shown, _ in _COLUMNS]
        if name not in columns:
            numbers, labels = self.single[name], [stream for stream, _ in self.labels]
        else:
            numbers = self.numbers[columns.index(name)].astype(np.float64).ravel()
            labels = [label for _, features in self.labels for label in features]
        return [f"{name}{{{label}}} {number!r}" for label, number in zip(labels, numbers.tolist(), strict=True) if not math.isnan(number)]


class Series:
    """The series of one model's streams, at most `most` of them. `clock` is monotonic."""

    def __init__(
        self, model: str, features: Sequence[str], most: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._model, self._features, self._metrics, self._clock = model, features, metrics, clock
        self._slots: dict[str, int] = {}
        self._free = list(range(most))[::-1]
        self._numbers = np.full((len(_COLUMNS), most, len(features)), np.nan, np.float32)
        self._single = {metric.name: np.full(most, np.nan) for metric in SERIES if metric.labels is _STREAM}
        self._heard = np.zeros(most)
        self._labels: dict[int, tuple[str, list[str]]] = {}
        self._look_at = 0.0
        self.gathered = Gathered(model, self._take)
        metrics.before(self.gathered.flush)
        metrics.shown.labels(model).set_function(lambda: len(self._slots))

    def _take(self, judged: Judged) -> None:
        known = self._slots.get
        places = [known(stream_id, -1) for stream_id in judged.stream_ids]
        for i in [i for i, place in enumerate(places) if place < 0]:
            places[i] = self._slot(judged.stream_ids[i])
        slots = np.array(places, np.intp)
        there = slots >= 0
        self._metrics.not_shown.labels(self._model).inc(int((~there).sum()))
        slots = slots[there]
        self._heard[slots] = self._clock()
        self._single["stream_events"][slots] = judged.record("version")[there]
        # Of a stream's several events the last one stays: numpy assigns in order.
        self._single["anomaly_score"][slots] = score = judged.verdict("anomaly_score")[there]
        self._single["anomaly_grade"][slots] = np.where(np.isnan(score), np.nan, judged.verdict("grade")[there])
        for shown, (_, column) in enumerate(_COLUMNS):
            self._numbers[shown, slots] = judged.record(column)[there]
        self._single["anomaly_event_timestamp_seconds"][slots] = judged.record("timestamp")[there]
        opened = judged.verdict("alert_score")[there] > THRESHOLD
        self._single["anomaly_onset_timestamp_seconds"][slots[opened]] = judged.record("timestamp")[there][opened]

    def now(self) -> Now:
        """What is to be shown at this moment; streams not heard of are not."""
        now = self._clock()
        counted = [slot for slot in self._slots.values() if self._heard[slot] >= now - COUNTED_SECONDS]
        slots = [slot for slot in counted if self._heard[slot] >= now - RECENT_SECONDS]
        labels = [self._labels[slot] for slot in slots]
        events = [(self._labels[slot][0], int(self._single["stream_events"][slot])) for slot in counted]
        return Now(labels, {name: numbers[slots] for name, numbers in self._single.items()}, self._numbers[:, slots], events)

    def _slot(self, stream_id: str) -> int:
        """Its place; -1 = there is none left."""
        slot = self._slots.get(stream_id)
        if slot is not None:
            return slot
        if not self._free:
            self._forget()
        if not self._free:
            return -1
        slot = self._slots[stream_id] = self._free.pop()
        self._single["anomaly_onset_timestamp_seconds"][slot], self._heard[slot] = np.nan, self._clock()
        stream = f'model="{self._model}",stream="{_escaped(stream_id)}"'
        self._labels[slot] = stream, [f'{stream},feature="{_escaped(feature)}"' for feature in self._features]
        return slot

    def _forget(self) -> None:
        """Free the places of streams not heard of; looked for once in LOOK_SECONDS at most."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        for stream_id in [name for name, slot in self._slots.items() if self._heard[slot] < now - RECENT_SECONDS]:
            self._free.append(self._slots.pop(stream_id))


def exposition(shown: Sequence[Now]) -> bytes:
    """The series of several models in Prometheus' text format. It takes its time, and may be called in a thread of its own."""
    lines: list[str] = []
    for metric in SERIES:
        lines += [f"# HELP {metric.name} {metric.meaning}", f"# TYPE {metric.name} gauge"]
        for now in shown:
            lines += now.lines(metric.name)
    return "\n".join([*lines, ""]).encode()


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
