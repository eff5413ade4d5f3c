"""Arrow IPC streams ⇄ columns of events and of results. Needs the extra `arrow`; nothing else of the service does.

    stream_id    utf8, or dictionary of it           timestamp   timestamp (without a zone: UTC), or a number: seconds since 1970
    event_id     the same                            sequence    integers
    message      the same: a log line                end         booleans: the session ends here
    any other    numbers: the feature of that name; `values.NAME` where a feature has one of the names above. null = missing

A body is looked through before Arrow unpacks it: so many messages, rows and unpacked bytes are all it may bring. Every batch is
then validated in full, since its buffers come from anyone.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.bodies import checked
from service.errors import BadBody, BadEvent, ItemError, TooLarge, UnsupportedMedia
from service.events import MAX_MESSAGE_LENGTH, MAX_NAME_LENGTH, PER_SECOND, SEVERITIES, Columns, Result
from service.features import parse_timestamp
from service.policy import DIRECTIONS, THRESHOLD
from service.problems import problem_of
from service.results import STATUSES, Scored
from service.rounds import Kind

MAX_COLUMNS = 1000
MAX_MESSAGES = 300
"""Batches, and dictionaries for them."""
PREFIX = "values."
PANDAS_INDEX = "__index_level_"
"""What pandas calls an index without a name, such as the row numbers that a filtered table keeps."""
_FILES = {b"ARROW1": "an Arrow file (Feather)", b"PAR1": "a Parquet file"}
MAX_SEQUENCE = 2**63 - 1

_OWN = ("stream_id", "event_id", "timestamp", "sequence", "message", "end")
_READING = tuple(name for name in Result.__struct_fields__ if name != "line")
"""Fields of a reply to a sensor model's events."""


def pyarrow() -> ModuleType:
    """Arrow itself, which is optional. Raises UnsupportedMedia that says what to install."""
    try:
        import pyarrow  # noqa: PLC0415  optional: extra `arrow`
        import pyarrow.compute  # noqa: PLC0415
        import pyarrow.ipc  # noqa: PLC0415
    except ImportError as error:
        raise UnsupportedMedia("Arrow needs the extra 'arrow' where the service runs: pip install 'onset[arrow]'.") from error
    return pyarrow  # type: ignore[no-any-return]


