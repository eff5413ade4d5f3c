"""Events → columns in the manifest's order of features. What cannot be used is refused by field, its neighbours are kept.

Of a log model the features are the line's code, the gap (NaN here: rounds.py knows it) and the line's numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from service.artifact import Lines, Manifest
from service.errors import BadEvent, FutureEvent
from service.events import EARLIEST_SECONDS, FLOAT32_MAX, LATEST_SECONDS, UNPRINTABLE, Columns, Event, Parsed, listed, shown
from service.lines import Matcher
from service.state import event_key

LATEST_WRITTEN_SECONDS = 253_402_214_400.0
"""The end of the year 9999 (a day early), which a time that is written out may reach. Beyond either end no calendar shows it."""
COUNTED_SECONDS = 10**8
"""In 1973. A time before it in milli-, micro- or nanoseconds is none, but a number of a larger unit; seconds may count from anywhere."""
_LARGER = {"microseconds": 10**14, "milliseconds": 10**11, "seconds": 10**8}
"""What a time looks like that is at least so much."""
TOGETHER = 16
"""Events from which on looking at all of them at once is quicker than at one after the other."""
_NAN = math.nan
_unprintable = re.compile(UNPRINTABLE).search
_half = re.compile("[\ud800-\udfff]").search


def parse(
    events: Sequence[Event], manifest: Manifest, *, now: float, max_future: float = math.inf, matcher: Matcher | None = None
) -> tuple[Parsed, dict[int, BadEvent]]:
    """N events → the columns of the usable ones in order, and what is wrong with the others by position.

    `now` (seconds since 1970) stands in for a missing timestamp; one more than `max_future` seconds ahead of it is refused.
    `matcher` is the manifest's own, which a log model needs.
    """
    names = manifest.feature_names
    known = frozenset(names)
    errors: dict[int, BadEvent] = {}
    parsed = Parsed([], [], [], [], [], [], messages=None if matcher is None else [])
    # One search over all names: most often there is nothing to be found.
    stream_ids, event_ids = [event.stream_id for event in events], [event.event_id for event in events]
    doubtful = not all(stream_ids) or _unprintable("".join([name for name in (*stream_ids, *event_ids) if name])) is not None
    if len(events) >= TOGETHER and not doubtful and matcher is None:
        plain = _plain(events, stream_ids, event_ids, names, now, now + max_future)
        if plain is not None:
            return plain, errors
    for i, event in enumerate(events):
        try:
            if doubtful:
                _check_identity(event)
            row = _row(event, names, known, manifest) if matcher is None else _checked_line(event, manifest)
            seconds = now if event.timestamp is None else parse_timestamp(event.timestamp, now + max_future)
        except BadEvent as error:
            errors[i] = error
            continue
        parsed.stream_ids.append(event.stream_id or "")
        parsed.values.extend(row)
        parsed.timestamp.append(seconds)
        parsed.timed.append(event.timestamp is not None)
        parsed.sequence.append(-1 if event.sequence is None else event.sequence)
        parsed.key.append(event_key(event.event_id, event.sequence))
        if parsed.messages is not None:
            parsed.messages.append(event.message)
    return parsed if matcher is None else _matched(parsed, manifest, matcher), errors


def _plain(
    events: Sequence[Event],
    stream_ids: Sequence[str | None],
    event_ids: Sequence[str | None],
    names: tuple[str, ...],
    now: float,
    latest: float,
) -> Parsed | None:
    """What `parse` makes of events whose identities can be used, all at once; None where one of them is no number for each feature.

    Nothing is judged here: where anything is out of the ordinary, `parse` goes through the events one by one.
    """
    values, times = [event.values for event in events], [event.timestamp for event in events]
    if None in values or str in set(map(type, times)) or any(event.message is not None or event.end for event in events):
        return None
    try:
        flat: list[float | None] = [row[name] for row in values if row is not None for name in names]
    except KeyError:  # a missing value
        return None
    x, seconds = np.array(flat, np.float64), np.array([now if time is None else time for time in times], np.float64)
    known = sum([len(row) for row in values if row is not None]) == x.size
    timely = (seconds >= EARLIEST_SECONDS) & (seconds <= min(latest, LATEST_SECONDS))
    if not (known and timely.all() and (np.abs(x) <= FLOAT32_MAX).all()):
        return None
    sequence, nameless = [event.sequence for event in events], not any(event_ids)
    keys = [0 if nameless and number is None else event_key(name, number) for name, number in zip(event_ids, sequence, strict=True)]
    return Parsed(
        [name or "" for name in stream_ids],
        flat,
        seconds.tolist(),
        [time is not None for time in times],
        [-1 if number is None else number for number in sequence],
        keys,
    )


def parse_columns(columns: Columns, manifest: Manifest, *, now: float, max_future: float) -> tuple[Parsed, dict[int, BadEvent]]:
    """The same for N events in columns. Rows that may be unusable are found for all at once, and judged one by one like any event.

    A row of `columns.bad` is neither parsed nor among the errors.
    """
    names, N = manifest.feature_names, len(columns)
    if manifest.lines is not None:
        detail = f"Model '{manifest.name}' takes log lines in 'message', not numbers."
        return Parsed([], [], [], [], [], []), {i: BadEvent(detail, "values") for i in range(N) if i not in columns.bad}
    x = np.full((N, len(names)), np.nan)
    for j, name in enumerate(names):
        if name in columns.values:
            x[:, j] = columns.values[name]
    timed = ~np.isnan(columns.timestamp)
    seconds = np.where(timed, columns.timestamp, now)
    errors: dict[int, BadEvent] = {}
    unknown = next((name for name in columns.values if name not in names), None)
    suspicious = replace(columns, values={unknown: columns.values[unknown]}) if unknown is not None else columns
    lines = columns.messages is not None or columns.ends is not None
    for i in np.flatnonzero(_suspects(suspicious, x, seconds, now + max_future, all_=lines or unknown is not None)).tolist():
        if i not in columns.bad:
            _, wrong = parse([suspicious.event(i)], manifest, now=now, max_future=max_future)
            if wrong:
                errors[i] = wrong[0]
    used = np.array([i for i in range(N) if i not in errors and i not in columns.bad], np.intp)
    event_ids, sequence = [columns.event_ids[i] for i in used.tolist()], columns.sequence[used].tolist()
    return Parsed(
        [columns.stream_ids[i] or "" for i in used.tolist()],
        x[used].ravel().tolist(),
        seconds[used].tolist(),
        timed[used].tolist(),
        sequence,
        [
            event_key(event_id, number if number >= 0 else None) if event_id is not None or number >= 0 else 0
            for event_id, number in zip(event_ids, sequence, strict=True)
        ],
        raw=None if columns.raw is None else columns.raw[used].tolist(),
    ), errors


def _suspects(columns: Columns, x: NDArray[np.float64], seconds: NDArray[np.float64], latest: float, *, all_: bool) -> NDArray[np.bool_]:
    """[N] whether a row may be unusable: all that are, and perhaps others."""
    if all_ or not columns.values:
        return np.ones(len(columns), np.bool_)
    found: NDArray[np.bool_] = (np.abs(x) > FLOAT32_MAX).any(axis=1) | ~(
        (seconds >= EARLIEST_SECONDS) & (seconds <= min(latest, LATEST_SECONDS))
    )
    for texts in (columns.stream_ids, columns.event_ids):
        if _unprintable("".join([text for text in texts if text])):
            found |= np.array([text is not None and _unprintable(text) is not None for text in texts])
    if not all(columns.stream_ids):
        found |= np.array([not stream_id for stream_id in columns.stream_ids])
    return found


def parse_timestamp(value: float | str, latest: float = math.inf) -> float:
    """RFC 3339 or seconds since 1970 → seconds since 1970, UTC. A time without zone is UTC. Raises BadEvent."""
    hint = ""
    if isinstance(value, str):
        try:
            if not value.isascii():  # Python takes any character between date and time, also half of one, which no reply can hold
                raise ValueError("not ASCII")
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is None:
                moment, hint = moment.replace(tzinfo=UTC), " It names no zone, so it is taken for UTC."
            seconds = moment.timestamp()
        except (ValueError, OverflowError) as error:
            raise BadEvent(
                f"timestamp {value[:64]!r} is neither RFC 3339 (2026-11-23T08:00:00Z) nor a number of seconds since 1970.",
                "timestamp",
                shown(value),
            ) from error
    else:
        seconds = float(value)
    limit = LATEST_WRITTEN_SECONDS if isinstance(value, str) else LATEST_SECONDS  # a written year is no mistaken unit
    if not EARLIEST_SECONDS <= seconds <= limit:
        hint = ""
        if LATEST_SECONDS < seconds < 1e20:
            unit = "milliseconds" if seconds < 1e14 else "microseconds" if seconds < 1e17 else "nanoseconds"
            hint = f" It looks like {unit}: send seconds, or declare the source's payload.timestamp_unit."
        raise BadEvent(f"timestamp {value} is not a time in seconds since 1970.{hint}", "timestamp", shown(value))
    if seconds > latest:
        detail = f"timestamp {value} is too far in the future: every later event of the stream would count as late.{hint}"
        raise FutureEvent(detail, "timestamp", shown(value))
    return seconds


def of_another_unit(moment: float, unit: str, field: str = "timestamp") -> BadEvent:
    """What is wrong with a time before COUNTED_SECONDS that was to be in a smaller unit than seconds."""
    looks = next((f": it looks like {name}" for name, least in _LARGER.items() if moment >= least), "")
    return BadEvent(f"{field} {shown(moment)} is no time in {unit} since 1970{looks}.", field, shown(moment))


def _check_identity(event: Event) -> None:
    """Raises BadEvent."""
    if not event.stream_id:
        raise BadEvent("stream_id is missing.", "stream_id")
    if _unprintable(event.stream_id):
        raise BadEvent(f"stream_id {event.stream_id[:64]!r} holds control characters.", "stream_id", shown(event.stream_id))
    if event.event_id is not None and _unprintable(event.event_id):
        raise BadEvent(f"event_id {event.event_id[:64]!r} holds control characters.", "event_id", shown(event.event_id))


def _checked_line(event: Event, manifest: Manifest) -> list[float | None]:
    """Room for the numbers of a line or of a session's end. Raises BadEvent that names the field."""
    if event.values is not None:
        raise BadEvent(f"Model '{manifest.name}' takes log lines in 'message', not numbers in 'values'.", "values")
    message = event.message
    if event.end and message is not None:
        raise BadEvent("'end' is an event of its own: send it after the session's last line, without 'message'.", "end", "true")
    if not event.end and message is None:
        raise BadEvent(f"Model '{manifest.name}' takes log lines in 'message'; it is missing.", "message")
    if message is not None and not message.strip():
        raise BadEvent("message holds no text.", "message", shown(message))
    if message is not None and (half := _half(message)):
        raise BadEvent(f"message holds half a character at {half.start()}.", "message")
    return []


