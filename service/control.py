"""What can be changed while the service runs: α and `strict`, for all replicas at once, without restart or training.

    PUT ─► checked ─► hash in the store ─► this replica's scorers ─► answer
                          └── read every REFRESH_SECONDS by every replica ─► its scorers

What is not in the hash is the environment's; DELETE empties it. A replica scores nothing before it has read the hash once, so no event
is ever judged by an environment that was overruled; while the store does not answer, what was read last stays in force.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import structlog

from service import tasks
from service.asking import ALPHA_RANGE, LARGEST_ALPHA, SMALLEST_ALPHA, per_event
from service.errors import BadParameter, StoreUnavailable
from service.events import shown
from service.metrics import Metrics
from service.scorer import Scorer
from service.stores import StateStore

REFRESH_SECONDS = 1.0
SAMPLED = 500
"""Streams of a model whose cadence is looked at for an expectation."""
DAY = 86_400.0

FIELDS = ("alpha", "false_alarms", "cadence_seconds", "strict")

log = structlog.get_logger(__name__)

Source = Literal["environment", "run time"]
Rate = Annotated[float, msgspec.Meta(ge=SMALLEST_ALPHA, lt=LARGEST_ALPHA)]


class Alpha(msgspec.Struct, frozen=True):
    """An asked rate, as the store keeps it: per event, and the words it was given in, if it was."""

    value: Rate
    changed_at: float | None = None
    """Seconds since 1970; None = it is the environment's."""
    false_alarms: str = ""
    cadence_seconds: float | None = None


class Strict(msgspec.Struct, frozen=True):
    """Whether new streams have no learning allowance, as the store keeps it."""

    value: bool
    changed_at: float | None = None


@dataclass(frozen=True)
class Asked:
    """Everything that can be changed at run time."""

    alpha: Alpha
    strict: Strict


class Provenance(msgspec.Struct):
    """Where a value in force comes from, and when it was changed (seconds since 1970)."""

    source: Source
    changed_at: float | None


class Expectation(msgspec.Struct):
    """False alarms to be expected of one model while its streams are normal: alpha times their events, not a measurement.

    Numbers are null where they are unknown, `reason` says why.
    """

    cadence: Literal["measured", "configured"] | None
    """Of the live streams (the mean of lognormal gaps), or what the operator stated."""
    events_per_stream_and_day: float | None
    per_stream_and_day: float | None
    per_stream_and_week: float | None
    active_streams: int | None
    """Live streams that have shown their cadence, on all replicas."""
    sampled_streams: int
    """How many of them, drawn by chance, the measured cadence is the mean of."""
    fleet_per_day: float | None
    extra_while_learning: float
    """What a new stream's first 10,000 events may add; 0 when strict."""
    reason: str | None
    caution: str | None
    """Why to expect more, where what is asked is rarer than what the model was calibrated on can say."""


class PolicyReply(msgspec.Struct):
    """The policy in force on the answering replica."""

    alpha: float
    strict: bool
    false_alarms: str | None
    """The words alpha was given in, "1 per week", and with what cadence; null when it was given as a number."""
    cadence_seconds: float | None
    origin: dict[str, Provenance]
    environment: dict[str, float | bool]
    """What DELETE goes back to."""
    expected_false_alarms: dict[str, Expectation]
    """By model."""


Value = TypeVar("Value", Alpha, Strict)