# ── Events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def decode(content: bytes, *, max_events: int, max_bytes: int) -> Columns:
    """The events of a body. Raises BadBody, TooLarge, BadEvent for a column that cannot be used, UnsupportedMedia without Arrow."""
    pa = pyarrow()
    file = next((what for mark, what in _FILES.items() if content.startswith(mark)), None)
    if file is not None:
        raise BadBody(f"The body is {file}; send an Arrow IPC stream (pyarrow.ipc.new_stream, Polars' write_ipc_stream).")
    try:
        _look_through(content, pa, max_events, max_bytes)
        with pa.ipc.open_stream(content, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
            names = _names(reader.schema)
            table = reader.read_all()
        table.validate(full=True)
        return _columns(table, names, pa, max_bytes)
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        raise BadBody(f"The body is not an Arrow IPC stream: {str(error)[:256]}.") from error


def _look_through(content: bytes, pa: ModuleType, max_events: int, max_bytes: int) -> None:
    """Refuse what would be too much once it is unpacked. Raises TooLarge, BadBody."""
    source = pa.BufferReader(content)
    rows = unpacked = 0
    for count, message in enumerate(_messages(source, pa)):
        if count > MAX_MESSAGES:
            raise TooLarge(f"More than {MAX_MESSAGES} batches and dictionaries in one body: send fewer, larger ones.")
        if message.type not in ("dictionary", "record batch"):
            continue
        batch = _Batch(message)
        rows += batch.rows if message.type == "record batch" else 0
        if rows > max_events:
            raise TooLarge(f"More than {max_events} events in one request (ONSET_MAX_BATCH_EVENTS): send them in parts.")
        unpacked += batch.unpacked_bytes()
        if unpacked > max_bytes:
            raise TooLarge(f"The body is over {max_bytes} bytes when unpacked (ONSET_MAX_BODY_BYTES).")
    if source.tell() < len(content):
        raise BadBody(f"{len(content) - source.tell()} bytes follow the end of the Arrow stream.")


def _messages(source: Any, pa: ModuleType) -> Iterator[Any]:
    reader = pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


class _Batch:
    """What the metadata of a batch or a dictionary says, read as format/Message.fbs lays it out; Arrow has verified the message."""

    def __init__(self, message: Any) -> None:
        self._data, self._body = memoryview(message.metadata), memoryview(message.body)
        header = self._table(self._field(self._u32(0), 2))
        self._at = self._table(self._field(header, 1)) if message.type == "dictionary" else header
        at = self._field(self._at, 0)
        self.rows: int = struct.unpack_from("<q", self._data, at)[0] if at else 0

    def unpacked_bytes(self) -> int:
        """Of compressed buffers, of which each begins with its size; the others are parts of the body as they are."""
        vector = self._field(self._at, 2)
        if not vector or not self._field(self._at, 3):
            return 0
        vector += self._u32(vector)
        count = self._u32(vector)
        if count > 4 * MAX_COLUMNS:
            raise BadBody(f"A batch of {count} buffers: more than {MAX_COLUMNS} columns have.")
        total = 0
        for offset, length in struct.iter_unpack("<qq", self._data[vector + 4 : vector + 4 + 16 * count]):
            total += max(0, struct.unpack_from("<q", self._body, offset)[0]) if length >= 8 and offset >= 0 else 0
        return total

    def _u32(self, at: int) -> int:
        return int(struct.unpack_from("<I", self._data, at)[0])

    def _table(self, at: int) -> int:
        """Where the table begins that the field at `at` refers to."""
        return at + self._u32(at)

    def _field(self, table: int, slot: int) -> int:
        """Where a field of a table lies, 0 = it has its default."""
        vtable = table - struct.unpack_from("<i", self._data, table)[0]
        size, _ = struct.unpack_from("<HH", self._data, vtable)
        offset = struct.unpack_from("<H", self._data, vtable + 4 + 2 * slot)[0] if 4 + 2 * slot < size else 0
        return table + offset if offset else 0


def _names(schema: Any) -> list[str]:
    """The columns' names, each once. Raises BadEvent, TooLarge."""
    names: list[str] = schema.names
    if len(names) > MAX_COLUMNS:
        raise TooLarge(f"{len(names)} columns in one body; there may be {MAX_COLUMNS}.")
    features = [name for name in names if name not in _OWN]
    keys = [name for name in names if name in _OWN] + [PREFIX + name.removeprefix(PREFIX) for name in features]
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None) if len(set(keys)) < len(keys) else None
    if twice is not None:
        raise BadEvent(f"Column '{twice[:64]}' is there twice.", twice[:64])
    long = next((name for name in features if not 0 < len(name.removeprefix(PREFIX)) <= MAX_NAME_LENGTH), None)
    if long is not None:
        raise BadEvent(f"A feature's name has 1 to {MAX_NAME_LENGTH} characters, this one {len(long)}.", long[:64])
    index = next((name for name in features if name.startswith(PANDAS_INDEX)), None)
    if index is not None:
        raise BadEvent(f"Column '{index[:64]}' is pandas' index: leave it out (preserve_index=False), or give it a name.", index[:64])
    return names


def _columns(table: Any, names: list[str], pa: ModuleType, max_bytes: int) -> Columns:
    N = table.num_rows
    column = {name: table.column(i) for i, name in enumerate(names)}
    nothing: list[str | None] = [None] * N
    stream_ids, event_ids = (_texts(name, column[name], pa, max_bytes) if name in column else nothing for name in _OWN[:2])
    timestamp, wrong = _times(column["timestamp"], pa) if "timestamp" in column else (np.full(N, np.nan), np.zeros(N, np.bool_))
    sequence, beyond = _sequence(column["sequence"], pa) if "sequence" in column else (np.full(N, -1), np.zeros(N, np.bool_))
    wrong = wrong | beyond
    values, blamed = {}, np.full(N, -1)  # the first feature of a row that is no number
    for j, name in enumerate(names):
        if name not in _OWN:
            values[name.removeprefix(PREFIX)], infinite = _numbers(name, column[name], pa)
            wrong |= infinite
            blamed[infinite & (blamed < 0)] = j
    messages = _texts("message", column["message"], pa, max_bytes) if "message" in column else None
    if messages is not None:
        wrong |= np.array([text is not None and len(text) > MAX_MESSAGE_LENGTH for text in messages], np.bool_)
    ends = _ends(column["end"], pa) if "end" in column else None
    for texts in (stream_ids, event_ids):
        if not all(texts) or max(map(len, texts), default=0) > MAX_NAME_LENGTH:  # type: ignore[arg-type]
            wrong |= np.array([text is not None and not 0 < len(text) <= MAX_NAME_LENGTH for text in texts], np.bool_)
    features = [names[j] if j >= 0 else None for j in blamed[wrong].tolist()]
    judged = ((i, _error(column, i, feature, pa)) for i, feature in zip(np.flatnonzero(wrong).tolist(), features, strict=True))
    bad: dict[int, ItemError] = {i: error for i, error in judged if error is not None}
    return Columns(stream_ids, event_ids, values, timestamp, sequence, bad, messages=messages, ends=ends)


