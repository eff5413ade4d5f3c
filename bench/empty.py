"""Baselines for `bench.http`: the same application with less and less behind its door.

    constant   the scorer answers every event with the same result: decoding, validation and encoding remain
    empty      a handler of Starlette's Request and Response, put before the router, reads the body and answers a constant: the server
               and the framework remain
    bare       the same in plain ASGI, where the service answers: the server remains

Started by `bench.http` as `python -m bench.empty constant|empty|bare`; the port comes from ONSET_PORT.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import EVENTS, Application, Door
from service.control import Alpha, Asked, Control, Strict
from service.events import Contributor, Event, Result
from service.intake import DoorLimits
from service.metrics import Metrics
from service.scorer import Scorer
from service.writing import Room, Unread, protocol

BODY = b'{"status":"ok"}'
HEADERS = [(b"content-length", b"%d" % len(BODY)), (b"content-type", b"application/json")]


class OneFeature:
    """All that the door asks of a detector while it takes readings."""

    features = 1


class ConstantScorer:
    """Answers at once, always the same."""

    detector = OneFeature()

    async def score(self, items: Sequence[Event], *, top_contributors: int, sender: str) -> list[Result]:
        return [ANSWER] * len(items)

    async def score_as_json(self, items: Sequence[Event], *, top_contributors: int, sender: str) -> tuple[list[msgspec.Raw], list[int]]:
        return [msgspec.Raw(msgspec.json.encode(ANSWER)) for _ in items], [0] * len(items)


class AlwaysHealthy:
    async def live(self) -> str | None:
        return None

    async def ready(self) -> str | None:
        return None


ANSWER = Result(
    stream_id="bench-000000",
    event_id=None,
    timestamp=1.7e9,
    anomaly_score=0.123456789,
    p_value=0.43456789,
    alert_score=0.0,
    is_anomaly=False,
    anomaly_grade=0.0,
    severity="none",
    confidence=0.5,
    threshold=1.0,
    alpha=0.001,
    direction="none",
    expected={"value": 20.123456789},
    lower={"value": 17.123456789},
    upper={"value": 23.123456789},
    contributors=[Contributor("value", 1.0, 20.5, 20.123456789)],
    anomaly_started_at=None,
    imputed=[],
    status="ready",
    samples_until_ready=0,
    model="default",
    model_version="1",
    state_version=1000,
    duplicate=False,
    late=False,
)


class EmptyDoor(Door):
    """Before the router, as the service's own route was before it became a bare one."""

    def add_to(self, app: Application) -> None:
        super().add_to(app)
        app.door = None
        app.add_middleware(_First)


class _First:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != EVENTS or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        await Request(scope, receive).body()
        response = Response(BODY, media_type="application/json")
        await response(scope, receive, send)


class BareDoor(Door):
    async def answer(self, scope: Scope, receive: Receive, send: Send, stream_id: str | None = None) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await send({"type": "http.response.body", "body": BODY})


DOORS = {"constant": Door, "empty": EmptyDoor, "bare": BareDoor}


def application(door: type[Door]) -> Application:
    app = Application()
    limits = DoorLimits(max_body_bytes=8 << 20, max_batch_events=10_000, max_inflight_bytes=64 << 20)
    scorers, metrics = {"default": cast(Scorer, ConstantScorer())}, Metrics()
    control = Control(Asked(Alpha(1e-3), Strict(False)), None, scorers, metrics)
    door(scorers, "default", limits, metrics, AlwaysHealthy(), control).add_to(app)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench.empty", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("baseline", choices=DOORS)
    baseline = parser.parse_args().baseline
    app = application(DOORS[baseline])
    ours = protocol(Unread(64 * 1024 * 1024, lambda: None, lambda: None), Room(1024, lambda: None))
    http: Any = "auto" if baseline == "empty" else ours  # uvicorn's own, or the service's
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["ONSET_PORT"]), http=http, log_level="warning", access_log=False)
