"""Messages → events, as declared once for all kinds of sources (sources/options.py): which field is the stream, the time, a value.

    format       what the payload is written in; `cloudevents`: the event's data is the payload, its attributes are `ce.…`; `influx`:
                 each line is one (lineprotocol.py); `text`: it is a log line, whatever it holds
    plain        with nothing declared a message is one event or several as POST /v1/events takes them, decoded in one go
    mapped       each item of the payload by itself: references are resolved, and the event is checked like any other
    each         an item has events within, in a list, or as the members of an object: each of them by itself

What cannot be mapped is told by field and value; its neighbours in the same message are not touched.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from service.bodies import Format, as_float, checked, decode, decode_one, decode_plain, from_fields, to_number
from service.errors import BadBody, BadEvent, ItemError, NoReading, OnsetError, TooLarge
from service.events import MAX_NAME_LENGTH, PER_SECOND, Event, shown
from service.features import COUNTED_SECONDS, of_another_unit
from service.lineprotocol import decode as decode_lines
from service.sources import MAX_EVENTS, POSITIONS, Message
from service.sources.options import Payload
from service.sources.templates import Pattern, Template

Items = Sequence[Event | ItemError]

_FORMATS = {"json": Format.JSON, "ndjson": Format.NDJSON, "msgpack": Format.MSGPACK, "cloudevents": Format.JSON}
_UNITS = {"ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_EARLIEST = {unit: COUNTED_SECONDS * PER_SECOND[unit] for unit in _UNITS}
_PREFIXES = (b"ce_", b"ce-", b"cloudEvents_", b"cloudEvents:", b"")
"""Of a CloudEvent's attributes in Kafka, NATS, AMQP (two ways) and MQTT."""
_CONTENT_TYPES = (b"content-type", b"Content-Type", b"content_type")
_OWN = ("stream_id", "timestamp", "values", "event_id", "sequence", "message", "end")
_ENDS = {True: True, "true": True, "1": True, False: False, "false": False, "0": False, "": False, None: False}
_TRUTHS = {"true": 1, "false": 0}
_NEXT_LINE = re.compile(rb"[^\s\[,:]\s*\n\{")
"""An object that begins a line and is no part of what stands before it: there would be a bracket, a comma or a colon."""
_MISSING: Any = object()


@dataclass(frozen=True)
class _Item:
    """What references of one event are resolved in."""

    payload: Any
    message: Message
    levels: Mapping[str, str]
    """Named parts of the topic."""
    attributes: Mapping[str, Any]
    """Of a CloudEvent."""
    whole: Any = _MISSING
    """The payload that this one is a part of."""


Reader = Callable[[_Item], Any]
"""The value of a reference, or _MISSING."""