def _error(column: dict[str, Any], i: int, feature: str | None, pa: ModuleType) -> BadEvent | None:
    """What is wrong with a row, found and said as for any other event; of its features this one is looked at."""
    own = {name: column[name][i].as_py() for name in _OWN if name in column and name not in ("timestamp", "end")}
    time = column["timestamp"][i].as_py() if "timestamp" in column and pa.types.is_floating(column["timestamp"].type) else None
    values = {} if feature is None else {feature.removeprefix(PREFIX): _numbers(feature, column[feature].slice(i, 1), pa)[0].item()}
    try:
        checked({**own, "values": values})
        if time is not None and not math.isfinite(time):
            parse_timestamp(time)
    except BadEvent as error:
        return error
    return None


def _texts(name: str, column: Any, pa: ModuleType, max_bytes: int) -> list[str | None]:
    """One string for each row; equal ones of a dictionary are one object. Raises TooLarge: any number of rows may have the same one."""
    texts: list[str | None] = []
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type) and pa.types.is_string_view(chunk.type.value_type):
            everything = _plain_texts(name, chunk.dictionary, pa, max_bytes)  # Arrow cannot take from views
            texts += [None if i is None else everything[i] for i in chunk.indices.to_pylist()]
        elif pa.types.is_dictionary(chunk.type):
            used = pa.compute.unique(chunk.indices)
            words = dict(zip(used.to_pylist(), _plain_texts(name, chunk.dictionary.take(used), pa, max_bytes), strict=True))
            texts += [words[i] for i in chunk.indices.to_pylist()]
        else:
            texts += _plain_texts(name, chunk, pa, max_bytes)
    if sum(len(text) for text in texts if text) > max_bytes:
        raise _too_long(name, max_bytes)
    return texts


def _too_long(name: str, max_bytes: int) -> TooLarge:
    return TooLarge(f"Column '{name}' is over {max_bytes} bytes when unpacked (ONSET_MAX_BODY_BYTES).")


def _plain_texts(name: str, array: Any, pa: ModuleType, max_bytes: int) -> list[str | None]:
    kind = array.type
    if pa.types.is_string_view(kind):  # any number of rows may show the same bytes
        views = array.buffers()[1]
        lengths = np.frombuffer(views, "<i4", 4 * (array.offset + len(array)))[4 * array.offset :: 4]
        if int(lengths.sum(dtype=np.int64)) > max_bytes:
            raise _too_long(name, max_bytes)
    elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise BadEvent(f"Column '{name}' holds {kind}; it is one of utf8, or a dictionary of it.", name, str(kind)[:64])
    texts: list[str | None] = array.to_pylist()
    return texts


def _ends(column: Any, pa: ModuleType) -> NDArray[np.bool_]:
    kind = column.type
    if not (pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise BadEvent(f"Column 'end' holds {str(kind)[:64]}; it is one of booleans.", "end", str(kind)[:64])
    ends: NDArray[np.bool_] = column.cast(pa.bool_()).fill_null(False).to_numpy()
    return ends


def _times(column: Any, pa: ModuleType) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """[N] seconds since 1970, NaN = none; and [N] where a value was sent that is no time."""
    kind = column.type
    if not pa.types.is_timestamp(kind):
        return _numbers("timestamp", column, pa, "a timestamp, or a number of seconds since 1970")
    ticks = column.cast(pa.int64())
    present = ticks.is_valid().to_numpy()
    count, whole = ticks.fill_null(0).to_numpy(), PER_SECOND[kind.unit]
    # A nanosecond count has more digits than a float; all others divide as datetime does.
    seconds = count // whole + count % whole / whole if kind.unit == "ns" else count / whole
    return np.where(present, seconds, np.nan), np.zeros(len(column), np.bool_)


def _numbers(name: str, column: Any, pa: ModuleType, what: str = "numbers") -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """[N] floats, NaN = missing; and [N] where a value was sent that is no number."""
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan), np.zeros(len(column), np.bool_)
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise BadEvent(f"Column '{name[:64]}' holds {str(kind)[:64]}; it is one of {what}.", name[:64], str(kind)[:64])
    numbers = column.to_numpy().astype(np.float64)
    return numbers, ~np.isfinite(numbers) & column.is_valid().to_numpy()


