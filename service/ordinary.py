"""Replies to ordinary events as JSON, made column by column: to the last byte what msgspec makes of their `Result`s.

An ordinary event is a scored one of a warm stream with nothing the matter: no anomaly, no alert, no value missing. Nearly all are, and
their replies differ in a dozen numbers. To make an object of 28 fields for each and take it apart again cost more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.events import Contributor, Event, Result
from service.policy import THRESHOLD
from service.state import Rows

_encoder = msgspec.json.Encoder()
_FIRST = ("stream_id", "event_id", "timestamp")
"""What a reply says of the event that was sent, before what is said of its scores."""
_HEAD = b"{" + b"".join(b'"%s":%%b,' % name.encode() for name in _FIRST) + b"%b"
_SAME: dict[str, Any] = {
    "alert_score": 0.0,
    "is_anomaly": False,
    "anomaly_grade": 0.0,
    "severity": "none",
    "threshold": THRESHOLD,
    "direction": "none",
    "anomaly_started_at": None,
    "imputed": [],
    "status": "ready",
    "samples_until_ready": 0,
    "duplicate": False,
    "late": False,
    "silent_since": None,
}
"""Of all ordinary events."""
_OF_FEATURES = ("expected", "lower", "upper")


class Ordinary:
    """The replies of one detector of sensors with F features; `top` = how many contributors are told."""

    def __init__(self, model: str, version: str, names: tuple[str, ...], top: int) -> None:
        self._names, self._top = [_json(name) for name in names], min(top, len(names))
        same = {name: _json(value) for name, value in (_SAME | {"model": model, "model_version": version}).items()}
        named = b"{%b}" % b",".join(b"%b:%%b" % name.replace(b"%", b"%%") for name in self._names)
        told = b"{%b}" % b",".join(b"%b:%%b" % _json(name) for name in Contributor.__struct_fields__)
        own = dict.fromkeys(_OF_FEATURES, named) | {"contributors": b"[%b]" % b",".join([told] * self._top)}
        fields = [name for name in Result.__struct_fields__ if name not in (*_FIRST, "line")]
        parts = [b"%b:%b" % (_json(name), own.get(name, same[name].replace(b"%", b"%%") if name in same else b"%b")) for name in fields]
        self._fill = (b",".join(parts) + b"}").__mod__

    def ends(self, records: Rows, anomaly_score: NDArray[np.float64], confidence: NDArray[np.float64], alpha: list[float]) -> list[bytes]:
        """Of N ordinary records what follows on the timestamp."""
        N, F = records["x"].shape
        share, x, expected, lower, upper = (_lines(records[name].ravel().tolist()) for name in ("contribution", "x", *_OF_FEATURES))
        told = [self._names * N, share, x, expected]
        if F > 1:
            order = np.argsort(-records["contribution"], axis=1, kind="stable")[:, : self._top]
            places = (order + F * np.arange(N)[:, None]).T.tolist()
            told = [list(map(numbers.__getitem__, some)) for some in places for numbers in told]
        columns = [
            _lines(anomaly_score.tolist()),
            _lines(records["p_value"].tolist()),
            _alike(confidence.tolist()),
            _alike(alpha),
            *(numbers[j::F] for numbers in (expected, lower, upper) for j in range(F)),
            *told,
            _alike(records["version"].tolist()),
        ]
        return list(map(self._fill, zip(*columns, strict=True)))


def whole(events: Sequence[Event], timestamps: Sequence[float], ends: Sequence[bytes]) -> list[bytes]:
    """Replies to N events that were taken to be of these times; a reply says the time that was sent, if one was."""
    event_ids = [event.event_id for event in events]
    ids = _lines(event_ids) if any(event_ids) else [b"null"] * len(events)
    times = [taken if event.timestamp is None else event.timestamp for event, taken in zip(events, timestamps, strict=True)]
    stream_ids = _lines([event.stream_id or "" for event in events])
    return list(map(_HEAD.__mod__, zip(stream_ids, ids, _lines(times), ends, strict=True)))


def _json(value: Any) -> bytes:
    return _encoder.encode(value)


def _lines(values: Sequence[Any]) -> list[bytes]:
    """Each of N values as JSON; no line break is in one."""
    lines = _encoder.encode_lines(values).split(b"\n")
    lines.pop()
    return lines


def _alike(values: list[Any]) -> list[bytes]:
    """The same of values that are often all equal, and none of them a zero, which has two signs."""
    return [_json(values[0])] * len(values) if values and values.count(values[0]) == len(values) else _lines(values)