class Mapper:
    """Reads events from the messages of one source. `max_events` is of one message."""

    def __init__(self, payload: Payload, *, max_events: int) -> None:
        self._nested = [(place, None if place == "." else _path(place)) for place in payload.nested]
        self._payload, self._read = payload, self._plain if payload.plain else self._mapped
        self._max_events = min(max_events, MAX_EVENTS)
        self._format = _FORMATS.get(payload.format, Format.JSON)
        self._pattern = Pattern(payload.topic) if payload.topic else None
        self._stream_id = self._template("stream_id", payload.stream_id)
        self._event_id = self._template("event_id", payload.event_id)
        self._timestamp = self._optional("timestamp", payload.timestamp)
        self._sequence = self._optional("sequence", payload.sequence)
        self._values = self._values_of(payload.values)
        self._missing = {_comparable(word) for word in payload.missing}
        self._good = [
            (reference, self._reader(reference), {_comparable(word) for word in (words if isinstance(words, tuple) else (words,))})
            for reference, words in payload.good.items()
        ]
        self._message = self._template("message", payload.message)
        self._end = self._reader(payload.end) if payload.end else None
        self._own = {name: self._reader(name) for name in _OWN}
        if payload.format == "influx":  # the line's, which need not have one
            self._own["timestamp"] = self._reader("payload.timestamp")

    def events(self, message: Message) -> tuple[Items, bool]:
        """The events of a message, or what is wrong with each; and whether it is one bare event. Raises OnsetError: nothing can be used."""
        if message.position >= POSITIONS:
            raise BadEvent(f"The entry's id {message.id.decode()} is beyond what a stream's state can hold.", "id", message.id.decode())
        items, bare = self._read(message)
        if message.event_id is not None:
            items = [_named(item, message.event_id if bare else f"{message.event_id}/{i}") for i, item in enumerate(items)]
        return items, bare

    def _mapped(self, message: Message) -> tuple[Items, bool]:
        """Raises BadEvent."""
        levels = self._levels(message)
        try:
            items, bare = self._items(message, levels)
        except BadBody as error:
            raise BadEvent(error.detail.replace("The body", "The payload", 1), "payload", _start(message)) from error
        for place, found in self._nested:
            items = [part for item in items for part in ([item] if isinstance(item, ItemError) else self._parts(item, place, found))]
            bare = False
            if len(items) > self._max_events:
                raise TooLarge(f"More than {self._max_events} events in one message.")
        events = [event for item in items for event in ([item] if isinstance(item, ItemError) else self._try(item))]
        return events, bare and len(events) == 1

    # ── one event ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _try(self, item: _Item) -> Items:
        """An event; of a line with which its session ends, the line and the end."""
        try:
            event, ends = self._event(item), self._ends(item)
        except ItemError as error:
            return [error]
        if not ends:
            return [event]
        if event.message is None:
            return [replace(event, values=event.values or None, end=True)]
        end_id = None if event.event_id is None else _bounded(f"{event.event_id}/end")
        return [event, replace(event, message=None, end=True, event_id=end_id, sequence=None)]

    def _ends(self, item: _Item) -> bool:
        """Raises BadEvent."""
        if not self._end and self._payload.values:  # a field that happens to be called so
            return False
        found = self._end(item) if self._end else self._own["end"](item)
        if found is _MISSING:
            return False
        ends = _ENDS.get(found) if isinstance(found, str | int | None) else None
        if ends is None:
            place = self._payload.end or "end"
            raise BadEvent(f"{place} is {shown(found)}: neither true nor false.", place, shown(found))
        return ends

    def _event(self, item: _Item) -> Event:
        """Raises BadEvent."""
        fields: dict[str, Any] = {}
        if (stream_id := self._stream(item)) is not _MISSING:
            fields["stream_id"] = stream_id
        if (line := self._line(item)) is not _MISSING:
            fields["message"] = line
        elif (values := self._readings(item)) is not _MISSING:
            fields["values"] = values
        if (time := self._time(item)) is not _MISSING:
            fields["timestamp"] = time
        if (event_id := self._identity(item)) is not _MISSING:
            fields["event_id"] = event_id
        sequence = self._sequence(item) if self._sequence else self._own["sequence"](item)
        if sequence is not _MISSING:
            number = to_number(sequence) if isinstance(sequence, str) else sequence
            fields["sequence"] = sequence if number is None else number
        try:
            return msgspec.convert(fields, Event)
        except (msgspec.ValidationError, OverflowError, RecursionError, UnicodeEncodeError):
            return checked(fields)

    def _line(self, item: _Item) -> Any:
        """A log line; _MISSING = the message has numbers, or neither."""
        if self._payload.format == "text":
            return item.payload
        if self._message:
            return self._message(item)
        found = _MISSING if self._payload.values else self._own["message"](item)
        return _MISSING if found is None else found

    def _readings(self, item: _Item) -> Any:
        """The values; raises NoReading where there are none in what was declared `good`, and without what was declared `missing`."""
        for reference, reader, words in self._good:
            said = reader(item)
            if said is _MISSING:
                raise BadEvent(f"{reference} is to say whether the reading is good, and is not in the message.", reference)
            if _comparable(said) not in words:
                raise NoReading(f"{reference} is {shown(said)}: not good.", reference, shown(said))
        values = self._values(item)
        if self._missing and isinstance(values, dict) and values and all(value is None for value in values.values()):
            raise NoReading("No reading is left without those that are declared missing.", "values", shown(values))
        return values

    def _stream(self, item: _Item) -> Any:
        if self._stream_id:
            return self._stream_id(item)
        for found in (self._own["stream_id"](item), item.attributes.get("subject", _MISSING), item.message.key):
            if found is not _MISSING and found is not None:
                return found
        if item.attributes:
            raise BadEvent("The CloudEvent has no subject to name its stream; declare stream_id.", "subject")
        return _MISSING

    def _identity(self, item: _Item) -> Any:
        if self._event_id:
            return self._event_id(item)
        if item.attributes:
            return _bounded(f"{item.attributes['source']} {item.attributes['id']}")
        return self._own["event_id"](item)

    def _time(self, item: _Item) -> Any:
        """Seconds since 1970, or what was sent in their place. Raises BadEvent."""
        found = self._timestamp(item) if self._timestamp else self._own["timestamp"](item)
        if found is _MISSING or found is None:
            return item.attributes.get("time", _MISSING)
        number = to_number(found) if isinstance(found, str) else found
        if isinstance(number, bool) or not isinstance(number, int | float):
            return found
        unit = self._payload.timestamp_unit
        if unit == "s":
            return number
        if number < _EARLIEST[unit]:
            raise of_another_unit(number, _UNITS[unit], self._payload.timestamp or "timestamp")
        try:
            return number / PER_SECOND[unit]
        except OverflowError:  # of hundreds of digits: no time in any unit
            return number

    # ── what was declared ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _values_of(self, declared: str | Mapping[str, str]) -> Reader:
        if isinstance(declared, str):
            return self._object(declared) if declared else self._own_values
        readers = {feature: (reference, self._reader(reference)) for feature, reference in declared.items()}

        def values(item: _Item) -> Any:
            found = {feature: self._number_at(reference, reader(item)) for feature, (reference, reader) in readers.items()}
            if all(number is _MISSING for number in found.values()):
                raise BadEvent(f"None of {', '.join(declared.values())} is in the message.", next(iter(declared.values())))
            return {feature: None if number is _MISSING else number for feature, number in found.items()}

        return values

    def _object(self, reference: str) -> Reader:
        reader = self._reader(reference)

        def values(item: _Item) -> Any:
            found = reader(item)
            if found is _MISSING or found is None:
                raise BadEvent(f"{reference} is not in the message.", reference)
            if not isinstance(found, dict):
                return {self._payload.feature: self._number_at(reference, found)}
            return {feature: self._number_at(f"{reference}.{feature}", number) for feature, number in found.items()}

        return values

    def _own_values(self, item: _Item) -> Any:
        """What the payload has as `values`; a number by itself; of a CloudEvent, or fields of a queue, all that is there."""
        content = item.payload
        if not isinstance(content, dict):
            return {self._payload.feature: self._number_at(f"values.{self._payload.feature}", content)}
        if "values" in content or (not item.attributes and item.message.payload is not None):
            found = content.get("values", _MISSING)
            if not self._missing or not isinstance(found, dict):
                return found
            return {str(name): self._number_at(f"values.{name}", value) for name, value in found.items()}
        return {str(name): self._number_at(str(name), value) for name, value in content.items() if name not in _OWN}

    def _number_at(self, reference: str, found: Any) -> Any:
        """A number, None or _MISSING; a text that is a number is one, true and false are 1 and 0, as `split` has it. Raises BadEvent."""
        if found is None or found is _MISSING:
            return found
        if self._missing and _comparable(found) in self._missing:
            return None
        if isinstance(found, int | float):
            return int(found) if isinstance(found, bool) else found
        if found in ("", "null"):
            return None
        number = _TRUTHS.get(found.lower(), to_number(found)) if isinstance(found, str) else None
        if number is None:
            raise BadEvent(
                f"{reference[:64]} is {shown(found)}, not a number; send null for a missing value, or name it in payload.missing.",
                reference[:64],
                shown(found),
            )
        return number

    def _template(self, field: str, text: str) -> Reader | None:
        if not text:
            return None
        template = Template(text)
        readers = [(reference, self._reader(reference)) for reference in template.references]

        def fill(item: _Item) -> str:
            return template.filled(tuple(_text_at(field, reference, reader(item)) for reference, reader in readers))

        return fill

    def _optional(self, field: str, reference: str) -> Reader | None:
        """A reader of what was declared, and so must be there."""
        if not reference:
            return None
        reader = self._reader(reference)

        def read(item: _Item) -> Any:
            found = reader(item)
            if found is _MISSING or found is None:
                raise BadEvent(f"{field} is to be read from '{reference}', which is not in the message.", reference)
            return found

        return read

    def _reader(self, reference: str) -> Reader:
        """How a reference is resolved."""
        if self._pattern and reference in self._pattern.names:
            return lambda item: item.levels.get(reference, _MISSING)
        if reference == "key":
            return lambda item: _MISSING if item.message.key is None else item.message.key
        if reference == "topic":
            return lambda item: item.message.topic
        root, _, rest = reference.partition(".")
        if root == "headers" and rest:
            return lambda item: _header(item.message, rest)
        if root == "ce" and rest and self._payload.format == "cloudevents":
            return lambda item: item.attributes.get(rest, _MISSING)
        of_all = root == "payload" and rest != ""
        within = _path(rest if of_all else reference)
        return lambda item: within(item.whole if of_all and item.whole is not _MISSING else item.payload)

    # ── the items of a message ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _plain(self, message: Message) -> tuple[Items, bool]:
        if message.payload is None:
            return [from_fields(message.headers)], True
        if (event := decode_one(message.payload, self._format)) is not None:
            return [_of_key(event, message.key)], True
        try:
            items, bare = decode(message.payload, self._body_format(message.payload), max_events=self._max_events)
        except ItemError:
            raise
        except OnsetError as error:
            raise BadEvent(error.detail, "payload", _start(message)) from error
        return [_of_key(item, message.key) for item in items], bare

    def _body_format(self, content: bytes) -> Format:
        if self._format is Format.JSON and b"\n{" in content and _NEXT_LINE.search(content):
            return Format.NDJSON
        return self._format

    def _levels(self, message: Message) -> Mapping[str, str]:
        """Raises BadEvent."""
        if self._pattern is None:
            return {}
        levels = self._pattern.match(message.topic)
        if levels is None:
            raise BadEvent(f"The topic {shown(message.topic)} does not match '{self._pattern.text}'.", "topic", shown(message.topic))
        return levels

    def _items(self, message: Message, levels: Mapping[str, str]) -> tuple[list[_Item | ItemError], bool]:
        """Raises BadBody, TooLarge, BadEvent."""
        if self._payload.format == "cloudevents":
            return self._cloud_events(message, levels)
        if message.payload is None:
            fields = {_text(name): _text(value) for name, value in message.headers.items()}
            return [_Item(fields, message, levels, {})], True
        if self._payload.format == "influx":
            points = decode_lines(message.payload, most=self._max_events)
            return [point if isinstance(point, BadEvent) else _Item(point, message, levels, {}) for point in points], False
        if self._payload.format in ("number", "text"):
            return [_Item(message.payload.decode(errors="replace").strip(), message, levels, {})], True
        contents, bare = decode_plain(message.payload, self._body_format(message.payload), max_events=self._max_events)
        return [content if isinstance(content, ItemError) else _Item(content, message, levels, {}) for content in contents], bare

    def _parts(self, item: _Item, place: str, within: Callable[[Any], Any] | None) -> Sequence[_Item | ItemError]:
        """What lies at a place of a payload, each as a payload of its own; `within` finds it, None = it is the payload itself."""
        found = item.payload if within is None else within(item.payload)
        if isinstance(found, list):
            return [dataclasses.replace(item, payload=part, whole=item.payload) for part in found]
        if isinstance(found, dict):
            return [self._member(item, str(name), value) for name, value in found.items()]
        said, value = ("not in the message", "") if found is _MISSING else (shown(found), shown(found))
        return [BadEvent(f"{place} is to be a list or an object of events; it is {said}.", place, value)]

    def _member(self, item: _Item, name: str, value: Any) -> _Item | ItemError:
        """A reading by its name in an object, where words and other objects stand beside the readings."""
        if isinstance(value, int | float) or (isinstance(value, str) and to_number(value) is not None):
            return dataclasses.replace(item, payload={"name": name, "value": value}, whole=item.payload)
        return NoReading(f"{name[:64]} is {shown(value)}: no number.", name[:64], shown(value))

    def _cloud_events(self, message: Message, levels: Mapping[str, str]) -> tuple[list[_Item | ItemError], bool]:
        payload = message.payload or b""
        prefix = next((prefix for prefix in _PREFIXES if prefix + b"specversion" in message.headers), None)
        if prefix is not None:
            size = len(prefix)
            attributes = {_text(name[size:]): _text(value) for name, value in message.headers.items() if name.startswith(prefix)}
            attributes |= {"datacontenttype": _text(kind)} if (kind := _content_type(message)) else {}
            return [_Item(_data(payload, attributes), message, levels, _required(attributes))], True
        contents, bare = decode_plain(payload, Format.JSON, max_events=self._max_events)
        return [self._structured(content, message, levels) for content in contents], bare

    def _structured(self, content: Any, message: Message, levels: Mapping[str, str]) -> _Item | ItemError:
        if not isinstance(content, dict) or "specversion" not in content:
            return BadEvent("No CloudEvent: neither its headers nor its payload have a specversion.", "specversion", shown(content))
        try:
            attributes = _required({name: value for name, value in content.items() if name not in ("data", "data_base64")})
            data = content.get("data")
            if "data_base64" in content:
                data = _data(base64.b64decode(content["data_base64"], validate=True), attributes)
        except ItemError as error:
            return error
        except BadBody as error:
            return BadEvent(error.detail.replace("The body", "The data", 1), "data_base64", shown(content["data_base64"]))
        except (TypeError, ValueError, binascii.Error):
            return BadEvent("data_base64 is not base64.", "data_base64", shown(content["data_base64"]))
        return _Item(data, message, levels, attributes)