def _sequence(column: Any, pa: ModuleType) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[N] integers, -1 = none; and [N] where one is out of range."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise BadEvent(f"Column 'sequence' holds {str(kind)[:64]}; it is one of integers.", "sequence", str(kind)[:64])
    if pa.types.is_null(kind):
        return np.full(len(column), -1), np.zeros(len(column), np.bool_)
    present, numbers = column.is_valid().to_numpy(), column.fill_null(0).to_numpy()
    wrong = present & ((numbers < 0) | (numbers > MAX_SEQUENCE))
    return np.where(present & ~wrong, numbers, 0).astype(np.int64) - ~(present & ~wrong), wrong


# ── Results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode(scored: Scored, names: Sequence[str], model: tuple[str, str], rows: int, *, top_contributors: int) -> bytes:
    """The answers to `rows` events that came as columns: a column for each field of a result, and `problem`."""
    pa = pyarrow()
    scores = scored.scores
    M = len(scores.kinds)
    by_name = {
        "stream_id": pa.array(scored.stream_ids, pa.utf8()),
        "event_id": pa.array(scored.event_ids, pa.utf8()),
        "timestamp": pa.array(scored.timestamp),
        "threshold": pa.array(np.full(M, THRESHOLD)),
        "severity": _coded(scores.severity, SEVERITIES, pa),
        "direction": _coded(scores.direction, DIRECTIONS, pa),
        "status": _coded(scores.status, STATUSES, pa),
        **{name: _by_feature(getattr(scores, name), names, scores.has, pa) for name in ("expected", "lower", "upper")},
        "contributors": _contributors(scored, names, top_contributors, pa),
        "imputed": _imputed(scored, names, pa),
        "model": _coded(np.zeros(M, np.int8), model[:1], pa),
        "model_version": _coded(np.zeros(M, np.int8), model[1:], pa),
        "state_version": pa.array(scores.state_version.astype(np.int64)),
        "duplicate": pa.array((scores.kinds == Kind.DUPLICATE) | (scores.kinds == Kind.REPEATED)),
        "late": pa.array(scores.kinds == Kind.LATE),
        "silent_since": pa.nulls(M, pa.float64()),
    }
    for field in schema(names, pa):
        if field.name not in by_name and field.name != "problem":
            column = getattr(scores, field.name)
            by_name[field.name] = pa.array(column, from_pandas=column.dtype.kind == "f")
    table = pa.table([by_name[name] for name in _READING], schema=schema(names, pa).remove(len(by_name)))
    problems: list[Any] = [None] * rows
    if len(scored.errors) > 0 or rows > M:
        place = np.full(rows, -1)
        place[scored.places] = np.arange(M)
        for row, error in scored.errors.items():
            place[row], problems[row] = -1, _problem(error)
        table = table.take(pa.array(place, mask=place < 0))
    return _written(table.append_column(schema(names, pa).field("problem"), pa.array(problems, _problem_type(pa))), pa)


def encode_rows(answers: Sequence[Result | ItemError], names: Sequence[str], *, lines: bool) -> bytes:
    """The same for answers that are at hand one by one; `lines` = of a log model, whose `expected` are patterns."""
    pa = pyarrow()
    rows = [{"problem": _problem(answer)} if isinstance(answer, ItemError) else _row(answer) for answer in answers]
    return _written(pa.Table.from_pylist(rows, line_schema(names, pa) if lines else schema(names, pa)), pa)