def _matched(parsed: Parsed, manifest: Manifest, matcher: Matcher) -> Parsed:
    """With the lines' codes and numbers as values."""
    lines, messages = manifest.lines, parsed.messages or []
    if lines is None:
        raise ValueError(f"A matcher for model '{manifest.name}', which takes no lines: this is a bug.")
    return replace(parsed, values=[*coded(messages, len(manifest.features), lines, matcher).ravel().tolist()])


def coded(messages: Sequence[str | None], F: int, lines: Lines, matcher: Matcher) -> NDArray[np.float64]:
    """[N, F] features of N lines, None = the end of a session: code, gap (NaN), numbers (NaN = none)."""
    x = np.full((len(messages), F), np.nan)
    said = [i for i, message in enumerate(messages) if message is not None]
    x[:, 0] = lines.end
    x[said, 0], numbers = matcher.codes([message for message in messages if message is not None])
    x[said, 2:] = numbers[:, : F - 2]
    return x


def _row(event: Event, names: tuple[str, ...], known: frozenset[str], manifest: Manifest) -> list[float | None]:
    """Numbers in the manifest's order, None = missing. Raises BadEvent that names the field."""
    if event.end:
        raise BadEvent(f"'end' is of log lines; model '{manifest.name}' takes numbers in 'values'.", "end", "true")
    values = event.values
    if values is None or event.message is not None:
        wrong, right = ("message", "values") if event.message is not None else ("values", "values")
        detail = f"takes numbers in '{right}'" + (", not a log line in 'message'." if wrong == "message" else "; 'values' is missing.")
        raise BadEvent(f"Model '{manifest.name}' {detail}", wrong)
    if not values:
        raise BadEvent(f"values is empty; model '{manifest.name}' knows {listed(names)}.", "values")
    if not values.keys() <= known:
        unknown = next(name for name in values if name not in known)
        each = "" if len(names) > 1 else ": each sensor is a stream of its own to it, with one number"
        raise BadEvent(
            f"values.{unknown[:64]} is not a feature of model '{manifest.name}', which knows {listed(names)}{each}.",
            f"values.{unknown[:64]}",
            shown(values[unknown]),
        )
    for name, number in values.items():
        if number is not None and not -FLOAT32_MAX <= number <= FLOAT32_MAX:
            beyond = "" if math.isnan(number) else ", beyond the range of float32"
            detail = f"values.{name} is {shown(number)}{beyond}; send null for a missing value."
            raise BadEvent(detail, f"values.{name}", shown(number))
    return [values.get(name, _NAN) for name in names]