def _of_key(item: Event | ItemError, key: str | None) -> Event | ItemError:
    """With the stream that the message's key names, where it names none itself."""
    if key is not None and isinstance(item, Event) and item.stream_id is None:
        return replace(item, stream_id=key)
    return item


def _named(item: Event | ItemError, event_id: str) -> Event | ItemError:
    """With this identity where it has none: a sequence is one."""
    if isinstance(item, Event) and item.event_id is None and item.sequence is None:
        return replace(item, event_id=_bounded(event_id))
    return item


def _required(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes, once they are those of a CloudEvent 1.0. Raises BadEvent."""
    if not str(attributes["specversion"]).startswith("1."):
        raise BadEvent(f"specversion is {shown(attributes['specversion'])}, not 1.0.", "specversion", shown(attributes["specversion"]))
    for name in ("id", "source"):
        if not isinstance(attributes.get(name), str) or not attributes[name]:
            raise BadEvent(f"The CloudEvent has no {name}, which with its source makes its identity.", name, shown(attributes.get(name)))
    return attributes


def _data(content: bytes, attributes: Mapping[str, Any]) -> Any:
    """A CloudEvent's data by its content type. Raises BadBody, BadEvent."""
    kind = str(attributes.get("datacontenttype", "application/json")).partition(";")[0].strip().lower()
    if kind in ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"):
        form = Format.MSGPACK
    elif kind in ("application/json", "text/json", "text/plain") or kind.endswith("+json"):
        form = Format.JSON
    else:
        raise BadEvent(f"datacontenttype is {shown(kind)}; data is read as JSON or msgpack.", "datacontenttype", shown(kind))
    [data], bare = decode_plain(content, form, max_events=1)
    if not bare:
        raise BadEvent("The data of a CloudEvent is one event, not an array.", "data", shown(data))
    return data


def _bounded(identity: str) -> str:
    """An identity as an event_id may hold it."""
    if len(identity) <= MAX_NAME_LENGTH:
        return identity
    return hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=32).hexdigest()


