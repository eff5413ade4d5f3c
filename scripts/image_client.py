"""What image_test.sh asks a service on loopback, with the standard library alone.

`ready PORT SECONDS` · `not-ready PORT SECONDS` · `post PORT STREAM STATE_VERSION`
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(port: int, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST where there is a body. Status 0: nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with DIRECT.open(request, timeout=10) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except (urllib.error.URLError, OSError) as error:
        return 0, str(error)


def wait_for_ready(port: int, *, wanted: bool, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while ((answer := get(port, "/health/ready"))[0] == 200) is not wanted:
        if time.monotonic() > deadline:
            raise SystemExit(f"after {seconds} s /health/ready answers {answer}")
        time.sleep(0.02)


def post(port: int, stream_id: str, state_version: int) -> None:
    """Sends an event with every feature of the default model; its reply must be of that stream, with that version of its state."""
    _, listing = get(port, "/v1/models")
    (model,) = [model for model in listing["models"] if model["default"]]
    event = {"stream_id": stream_id, "values": {feature["name"]: 1.5 for feature in model["features"]}}
    status, reply = get(port, "/v1/events", event)
    if (status, reply.get("stream_id"), reply.get("state_version")) != (200, stream_id, state_version):
        raise SystemExit(f"{event} was answered with {status} {reply}")


if __name__ == "__main__":
    command, port = sys.argv[1], int(sys.argv[2])
    if command == "post":
        post(port, sys.argv[3], int(sys.argv[4]))
    else:
        wait_for_ready(port, wanted=command == "ready", seconds=float(sys.argv[3]))
