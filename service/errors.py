"""Everything that can go wrong, in one tree. The door alone knows HTTP; here an error only says what happened and to which field.

OnsetError
├── BadSetting           a setting has a value that turns out to be unusable
├── ArtifactError        a model file that is not what it says, or answers differently from what it says
├── TableError           a file of rows that cannot be read as a stream
├── NotWritten           a file that a command makes cannot be written
├── ItemError            one event is refused; its neighbours in the batch are not
│   ├── BadEvent             a field has a value we cannot use
│   │   ├── NoReading            it is declared to be none: the event is passed over
│   │   └── FutureEvent          ahead of our clock: it would make every later event late
│   ├── StateConflict        other replicas won the race for this stream three times in a row
│   ├── TooManyStreams       the store has no room for another stream
│   └── NotCommitted         the store, or the file in force, was gone in the middle of a long request
├── UnknownStream        no state is kept under this id
├── UnknownSource        no source of kind http has this name
├── UnknownAlert         no alert has this id, or it was forgotten
├── UnknownMute          no mute has this name
├── AlertResolved        it is over: nobody needs to look after it
├── UnknownModel         no detector of this name is loaded
├── BadBody              a body whose items cannot even be told apart
├── BadParameter         a parameter of a request has a value we cannot use
├── CrossSite            a browser asks for it on behalf of a page that is not ours
├── UnsupportedMedia     a content type or encoding we do not read
├── TooLarge             a body or a batch is over a stated limit
├── TooSlow              a body did not arrive in time
│   └── Unfinished           and its sender would drop it, were it not told to send it again
├── Overloaded           the queue is full: come back in `retry_after` seconds
├── NoMemory             this machine gives the process no more memory, or threads
├── Fenced               a partition of a queue is another replica's by now
└── StoreUnavailable     the state store does not answer
    ├── StoreRefused     it answers, and refuses until somebody changes it
    └── Superseded       it has this model's claim for another file, which was started later
"""

from __future__ import annotations


class OnsetError(Exception):
    """Base of all errors raised on purpose. `detail` is a sentence that names the offending value."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class BadSetting(OnsetError):
    """A setting has a value that turns out to be unusable when the service starts."""


class ArtifactError(OnsetError):
    """A model file is refused: wrong format, wrong hash, or other answers than its self-test vectors."""


class TableError(OnsetError):
    """A file of rows is refused: what it lacks, or the column, row and value that cannot be used."""


class NotWritten(OnsetError):
    """A file that a command makes cannot be written: which one, why, and what helps."""


class ItemError(OnsetError):
    """One event of a batch failed. `field` is the path of the field to blame ('' when none is), `value` its value, shortened."""

    def __init__(self, detail: str, field: str = "", value: str = "") -> None:
        super().__init__(detail)
        self.field = field
        self.value = value


class BadEvent(ItemError):
    """A field of an event has a value we cannot use."""


class NoReading(BadEvent):
    """What an event has of readings is declared to be none: it is passed over."""


class FutureEvent(BadEvent):
    """The event's time is further ahead of our clock than allowed."""


class StateConflict(ItemError):
    """Another replica committed first, three times in a row."""


class TooManyStreams(ItemError):
    """A new stream was refused because the store holds as many as the limit allows, or is nearly full."""


class NotCommitted(ItemError):
    """The store stopped answering, or another file came into force, when earlier ones of the same request were committed: send it again."""


class UnknownStream(OnsetError):
    """No state is kept under this stream id."""


class UnknownSource(OnsetError):
    """No source of kind http is declared under this name."""


class UnknownAlert(OnsetError):
    """No alert has this id, or it was resolved so long ago that it is forgotten."""


class UnknownMute(OnsetError):
    """No mute has this name, or it was over so long ago that it is forgotten."""


class AlertResolved(OnsetError):
    """The alert is over: it cannot be acknowledged any more."""


class UnknownModel(OnsetError):
    """No detector of this name is loaded."""


class BadBody(OnsetError):
    """A body that cannot be split into items."""


class BadParameter(OnsetError):
    """A parameter of a request has a value we cannot use; `field` is its name, `value` its value, shortened."""

    def __init__(self, detail: str, field: str, value: str = "") -> None:
        super().__init__(detail)
        self.field = field
        self.value = value


class CrossSite(OnsetError):
    """A browser asks for it on behalf of a page that is not ours."""


class UnsupportedMedia(OnsetError):
    """A content type or encoding we do not read."""


class TooLarge(OnsetError):
    """A body, a batch or a name is over a stated limit."""


class TooSlow(OnsetError):
    """A body did not arrive in time."""


class Unfinished(TooSlow):
    """A body did not arrive in time; its sender drops what it is answered 4xx for, so it is to send it again."""


class Overloaded(OnsetError):
    """The queue is full. `retry_after` is in seconds."""

    def __init__(self, detail: str, retry_after: int = 1) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class NoMemory(OnsetError):
    """This machine gives the process no more memory, or threads: what was to be done with it may be done later, or elsewhere."""


def no_memory(error: Exception) -> NoMemory | None:
    """That is what this error is, and no bug; None = it is another one."""
    if isinstance(error, NoMemory):
        return error
    threads = isinstance(error, RuntimeError) and "can't start new thread" in str(error)  # at a limit of processes, such as a container's
    if not (threads or isinstance(error, MemoryError)):
        return None
    return NoMemory(f"This machine gives the service no more {'threads' if threads else 'memory'} now: send it again.")


class Fenced(OnsetError):
    """A partition of a queue is another replica's by now: what was read of it is scored there."""


class StoreUnavailable(OnsetError):
    """The state store does not answer; nothing is known to be committed."""


class Superseded(StoreUnavailable):
    """Another file of this model is in force (claims.py): nothing may be scored here. Other replicas answer the event sent again."""


class StoreRefused(StoreUnavailable):
    """The state store refuses: full memory, a right or a password that is not given. `detail` says what helps; events are to be kept."""