def _path(dotted: str) -> Callable[[Any], Any]:
    """What lies at a place in a payload, or _MISSING."""
    parts = dotted.split(".")
    if len(parts) == 1:
        [name] = parts
        return lambda payload: payload.get(name, _MISSING) if isinstance(payload, dict) else _MISSING

    def walk(payload: Any) -> Any:
        found = payload
        for part in parts:
            if isinstance(found, dict):
                found = found.get(part, _MISSING)
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            else:
                return _MISSING
        return found

    return walk


def _comparable(said: Any) -> Any:
    """As words and numbers are compared: a text that is a number is one, and NaN is NaN however it is written. None = it is neither."""
    if isinstance(said, bool):
        return str(said).lower()
    number = to_number(said.strip()) if isinstance(said, str) else said
    if isinstance(number, int | float):
        return "NaN" if math.isnan(number := as_float(number)) else number
    return said.strip() if isinstance(said, str) else None


def _text_at(field: str, reference: str, found: Any) -> str:
    if isinstance(found, str) and len(found) > MAX_NAME_LENGTH and field != "message":  # said once, it would be copied for each event
        detail = f"{field} is to be made from '{reference}', which has {len(found)} characters: {MAX_NAME_LENGTH} at most."
        raise BadEvent(detail, field, shown(found))
    if isinstance(found, str) and found:
        return found
    if isinstance(found, int | float) and not isinstance(found, bool):
        return str(found)
    if found is _MISSING or found is None:
        raise BadEvent(f"{field} is to be made from '{reference}', which is not in the message.", reference)
    raise BadEvent(f"{field} is to be made from '{reference}', which is {shown(found)}: no text and no number.", reference, shown(found))


def _header(message: Message, name: str) -> Any:
    found = message.headers.get(name.encode(), message.headers.get(name.lower().encode()))  # HTTP's come in small letters
    return _MISSING if found is None else _text(found)


def _content_type(message: Message) -> bytes:
    return next((message.headers[name] for name in _CONTENT_TYPES if name in message.headers), b"")


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _start(message: Message) -> str:
    return shown((message.payload or b"").decode(errors="replace"))
