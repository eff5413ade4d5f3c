"""Alerts to a webhook, signed as Standard Webhooks are (https://www.standardwebhooks.com), so that any of its libraries verifies them.

POST url
webhook-id: 1795666197638-0           the same whenever the notice is sent again
webhook-timestamp: 1795666198         of this attempt, seconds since 1970
webhook-signature: v1,BASE64          HMAC-SHA256 of "ID.TIMESTAMP.BODY"

2xx           taken
408 429 5xx   again, with back-off (after Retry-After, where there is one); so is no answer
others        never again: a dead letter
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable

import httpx
import msgspec

from service.errors import BadSetting
from service.sinks.posting import TIMEOUT_SECONDS, post, retry_after
from service.sinks.teller import Notice, Refused, Unreachable

ENCODED = "whsec_"
LEAST_SECRET = 16
"""Bytes."""
AGAIN = frozenset({408, 429})
LONGEST_RETRY_AFTER = 300.0


class Webhook:
    """Implements Sink. `secret` is text, or base64 behind whsec_; empty = the requests are not signed."""

    name = "webhook"

    def __init__(self, url: str, secret: str, clock: Callable[[], float] = time.time, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Raises BadSetting for a secret that cannot be used."""
        self._url, self._clock, self._timeout = url, clock, timeout
        self._key = key_of(secret) if secret else b""
        self._client = httpx.AsyncClient(timeout=timeout, follow_redirects=False)

    async def tell(self, notice: Notice) -> None:
        body = msgspec.json.encode(notice)
        answer = await post(self._client, "The webhook", self._url, body, self._headers(notice.id, body), self._timeout)
        if answer.taken:
            return
        detail = f"The webhook answered {answer.status}: {answer.said}"
        if answer.status in AGAIN or answer.status >= 500:
            raise Unreachable(detail, retry_after(answer.retry_after, self._clock(), LONGEST_RETRY_AFTER))
        raise Refused(detail)

    async def close(self) -> None:
        await self._client.aclose()

    def _headers(self, id_: str, body: bytes) -> dict[str, str]:
        seconds = str(int(self._clock()))
        headers = {"content-type": "application/json", "user-agent": "onset", "webhook-id": id_, "webhook-timestamp": seconds}
        if self._key:
            headers["webhook-signature"] = signature(self._key, id_, seconds, body)
        return headers


def key_of(secret: str) -> bytes:
    """The key that a secret means. Raises BadSetting."""
    key = secret.encode()
    if secret.startswith(ENCODED):
        try:
            key = base64.b64decode(secret.removeprefix(ENCODED), validate=True)
        except ValueError as error:
            raise BadSetting(f"ONSET_ALERTS_WEBHOOK_SECRET begins with {ENCODED} and is no base64 after that.") from error
    if len(key) < LEAST_SECRET:
        raise BadSetting(f"ONSET_ALERTS_WEBHOOK_SECRET has {len(key)} bytes; it needs {LEAST_SECRET} at least.")
    return key


def signature(key: bytes, id_: str, seconds: str, body: bytes) -> str:
    signed = hmac.new(key, f"{id_}.{seconds}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(signed.digest()).decode()}"
