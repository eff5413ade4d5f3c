"""The image's HEALTHCHECK: exit 0 when the service in this container answers 200 on /health/ready (or the path given), else 1.

The standard library alone: the image has no curl. http.client, not urllib: a proxy in the environment must not answer for the service.
"""

from __future__ import annotations

import http.client
import os
import sys


def answers(host: str, port: int, path: str) -> bool:
    """Whether GET http://host:port/path gives 200 within two seconds; anything else, refusal included, is no."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "/health/ready"
    raise SystemExit(not answers("127.0.0.1", int(os.environ.get("ONSET_PORT", "8080")), path))
