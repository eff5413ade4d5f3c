"""Events as the arrays that rounds take, without a scorer around them."""

from __future__ import annotations

from collections.abc import Sequence

from service.artifact import Manifest
from service.errors import BadEvent
from service.events import Event, Readings
from service.features import parse
from service.lines import Matcher


def to_readings(
    events: Sequence[Event], manifest: Manifest, *, now: float, matcher: Matcher | None = None
) -> tuple[Readings, dict[int, BadEvent]]:
    """And what is wrong with those that cannot be used, by place."""
    parsed, errors = parse(events, manifest, now=now, matcher=matcher)
    return Readings.of([parsed], len(manifest.features)), errors
