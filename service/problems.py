"""The one table error → HTTP status, and errors as problem details (RFC 9457)."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from service.errors import (
    AlertResolved,
    BadBody,
    BadEvent,
    BadParameter,
    CrossSite,
    FutureEvent,
    ItemError,
    NoMemory,
    NoReading,
    NotCommitted,
    OnsetError,
    Overloaded,
    StateConflict,
    StoreRefused,
    StoreUnavailable,
    Superseded,
    TooLarge,
    TooManyStreams,
    TooSlow,
    Unfinished,
    UnknownAlert,
    UnknownModel,
    UnknownMute,
    UnknownSource,
    UnknownStream,
    UnsupportedMedia,
)
from service.events import shown

MEDIA_TYPE = "application/problem+json"

# error: status, slug of the type, title, seconds to wait before trying again
TABLE: dict[type[OnsetError], tuple[int, str, str, int | None]] = {
    BadBody: (400, "bad-body", "The body cannot be read", None),
    BadEvent: (422, "bad-event", "An event has a field that cannot be used", None),
    NoReading: (200, "no-reading", "It holds no reading: passed over", None),
    FutureEvent: (409, "future-event", "Ahead of the service's clock", None),
    BadParameter: (422, "bad-parameter", "A parameter cannot be used", None),
    CrossSite: (403, "cross-site", "A page of another site asks for it", None),
    UnknownStream: (404, "unknown-stream", "No such stream", None),
    UnknownSource: (404, "unknown-source", "No such source", None),
    UnknownAlert: (404, "unknown-alert", "No such alert", None),
    UnknownMute: (404, "unknown-mute", "No such mute", None),
    AlertResolved: (409, "alert-resolved", "The alert is over", None),
    UnknownModel: (404, "unknown-model", "No such model", None),
    TooSlow: (408, "too-slow", "The body did not arrive in time", 1),
    Unfinished: (503, "too-slow", "The body did not arrive in time", 1),
    TooLarge: (413, "too-large", "Over a limit", None),
    UnsupportedMedia: (415, "unsupported-media", "A content type that is not read here", None),
    Overloaded: (429, "overloaded", "More than can be scored now", 1),
    NoMemory: (503, "no-memory", "No memory is left", 2),
    TooManyStreams: (429, "too-many-streams", "As many streams as allowed", 60),
    StateConflict: (503, "state-conflict", "Other replicas were faster", 1),
    NotCommitted: (503, "not-committed", "Broken off in the middle of the request", 1),
    StoreUnavailable: (503, "store-unavailable", "The store does not answer", 1),
    Superseded: (503, "model-superseded", "Another file of this model is in force", 1),
    StoreRefused: (503, "store-refused", "The store refuses to do it", 10),
}
LATE = (409, "late-event", "Older than the stream's last event")


class Problem(msgspec.Struct, omit_defaults=True):
    """Problem details; `field` is the path of what is to blame, `value` its value (JSON, shortened), `index` the place in a bulk."""

    type: str
    title: str
    status: int
    detail: str
    field: str = ""
    value: str = ""
    index: int | None = None
    late: bool = False
    retry_after: int | None = None


def problem_of(error: OnsetError, index: int | None = None) -> Problem:
    status, slug, title, retry_after = TABLE[type(error)]
    if isinstance(error, Overloaded):
        retry_after = error.retry_after
    field = error.field if isinstance(error, ItemError | BadParameter) else ""
    value = error.value if isinstance(error, ItemError | BadParameter) else ""
    return Problem(f"urn:onset:{slug}", title, status, _utf8(error.detail), _utf8(field), _utf8(value), index, retry_after=retry_after)


def late_problem(stream_id: str, sequence: int | None, timestamp: float | str, scored: int) -> Problem:
    """Of an event with this place in its stream, of which `scored` events were scored."""
    status, slug, title = LATE
    field, value = ("timestamp", shown(timestamp)) if sequence is None else ("sequence", str(sequence))
    detail = f"Stream '{stream_id}' is past {field} {value} ({scored} events scored): the event was counted as late and not scored."
    return Problem(f"urn:onset:{slug}", title, status, _utf8(detail), field, value, late=True)


def partly_written(what: str, detail: str) -> Problem:
    """Of a request some of whose lines, points or samples (`what`) are to be sent again."""
    return Problem("urn:onset:partly-written", f"Not all {what} were written", 503, _utf8(detail), retry_after=1)


def partly_refused(what: str, detail: str) -> Problem:
    """Of a request of which the others were taken."""
    return Problem("urn:onset:partly-refused", f"Some {what} can never be taken", 400, _utf8(detail))


def respond(problem: Problem) -> Response:
    headers = {"retry-after": str(problem.retry_after)} if problem.retry_after is not None else None
    return Response(msgspec.json.encode(problem), problem.status, headers, MEDIA_TYPE)


def plain(status: int, title: str, detail: str) -> Problem:
    """For what is no error of ours: an unknown address, a wrong method, a bug."""
    return Problem("about:blank", title, status, _utf8(detail))


def _utf8(text: str) -> str:
    """The text with halves of characters (a JSON string may hold them, UTF-8 not) written as escapes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