def line_schema(names: Sequence[str], pa: ModuleType) -> Any:
    """Of the reply to a log model's events."""
    of_sensors = schema(names[1:], pa)
    text = pa.utf8()
    line = pa.struct([("message", text), ("template", text), ("new", pa.bool_()), ("before", pa.list_(text))])
    own = {"expected": pa.map_(text, pa.float64()), "contributors": schema(names, pa).field("contributors").type}
    fields = [(field.name, own.get(field.name, field.type)) for field in of_sensors]
    return pa.schema([*fields[:-1], ("line", line), fields[-1]])


def schema(names: Sequence[str], pa: ModuleType) -> Any:
    """The reply's: fields named as in the other formats. A refused event's row holds `problem` alone."""
    word = pa.dictionary(pa.int8(), pa.utf8())
    feature = pa.dictionary(pa.int16(), pa.utf8())
    by_feature = pa.struct([(name, pa.float64()) for name in names])
    part = pa.struct([("feature", feature), ("contribution", pa.float64()), ("actual", pa.float64()), ("expected", pa.float64())])
    types = {
        "stream_id": pa.utf8(),
        "event_id": pa.utf8(),
        **dict.fromkeys(("is_anomaly", "duplicate", "late"), pa.bool_()),
        **dict.fromkeys(("severity", "direction", "status", "model", "model_version"), word),
        **dict.fromkeys(("expected", "lower", "upper"), by_feature),
        "contributors": pa.list_(part),
        "imputed": pa.list_(feature),
        **dict.fromkeys(("samples_until_ready", "state_version"), pa.int64()),
        "problem": _problem_type(pa),
    }
    return pa.schema([(name, types.get(name, pa.float64())) for name in (*_READING, "problem")])


def _problem_type(pa: ModuleType) -> Any:
    texts = [(name, pa.utf8()) for name in ("type", "title", "detail", "field", "value")]
    return pa.struct([*texts, ("status", pa.int16()), ("retry_after", pa.int32())])


def _problem(error: ItemError) -> dict[str, Any]:
    problem = problem_of(error)
    return {name: getattr(problem, name) for name in ("type", "title", "detail", "field", "value", "status", "retry_after")}


def _row(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(result)
    row["timestamp"] = parse_timestamp(result.timestamp)
    if result.line:
        row["expected"] = list(result.expected.items())
    return {name: value if value != {} else None for name, value in row.items()}


def _coded(codes: NDArray[np.int8], words: Sequence[str], pa: ModuleType) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(words, pa.utf8()))


def _by_feature(values: NDArray[np.float32], names: Sequence[str], has: NDArray[np.bool_], pa: ModuleType) -> Any:
    columns = [pa.array(values[:, j].astype(np.float64), from_pandas=True) for j in range(len(names))]
    return pa.StructArray.from_arrays(columns, list(names), mask=pa.array(~has))


def _contributors(scored: Scored, names: Sequence[str], top: int, pa: ModuleType) -> Any:
    """For each event, of the `top` greatest contributors, those that were not missing, or contribute by that."""
    scores = scored.scores
    order = np.argsort(-scores.contribution, axis=1, kind="stable")[:, :top]
    x, expected, contribution = (np.take_along_axis(v, order, axis=1) for v in (scores.x, scores.expected, scores.contribution))
    kept = (~np.isnan(x) | (contribution > 0)) & scores.has[:, None]
    numbers = [pa.array(v[kept].astype(np.float64), from_pandas=True) for v in (contribution, x, expected)]
    feature = pa.DictionaryArray.from_arrays(pa.array(order[kept].astype(np.int16)), pa.array(names, pa.utf8()))
    parts = pa.StructArray.from_arrays([feature, *numbers], ["feature", "contribution", "actual", "expected"])
    return pa.ListArray.from_arrays(_offsets(kept), parts)


def _imputed(scored: Scored, names: Sequence[str], pa: ModuleType) -> Any:
    missing = np.isnan(scored.scores.x) & scored.scores.has[:, None]
    codes = np.broadcast_to(np.arange(len(names), dtype=np.int16), missing.shape)[missing]
    return pa.ListArray.from_arrays(_offsets(missing), pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.utf8())))


def _offsets(chosen: NDArray[np.bool_]) -> NDArray[np.int32]:
    ends: NDArray[np.int32] = np.cumsum(chosen.sum(axis=1), dtype=np.int32)
    return np.concatenate([np.zeros(1, np.int32), ends])


def _written(table: Any, pa: ModuleType) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    content: bytes = sink.getvalue().to_pybytes()
    return content
