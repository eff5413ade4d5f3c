"""A Prometheus series → its stream: relabelled, named, and whether it is scored.

    labels as sent ─► our own series? ─► + meta labels ─► rules (relabel.py) ─► − labels in __ ─► canonical name ─► stream

The name is what PromQL writes, with its labels sorted: `node_load1{instance="a:9100",job="node"}`. Beyond MAX_NAME_LENGTH characters it
ends, after its first 223, in `~` and the BLAKE2b-128 hash of the whole of it. Meta labels are there for the rules only:

    __onset_type__   the metric's type, where 2.0 says it: counter, gauge, histogram, summary, ...
    __onset_rate__   "true": what is scored is the increase per second. Set for counters; a rule may set or remove it
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from service.asking import WRITTEN_BACK
from service.errors import BadEvent
from service.events import MAX_NAME_LENGTH, UNPRINTABLE
from service.prompb import Label
from service.relabel import LABEL, Rule, relabel
from service.series import SERIES

NAME = "__name__"
TYPE_LABEL, RATE_LABEL = "__onset_type__", "__onset_rate__"
MODEL, FOR, STREAM = "model", "for", "stream"
"""Labels of our own series: the model, and the metric's name (as vmanomaly has it) or else the stream's id."""
COUNTERS = ("_total", "_bucket", "_count", "_sum")
"""Endings of names that counters have by Prometheus' conventions, where the type is not said."""
GAUGE_TYPES = ("gauge", "gaugehistogram", "info", "stateset")
MAX_LABELS, MAX_LABEL_NAME, MAX_LABEL_VALUE = 64, 1024, 4096
"""Of one series; lengths in bytes."""
REMEMBERED_BYTES = 4096
"""Of labels, on average for each series that may be remembered: of longer ones fewer are, so that memory stays bounded."""
HASH_DIGITS = 32

OURS = frozenset({*WRITTEN_BACK, *(metric.name for metric in SERIES)})

Skip = Literal["", "own", "rule"]
Labels = Mapping[str, str]

K = TypeVar("K")
V = TypeVar("V")

_METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}
_ESCAPED = re.compile(r'[\\"]|' + UNPRINTABLE)
_UNESCAPED = re.compile(r'\\(?:([\\"])|(n)|x([0-9a-f]{2}))')
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)?(?:\{(.*)\})?", re.DOTALL)
_PAIR = re.compile(rf"(?:([a-zA-Z_][a-zA-Z0-9_]*|{_QUOTED})=)?({_QUOTED})(?:,|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Series:
    """What a series comes to."""

    stream_id: str = ""
    rate: bool = False
    """Whether its increase per second is scored."""
    skip: Skip = ""
    """Why it is not scored: it is our own; a rule dropped it."""
    error: BadEvent | None = None
    """Why its samples are refused."""


class _Memory(Generic[K, V]):
    """What was kept last: `most` entries at most, which come to `most` · REMEMBERED_BYTES by `size`."""

    def __init__(self, most: int, size: Callable[[K, V], int]) -> None:
        self.entries: dict[K, V] = {}
        self._most, self._size, self._bytes = most, size, 0

    def keep(self, key: K, value: V) -> None:
        """Those kept longest ago make room."""
        self._forget(key)
        self.entries[key] = value
        self._bytes += self._size(key, value)
        while len(self.entries) > self._most or self._bytes > self._most * REMEMBERED_BYTES:
            self._forget(next(iter(self.entries)))

    def _forget(self, key: K) -> None:
        if (value := self.entries.pop(key, None)) is not None:
            self._bytes -= self._size(key, value)


class Names:
    """What series come to, remembered: the `most` keys seen last (about 1 kB each), so that rules and names cost once.

    May be asked by several threads.
    """

    def __init__(self, rules: Sequence[Rule], most: int) -> None:
        self._rules = rules
        self._series = _Memory[bytes, Series](most, lambda key, _: len(key))
        self._hashed = _Memory[str, Labels](most, lambda _, labels: sum(map(len, labels)) + sum(map(len, labels.values())))
        self._remembering = threading.Lock()
        self.find = self._series.entries.get

    def name(self, key: bytes, labels: Sequence[Label], metric_type: str) -> Series:
        """The series of a key that is not remembered."""
        series, kept = resolve(labels, metric_type, self._rules)
        with self._remembering:
            self._series.keep(key, series)
            if len(series.stream_id) == MAX_NAME_LENGTH:
                self._hashed.keep(series.stream_id, kept)
        return series

    def labels(self, stream_id: str) -> Labels | None:
        """The labels that a stream is named by; None = it is no series, or one whose name is hashed and was not seen lately."""
        return self._hashed.entries.get(stream_id) or labels_of(stream_id)


def resolve(sent: Sequence[Label], metric_type: str, rules: Sequence[Rule]) -> tuple[Series, dict[str, str]]:
    """The series that labels as sent come to, and its labels."""
    try:
        labels = checked(sent)
    except BadEvent as error:
        return Series(error=error), {}
    if is_ours(labels):
        return Series(skip="own"), labels
    labels |= _meta(labels, metric_type)
    if not relabel(labels, rules):
        return Series(skip="rule"), {}
    rate = labels.get(RATE_LABEL) == "true"
    kept = {name: value for name, value in labels.items() if name == NAME or not name.startswith("__")}
    if not kept:
        return Series(error=BadEvent("A series has no labels left after relabelling.", "labels")), {}
    return Series(stream_id_of(kept), rate), kept


def is_ours(labels: Labels) -> bool:
    """Whether it is a series of scores of ours, written back or from /metrics: never scored, or scores would be scored for ever."""
    return labels.get(NAME) in OURS and MODEL in labels and (FOR in labels or STREAM in labels)


def checked(sent: Sequence[Label]) -> dict[str, str]:
    """Labels as text, without empty ones. Raises BadEvent."""
    if len(sent) > MAX_LABELS:
        raise BadEvent(f"A series has {len(sent)} labels; at most {MAX_LABELS}.", "labels")
    labels: dict[str, str] = {}
    for raw_name, raw_value in sent:
        if len(raw_name) > MAX_LABEL_NAME or len(raw_value) > MAX_LABEL_VALUE:
            what = f"{raw_name[:64]!r} has {len(raw_name)} bytes in its name and {len(raw_value)} in its value"
            raise BadEvent(f"The label {what}; at most {MAX_LABEL_NAME} and {MAX_LABEL_VALUE}.", "labels")
        try:
            name, value = raw_name.decode(), raw_value.decode()
        except UnicodeDecodeError as error:
            raise BadEvent(f"The label {raw_name[:64]!r} is not UTF-8.", "labels") from error
        if not name:
            raise BadEvent("A series has a label without a name.", "labels")
        if name in labels:
            raise BadEvent(f"A series has the label {name[:64]!r} twice.", "labels")
        labels[name] = value
    return {name: value for name, value in labels.items() if value}


def is_counter(name: str, metric_type: str) -> bool:
    """Whether a series only ever rises, but for restarts: by its type, or where that is not said by its name."""
    return metric_type == "counter" or (metric_type not in GAUGE_TYPES and name.endswith(COUNTERS))  # a summary's quantiles are gauges


def stream_id_of(labels: Labels) -> str:
    """The canonical name of a series, at most MAX_NAME_LENGTH characters; see the module's docstring."""
    name = labels.get(NAME, "")
    classic = bool(_METRIC.fullmatch(name))
    pairs = [f"{label if LABEL.fullmatch(label) else _quoted(label)}={_quoted(labels[label])}" for label in sorted(labels) if label != NAME]
    if name and not classic:
        pairs.insert(0, _quoted(name))
    return bounded((name if classic else "") + ("{" + ",".join(pairs) + "}" if pairs else ""))


def bounded(whole: str) -> str:
    """A name of at most MAX_NAME_LENGTH characters; see the module's docstring."""
    if len(whole) <= MAX_NAME_LENGTH:
        return whole
    digest = hashlib.blake2b(whole.encode(errors="surrogatepass"), digest_size=HASH_DIGITS // 2).hexdigest()
    return f"{whole[: MAX_NAME_LENGTH - HASH_DIGITS - 1]}~{digest}"


def labels_of(stream_id: str) -> dict[str, str] | None:
    """The labels of a canonical name; None = it is none."""
    selector = _SELECTOR.fullmatch(stream_id)
    if selector is None or not stream_id:
        return None
    name, inside = selector.groups()
    labels = {NAME: name} if name else {}
    at = 0
    while inside and at < len(inside):
        pair = _PAIR.match(inside, at)
        if pair is None:
            return None
        label, value = pair.groups()
        label = NAME if label is None else _unquoted(label) if label.startswith('"') else label
        if label in labels:
            return None
        labels[label] = _unquoted(value)
        at = pair.end()
    return labels if labels and stream_id_of(labels) == stream_id else None


def exported(labels: Labels, ours: Collection[str]) -> dict[str, str]:
    """Labels to stand beside `ours`: one called as one of these becomes exported_…, and again while another one is called so."""
    named: dict[str, str] = {}
    for name, value in labels.items():
        other = name
        while other in ours or (other != name and other in labels):
            other = f"exported_{other}"
        named[other] = value
    return named


def _meta(labels: Labels, metric_type: str) -> dict[str, str]:
    meta = {TYPE_LABEL: metric_type} if metric_type else {}
    return meta | {RATE_LABEL: "true"} if is_counter(labels.get(NAME, ""), metric_type) else meta


def _quoted(text: str) -> str:
    escaped = _ESCAPED.sub(lambda match: _ESCAPES.get(match[0], f"\\x{ord(match[0]):02x}"), text)
    return f'"{escaped}"'


def _unquoted(text: str) -> str:
    return _UNESCAPED.sub(lambda match: match[1] or ("\n" if match[2] else chr(int(match[3], 16))), text[1:-1])
