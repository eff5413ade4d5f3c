"""Two baselines for `bench.http`: the same application with less and less behind its door.

    constant   the scorer answers every event with the same result: decoding, validation and encoding remain
    empty      the handler reads the body and answers a constant: the server and the framework remain

Started by `bench.http` as `python -m bench.empty constant|empty`; the port comes from ONSET_PORT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import cast

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from service.api import Door, DoorLimits
from service.control import Alpha, Asked, Control, Strict
from service.events import Contributor, Event, Result
from service.metrics import Metrics
from service.scorer import Scorer

BODY = b'{"status":"ok"}'


class ConstantScorer:
    """Answers at once, always the same."""

    async def score(self, items: Sequence[Event], *, top_contributors: int, sender: str) -> list[Result]:
        return [ANSWER] * len(items)


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
    async def post_events(self, request: Request) -> Response:
        await request.body()
        return Response(BODY, media_type="application/json")


def application(door: type[Door]) -> FastAPI:
    app = FastAPI()
    limits = DoorLimits(max_body_bytes=8 << 20, max_batch_events=10_000, max_inflight_bytes=64 << 20)
    scorers, metrics = {"default": cast(Scorer, ConstantScorer())}, Metrics()
    control = Control(Asked(Alpha(1e-3), Strict(False)), None, scorers, metrics)
    door(scorers, "default", limits, metrics, AlwaysHealthy(), control).add_to(app)
    return app


if __name__ == "__main__":
    app = application({"constant": Door, "empty": EmptyDoor}[sys.argv[1]])
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["ONSET_PORT"]), log_level="warning", access_log=False)