class Control:
    """The one owner of what is asked for. `clock` gives seconds since 1970."""

    def __init__(
        self,
        environment: Asked,
        cadence_seconds: float | None,
        scorers: Mapping[str, Scorer],
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`cadence_seconds` as the operator stated it; `scorers` by model, filled before the first refresh."""
        self._environment, self._cadence = environment, cadence_seconds
        self._scorers, self._metrics, self._clock = scorers, metrics, clock
        self._store: StateStore | None = None
        self._asked = environment
        self._applied: Mapping[str, bytes] | None = None
        self._lock = asyncio.Lock()  # what was read first is applied first

    def connect(self, store: StateStore) -> None:
        """Where the changes are kept."""
        self._store = store

    async def refresh(self) -> None:
        """Read what is in force. Raises StoreUnavailable, and then nothing changes."""
        async with self._lock:
            self._apply(await self._kept().policy(), by="refresh")

    async def change(self, body: Mapping[str, Any]) -> None:
        """Change what `body` names, for all replicas. Raises BadParameter, StoreUnavailable."""
        await self._change({name: msgspec.json.encode(value) for name, value in self._checked(body).items()})

    async def reset(self) -> None:
        """Go back to the environment's, on all replicas. Raises StoreUnavailable."""
        await self._change({"alpha": None, "strict": None})

    async def run(self, every: float = REFRESH_SECONDS) -> None:
        """Refresh until cancelled."""

        def away(error: StoreUnavailable) -> None:
            log.warning("policy_not_refreshed", error=error.detail, alpha=self._asked.alpha.value, strict=self._asked.strict.value)

        await tasks.repeat(self.refresh, every, away, partial(self._metrics.bug, task="policy"))

    async def reply(self) -> PolicyReply:
        """What is in force here, and what it means for the streams there are now."""
        asked, environment = self._asked, self._environment
        return PolicyReply(
            asked.alpha.value,
            asked.strict.value,
            asked.alpha.false_alarms or None,
            asked.alpha.cadence_seconds,
            {"alpha": _origin(asked.alpha), "strict": _origin(asked.strict)},
            {"alpha": environment.alpha.value, "strict": environment.strict.value},
            {name: await self._expectation(scorer, asked) for name, scorer in self._scorers.items()},
        )

    async def _change(self, changes: Mapping[str, bytes | None]) -> None:
        async with self._lock:
            self._apply(await self._kept().change_policy(changes), by="call")

    def _kept(self) -> StateStore:
        if self._store is None:
            raise StoreUnavailable("The state store has not been opened yet.")
        return self._store

    def _apply(self, kept: Mapping[str, bytes], by: str) -> None:
        """Put what the store keeps into force here."""
        if kept == self._applied:
            return
        before, first = self._asked, self._applied is None
        asked = Asked(
            _read(kept.get("alpha"), Alpha, before.alpha, self._environment.alpha),
            _read(kept.get("strict"), Strict, before.strict, self._environment.strict),
        )
        self._asked, self._applied = asked, kept
        for scorer in self._scorers.values():
            scorer.ask(asked.alpha.value, asked.strict.value)
        self._metrics.alpha.set(asked.alpha.value)
        self._metrics.strict.set(asked.strict.value)
        if asked != before and not first:
            self._metrics.policy_changes.labels(by).inc()
        if asked != before:
            log.info(
                "policy_overrules_environment" if first else "policy_changed",
                by=by,
                alpha=asked.alpha.value,
                strict=asked.strict.value,
                alpha_before=before.alpha.value,
                strict_before=before.strict.value,
                false_alarms=asked.alpha.false_alarms or None,
            )

    def _checked(self, body: Mapping[str, Any]) -> dict[str, Alpha | Strict]:
        """The values that a request asks for. Raises BadParameter that names the field and the value."""
        for name in body:
            if name not in FIELDS:
                raise _bad(name[:64], body[name], f"'{name[:64]}' can't be changed; a policy has {', '.join(FIELDS)}")
        now = self._clock()
        changes: dict[str, Alpha | Strict] = {}
        if "false_alarms" in body:
            changes["alpha"] = self._in_words(body, now)
        elif "cadence_seconds" in body:
            raise _bad("cadence_seconds", body["cadence_seconds"], "cadence_seconds is for false_alarms, which is not there")
        elif "alpha" in body:
            changes["alpha"] = Alpha(_alpha(body["alpha"]), now)
        if "strict" in body:
            if not isinstance(body["strict"], bool):
                raise _bad("strict", body["strict"], f"strict is {shown(body['strict'])}; it is true or false")
            changes["strict"] = Strict(body["strict"], now)
        if not changes:
            raise BadParameter('Nothing to change: give alpha, or false_alarms ("1 per week") and cadence_seconds, or strict.', "alpha")
        return changes

    def _in_words(self, body: Mapping[str, Any], now: float) -> Alpha:
        words, cadence = body["false_alarms"], body.get("cadence_seconds", self._cadence)
        if "alpha" in body:
            raise _bad("alpha", body["alpha"], "alpha and false_alarms say the same thing: give one of them")
        if cadence is None and "cadence_seconds" not in body:
            raise BadParameter(
                "false_alarms needs cadence_seconds, the seconds between two events of a stream (ONSET_CADENCE_SECONDS is not set).",
                "cadence_seconds",
            )
        if not _is_number(cadence) or not 0 < cadence < math.inf:
            raise _bad("cadence_seconds", cadence, f"cadence_seconds is {shown(cadence)}; it is a number of seconds above 0")
        if not isinstance(words, str):
            raise _bad("false_alarms", words, f"false_alarms is {shown(words)}; it reads like '1 per week'")
        try:
            return Alpha(per_event(words, float(cadence)), now, words, float(cadence))
        except (ValueError, OverflowError) as error:
            raise _bad("false_alarms", words, f"false_alarms is {shown(words)}: {error}") from error

    async def _expectation(self, scorer: Scorer, asked: Asked) -> Expectation:
        alpha, stated = asked.alpha.value, asked.alpha.cadence_seconds or self._cadence
        count, rates, reason = await _pace(scorer)
        measured = len(rates) > 0
        events = float(np.mean(rates)) * DAY if measured else DAY / stated if stated else None
        if events is None:
            reason += " No cadence is configured either (ONSET_CADENCE_SECONDS)."
        each = alpha * events if events is not None else None
        policy = replace(scorer.policy, alpha=alpha, strict=asked.strict.value)
        return Expectation(
            cadence="measured" if measured else "configured" if stated else None,
            events_per_stream_and_day=_about(events),
            per_stream_and_day=_about(each),
            per_stream_and_week=_about(7 * each if each is not None else None),
            active_streams=count if measured else None,
            sampled_streams=len(rates),
            fleet_per_day=_about(count * each if measured and each is not None else None),
            extra_while_learning=policy.promise(scorer.detector.manifest.warmup)["extra_while_learning"],
            reason=reason or None,
            caution=_caution(alpha, scorer.detector.manifest.rarest),
        )


async def _pace(scorer: Scorer) -> tuple[int, np.ndarray[Any, np.dtype[np.float64]], str]:
    """Live streams, the events a second of some of them, and why there are none."""
    nothing = np.zeros(0)
    if not scorer.policy.silence:
        return 0, nothing, "How many streams are live is not followed while ONSET_SILENCE is off."
    try:
        count, rates = await scorer.streams.pace(SAMPLED)
    except StoreUnavailable as error:
        return 0, nothing, error.detail
    return count, rates, "" if len(rates) else "No live stream has shown its cadence yet; that takes some fifty events."


def _caution(alpha: float, rarest: float | None) -> str | None:
    if rarest is None or alpha >= rarest:
        return None
    return (
        f"The model was calibrated on too little to say what happens less often than {rarest:.2g} times an event: below it alpha is "
        "extrapolated, and false alarms may be several times as many."
    )


def _about(number: float | None) -> float | None:
    """Four digits: more than an expectation is worth."""
    return None if number is None else float(f"{number:.4g}")


def _read(kept: bytes | None, kind: type[Value], before: Value, environment: Value) -> Value:
    """A value of the store; the environment's where there is none, and the one before where it cannot be used."""
    if kept is None:
        return environment
    try:
        return msgspec.json.decode(kept, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        log.error("policy_unusable", field=kind.__name__.lower(), kept=kept[:256].decode(errors="replace"), error=str(error))
        return before


def _alpha(value: Any) -> float:
    if not _is_number(value) or not SMALLEST_ALPHA <= value < LARGEST_ALPHA:
        raise _bad("alpha", value, f"alpha is {shown(value)}; it is a number {ALPHA_RANGE}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _origin(value: Alpha | Strict) -> Provenance:
    return Provenance("environment" if value.changed_at is None else "run time", value.changed_at)


def _bad(field: str, value: Any, detail: str) -> BadParameter:
    return BadParameter(f"{detail}.", field, shown(value))
