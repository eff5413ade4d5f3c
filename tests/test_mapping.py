"""Messages → events: with nothing declared as over REST, otherwise as declared; what cannot be mapped is named by field and value."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from service.errors import BadEvent, ItemError, NoReading, TooLarge
from service.events import Event
from service.mapping import Mapper
from service.sources import MAX_EVENTS, POSITIONS, Message
from service.sources.options import Payload


def message(
    payload: Any, *, topic: str = "plant/north/7/pressure/value", key: str | None = None, position: int = 1, **headers: str
) -> Message:
    content = payload if isinstance(payload, bytes) or payload is None else json.dumps(payload).encode()
    named = {name.replace("__", "-").encode(): value.encode() for name, value in headers.items()}
    return Message(b"1", position, 1.7e9, content, named, key, topic)


def events(declared: dict[str, Any], sent: Message) -> list[Event | ItemError]:
    return list(Mapper(Payload.model_validate(declared), max_events=10).events(sent)[0])


def one(declared: dict[str, Any], sent: Message) -> Event:
    [event] = events(declared, sent)
    assert isinstance(event, Event), event
    return event


def wrong(declared: dict[str, Any], sent: Message) -> tuple[str, str]:
    """Field and value that are named."""
    try:
        [error] = events(declared, sent)
    except BadEvent as raised:
        error = raised
    assert isinstance(error, BadEvent), error
    assert error.detail.endswith(".")
    return error.field, error.value


def test_with_nothing_declared_a_message_is_what_rest_takes() -> None:
    given = {"stream_id": "a", "values": {"value": 1.5, "other": None}, "timestamp": "2026-11-26T08:00:00Z", "event_id": "x", "sequence": 3}
    whole = Event("a", {"value": 1.5, "other": None}, None, "2026-11-26T08:00:00Z", "x", 3)
    assert one({}, message(given)) == whole
    assert events({}, message([given, given])) == [whole, whole]
    assert events({"format": "ndjson"}, message(b"\n".join([json.dumps(given).encode()] * 2))) == [whole, whole]
    assert one({"format": "msgpack"}, message(msgspec.msgpack.encode(given))) == whole
    assert wrong({}, message({"stream_id": "a", "speed": 2})) == ("speed", "2")
    assert wrong({}, message(b"nonsense"))[0] == "payload"


def test_one_json_text_may_begin_its_objects_on_lines_of_their_own_and_objects_line_by_line_are_several() -> None:
    a, b = b'{"stream_id": "a", "values": {"value": 1}}', b'{"stream_id": "b", "values": {"value": 2}}'
    both = [Event("a", {"value": 1}), Event("b", {"value": 2})]
    for written, declared in ((b"[\n%s,\n%s\n]", {}), (b'{\n"n": 1,\n"r": [\n%s,\r\n%s\n]\n}\n', {"each": "r"})):
        assert events(declared, message(written % (a, b))) == both
    assert events({}, message(a + b"\r\n" + b)) == both
    assert events({}, message(a[:-9] + b"\n" + b))[1] == both[1], "of a line that is cut off the neighbour is an event"
    assert wrong({}, message(b'{"stream_id": "a", "values":\n{"value": "hot"}}')) == ("values.value", '"hot"')


def test_an_event_may_be_written_over_several_lines() -> None:
    event = b'{"stream_id": "a", "values":\n{"value": 1.5}\n}\n'
    assert Mapper(Payload(), max_events=10).events(message(event)) == ([Event("a", {"value": 1.5})], True)
    assert events({}, message(b'{"stream_id": "a", "values": {"value": 1.5}}\n' * 2)) == [Event("a", {"value": 1.5})] * 2


def test_the_key_names_the_stream_where_the_payload_does_not() -> None:
    assert one({}, message({"values": {"value": 1}}, key="pump")).stream_id == "pump"
    assert one({}, message({"stream_id": "own", "values": {"value": 1}}, key="pump")).stream_id == "own"
    assert one({"values": "v"}, message({"v": 1}, key="pump")) == Event("pump", {"value": 1})
    assert one({"format": "number"}, message(b" 71.3\n", key="pump")) == Event("pump", {"value": 71.3})


def test_a_message_with_an_id_names_its_events_where_they_have_none() -> None:
    def of(payload: Any, **declared: Any) -> list[Any]:
        sent = replace(message(payload), event_id="m-1")
        return [event.event_id for event in events(declared, sent) if isinstance(event, Event)]

    item = {"stream_id": "a", "values": {"value": 1}}
    assert of(item) == ["m-1"]
    assert of(item | {"event_id": "own"}) == ["own"]
    assert of(item | {"sequence": 7}) == [None]
    assert of([item, item | {"event_id": "own"}, item]) == ["m-1/0", "own", "m-1/2"]
    assert of({"s": "a", "v": 1}, stream_id="s", values="v") == ["m-1"]


def test_a_stream_is_made_from_levels_of_the_topic_fields_headers_and_the_key() -> None:
    declared = {
        "topic": "plant/{plant}/{line}/{sensor}/value",
        "stream_id": "{plant}/line-{line}/{sensor}/{device.no}/{headers.unit}/{key}",
        "values": {"value": "data.0.v"},
    }
    sent = message({"device": {"no": 12}, "data": [{"v": 3.5}]}, unit="bar", key="k")
    assert one(declared, sent) == Event("north/line-7/pressure/12/bar/k", {"value": 3.5})
    assert wrong(declared, message({"device": {"no": 12}, "data": [{"v": 3.5}]}, key="k"))[0] == "headers.unit"
    assert wrong(declared, message({"device": {}, "data": [{"v": 3.5}]}, key="k", unit="bar"))[0] == "device.no"
    assert wrong(declared, message({"device": {"no": [1]}, "data": [{"v": 3.5}]}, key="k", unit="bar")) == ("device.no", "[1]")
    assert wrong(declared, message({}, topic="plant/north/7")) == ("topic", '"plant/north/7"')


def test_a_field_whose_name_is_a_word_of_ours_is_reached_by_payload() -> None:
    sent = message({"topic": "inner", "key": "mine", "value": 1}, topic="outer", key="theirs")
    assert one({"stream_id": "{topic}-{key}-{payload.topic}-{payload.key}", "values": "value"}, sent).stream_id == "outer-theirs-inner-mine"


@pytest.mark.parametrize(
    ("unit", "sent", "seconds"),
    [("s", 1.7e9, 1.7e9), ("ms", 1_700_000_000_500, 1_700_000_000.5), ("us", "1700000000000000", 1.7e9), ("ns", 17 * 10**17, 1.7e9)],
)
def test_times_are_read_in_their_unit(unit: str, sent: Any, seconds: float) -> None:
    declared = {"stream_id": "s", "timestamp": "t", "timestamp_unit": unit, "values": "v"}
    assert one(declared, message({"s": "a", "t": sent, "v": 1})).timestamp == seconds
    assert one(declared, message({"s": "a", "t": "2026-11-26T08:00:00Z", "v": 1})).timestamp == "2026-11-26T08:00:00Z"


@pytest.mark.parametrize(
    ("unit", "sent", "looks"),
    [
        ("ms", 1_700_000_000, ": it looks like seconds"),
        ("us", 1_700_000_000, ": it looks like seconds"),
        ("ns", "1700000000000000", ": it looks like microseconds"),
        ("ms", 86_400, ""),  # since the sender was started, for one
        ("ms", -5, ""),
    ],
)
def test_a_time_that_its_unit_puts_into_1970_is_a_dead_letter_which_names_the_unit_that_it_is_in(unit: str, sent: Any, looks: str) -> None:
    declared = {"stream_id": "s", "timestamp": "at.t", "timestamp_unit": unit, "values": "v"}
    [error] = events(declared, message({"s": "a", "at": {"t": sent}, "v": 1}))
    assert isinstance(error, BadEvent)
    assert (error.field, f"since 1970{looks}." in error.detail) == ("at.t", True), error.detail


@pytest.mark.parametrize(
    "bad", [b'{"s": "b", "t": %s, "v": 1}' % (b"9" * 399), b'{"s": "b", "t": 1700000000000, "v": 1, "sequence": "\\ud800"}']
)
def test_one_bad_event_among_thousands_of_a_message_is_named_and_the_others_are_events(bad: bytes) -> None:
    good = b'{"s": "a", "t": 1700000000000, "v": 1}'
    payload = Payload.model_validate({"each": "r", "stream_id": "s", "timestamp": "t", "timestamp_unit": "ms", "values": "v"})
    content = b'{"r": [' + b",".join([good] * 2500 + [bad] + [good] * 2499) + b"]}"
    found = Mapper(payload, max_events=5000).events(message(content))[0]
    assert [i for i, item in enumerate(found) if not isinstance(item, Event)] == [2500]
    assert isinstance(found[2500], BadEvent)


def test_lines_of_influx_are_a_stream_for_each_field_where_nothing_else_is_declared() -> None:
    sent = message(b'cpu,host=a,cpu=0 idle=1.5,n=2i,note="x" 1795797153000000000\nbad\nm f=t')
    idle, n, note, bad, without_time = events({"format": "influx"}, sent)
    assert (idle, n) == (
        Event("cpu,cpu=0,host=a/idle", {"value": 1.5}, timestamp=1795797153.0),
        Event("cpu,cpu=0,host=a/n", {"value": 2.0}, timestamp=1795797153.0),
    )
    assert (type(note), type(bad), without_time) == (NoReading, BadEvent, Event("m/f", {"value": 1.0}))
    assert one({"format": "influx", "values": "fields.idle"}, message(b"cpu,host=a idle=1.5")) == Event("cpu,host=a", {"value": 1.5})
    declared = {"format": "influx", "timestamp_unit": "s", "stream_id": "tags.host", "message": "fields.message"}
    assert one(declared, message(b'syslog,host=a message="up",severity=1i 1795797153')) == Event("a", None, "up", 1795797153)


def test_a_list_within_a_list_is_gone_through_and_payload_is_what_the_innermost_one_is_in() -> None:
    declared = {"each": ["batch", "points"], "stream_id": "payload.name", "timestamp": "t", "values": "v"}
    sent = message({"batch": [{"name": "a", "points": [{"t": 1, "v": 2}, {"t": 2, "v": 3}]}, {"name": "b", "points": 7}, {"points": []}]})
    first, second, bad = events(declared, sent)
    assert (first, second) == (Event("a", {"value": 2}, timestamp=1), Event("a", {"value": 3}, timestamp=2))
    assert isinstance(bad, BadEvent)
    assert (bad.field, bad.value) == ("points", "7")


def test_a_header_is_found_in_the_small_letters_of_http() -> None:
    assert one({"stream_id": "{headers.X-Line}", "values": "v"}, message({"v": 1}, x__line="7")).stream_id == "7"


@pytest.mark.parametrize("large", ["h" * 1_000_000, "1" * 1_000_000, {f"k{i}": i for i in range(60_000)}, [["x" * 1_000_000]] * 3])
@pytest.mark.parametrize("place", ["stream_id", "timestamp"])
def test_what_events_share_is_not_gone_through_for_each_of_them(large: Any, place: str) -> None:
    declared = {"each": "readings", "stream_id": "s", "timestamp": "t", "values": "v"} | {place: "payload.large"}
    sent = message({"large": large, "readings": [{"s": "a", "t": 5, "v": 1}] * 1000})
    mapper = Mapper(Payload.model_validate(declared), max_events=1000)
    started = time.process_time()
    items, _ = mapper.events(sent)
    assert time.process_time() - started < 10  # it took minutes
    assert len(items) == 1000
    if place == "stream_id":
        assert all(isinstance(item, BadEvent) and len(item.detail) < 200 for item in items)


def test_what_is_declared_must_be_there_and_a_missing_feature_is_missing() -> None:
    declared = {"stream_id": "s", "timestamp": "t", "event_id": "{s}-{n}", "sequence": "n", "values": {"x": "m.x", "y": "m.y"}}
    good = {"s": "a", "t": 5, "n": 9, "m": {"x": 1, "y": "2.5"}}
    assert one(declared, message(good)) == Event("a", {"x": 1, "y": 2.5}, None, 5, "a-9", 9)
    assert one(declared, message(good | {"m": {"x": 1}})).values == {"x": 1, "y": None}
    assert one(declared, message(good | {"m": {"x": 1, "y": ""}})).values == {"x": 1, "y": None}
    assert wrong(declared, message(good | {"m": {}}))[0] == "m.x"
    assert wrong(declared, message(good | {"m": {"x": "hot"}})) == ("m.x", '"hot"')
    assert wrong(declared, message(good | {"m": {"x": [True]}})) == ("m.x", "[true]")
    assert wrong(declared, message(good | {"n": "first"})) == ("sequence", '"first"')
    for name in ("t", "n"):
        assert wrong(declared, message({field: value for field, value in good.items() if field != name}))[0] == name
    assert wrong(declared, message(good | {"s": "long" * 100}))[0] in ("stream_id", "event_id")


def test_true_and_false_are_one_and_nought_as_in_files() -> None:
    declared = {"stream_id": "s", "values": "m"}
    assert one(declared, message({"s": "a", "m": {"x": True, "y": False, "z": "True", "u": "false"}})).values == {
        "x": 1,
        "y": 0,
        "z": 1,
        "u": 0,
    }
    for said, number in ((b"true", 1), (b"False", 0)):
        assert one({"format": "number", "stream_id": "topic"}, message(said)).values == {"value": number}


@pytest.mark.parametrize("declared", [{"values": "m"}, {"values": {"x": "m.x", "y": "m.y"}}, {}])
def test_what_is_declared_missing_is_a_missing_feature_and_not_the_whole_event(declared: dict[str, Any]) -> None:
    declared = declared | {"stream_id": "s", "missing": ["Bad", "No Data", -9999]}

    def sent(x: Any) -> Message:
        return message({"s": "a", "m" if "values" in declared else "values": {"x": x, "y": 2}})

    for said in ("Bad", " No Data ", -9999, -9999.0, "-9999"):
        assert one(declared, sent(said)).values == {"x": None, "y": 2}
    assert wrong(declared, sent("bad"))[1] == '"bad"'
    assert one(declared, sent(-99)).values == {"x": -99, "y": 2}


def test_an_event_of_which_no_reading_is_left_is_passed_over() -> None:
    number = {"format": "number", "stream_id": "topic", "missing": ["Bad", 65535]}
    for said in (b"Bad", b"65535", b"65535.0"):
        assert isinstance(events(number, message(said))[0], NoReading)
    assert one(number, message(b"65534")).values == {"value": 65534}
    assert wrong(number, message(b"Worse")) == ("values.value", '"Worse"')
    for named in ("NaN", "nan", float("nan")):
        number = {"format": "number", "stream_id": "topic", "missing": [named]}
        for said in (b"NaN", b"nan"):
            assert isinstance(events(number, message(said))[0], NoReading)
        assert isinstance(events({"stream_id": "s", "missing": [named]}, message({"s": "a", "values": {"x": float("nan")}}))[0], NoReading)
    machine = {"stream_id": "s", "values": "m", "missing": ["Bad"]}
    assert isinstance(events(machine, message({"s": "a", "m": {"x": "Bad", "y": None}}))[0], NoReading)


@pytest.mark.parametrize(
    ("good", "said", "taken"),
    [
        ("Good", "Good", True),
        ("Good", "Bad", False),
        (["Good", 192], 192, True),
        (["Good", 192], "192", True),
        (["Good", 192], 24, False),
        (True, True, True),
        (True, False, False),
        ("Good", None, False),
    ],
)
def test_readings_of_another_quality_are_passed_over_and_not_their_neighbours(good: Any, said: Any, taken: bool) -> None:
    declared = {"stream_id": "s", "values": "v", "good": {"q": good}}
    first, second = events(
        declared, message([{"s": "a", "v": 1, "q": said}, {"s": "b", "v": 2, "q": good if not isinstance(good, list) else good[0]}])
    )
    assert (first == Event("a", {"value": 1})) is taken
    assert isinstance(first, NoReading) is not taken
    assert second == Event("b", {"value": 2})
    assert wrong(declared, message({"s": "a", "v": 1}))[0] == "q"


def test_an_object_of_numbers_is_the_values() -> None:
    declared = {"stream_id": "s", "values": "m"}
    assert one(declared, message({"s": "a", "m": {"x": 1, "y": None}})).values == {"x": 1, "y": None}
    assert one(declared | {"feature": "temperature"}, message({"s": "a", "m": 3})).values == {"temperature": 3}
    assert wrong(declared, message({"s": "a", "m": {"x": [1]}})) == ("m.x", "[1]")
    assert wrong(declared, message({"s": "a"}))[0] == "m"


KEPWARE = {
    "timestamp": 1795797153123,
    "values": [
        {"id": "Line1.Press.Temp", "v": 71.3, "q": True, "t": 1795797153100},
        {"id": "Line1.Press.State", "v": "RUN", "q": True, "t": 1795797153101},
        {"id": "Line1.Press.Flow", "v": 0, "q": False, "t": 1795797153102},
        {"id": "Line1.Press.Load", "v": "12.5", "q": True, "t": 1795797153103},
    ],
}
"""As Kepware's IoT Gateway publishes."""


def test_a_list_within_the_payload_is_an_event_each_and_a_bad_one_does_not_touch_its_neighbours() -> None:
    declared = {
        "each": "values",
        "stream_id": "id",
        "timestamp": "t",
        "timestamp_unit": "ms",
        "values": {"value": "v"},
        "good": {"q": True},
    }
    warm, words, bad, load = events(declared, message(KEPWARE))
    assert (warm, load) == (
        Event("Line1.Press.Temp", {"value": 71.3}, None, 1795797153.1),
        Event("Line1.Press.Load", {"value": 12.5}, None, 1795797153.103),
    )
    assert isinstance(bad, NoReading)
    assert isinstance(words, BadEvent)
    assert (words.field, words.value) == ("v", '"RUN"')
    assert events(declared, message([KEPWARE, {"values": []}, KEPWARE]))[4:6][0] == warm


def test_within_an_event_of_a_list_the_whole_payload_is_still_reached() -> None:
    sent = {"gateway": {"site": "north"}, "at": 1_700_000_000, "data": {"readings": [{"name": "a", "value": 1}, {"name": "b", "value": 2}]}}
    declared = {"each": "data.readings", "stream_id": "{payload.gateway.site}/{line}/{name}", "timestamp": "payload.at", "values": "value"}
    assert events({**declared, "topic": "plant/{line}/#"}, message(sent, topic="plant/7/x")) == [
        Event("north/7/a", {"value": 1}, None, 1.7e9),
        Event("north/7/b", {"value": 2}, None, 1.7e9),
    ]


def test_each_number_of_an_object_is_an_event_and_its_words_are_passed_over() -> None:
    sent = {"temperature": 21.3, "humidity": "45", "contact": True, "action": "single", "update": {"state": "idle"}, "voltage": None}
    declared = {"each": ".", "topic": "zigbee2mqtt/{device}", "stream_id": "{device}/{name}", "values": "value"}
    got = events(declared, message(sent, topic="zigbee2mqtt/oven"))
    assert got[:3] == [
        Event("oven/temperature", {"value": 21.3}),
        Event("oven/humidity", {"value": 45}),
        Event("oven/contact", {"value": 1}),
    ]
    assert [(type(item), item.field) for item in got[3:] if isinstance(item, ItemError)] == [
        (NoReading, name) for name in ("action", "update", "voltage")
    ]
    missing = events({**declared, "missing": [45]}, message(sent, topic="zigbee2mqtt/oven"))
    assert [type(item) for item in missing[:3]] == [Event, NoReading, Event]


@pytest.mark.parametrize(("sent", "value"), [({"values": 3}, "3"), ({}, ""), ([1], "")])
def test_a_payload_without_what_each_names_is_a_dead_letter(sent: Any, value: str) -> None:
    assert wrong({"each": "values", "stream_id": "id"}, message(sent)) == ("values", value)


def test_the_events_of_a_list_are_named_by_their_message_and_counted_with_it() -> None:
    declared = {"each": "r", "stream_id": "id", "values": "v"}
    sent = replace(message({"r": [{"id": "a", "v": 1}, {"id": "b", "v": 2}]}), event_id="m-1")
    assert [item.event_id for item in events(declared, sent) if isinstance(item, Event)] == ["m-1/0", "m-1/1"]
    with pytest.raises(TooLarge):
        events(declared, message([{"r": [{"id": "a", "v": i} for i in range(6)]}] * 2))


def test_a_bad_item_does_not_touch_its_neighbours_in_any_format() -> None:
    declared = {"stream_id": "s", "values": "v"}
    items = [{"s": "a", "v": 1}, {"s": "a", "v": "hot"}, {"s": "a", "v": 2}]
    lines = b"\n".join(json.dumps(item).encode() for item in items)
    for form, sent in (
        ("json", json.dumps(items).encode()),
        ("ndjson", lines),
        ("json", lines),
        ("msgpack", msgspec.msgpack.encode(items)),
    ):
        first, second, third = events(declared | {"format": form}, message(sent))
        assert (first, third) == (Event("a", {"value": 1}), Event("a", {"value": 2}))
        assert isinstance(second, BadEvent)
        assert (second.field, second.value) == ("v", '"hot"')
    [good, bad] = events(declared | {"format": "ndjson"}, message(b'{"s": "a", "v": 1}\n{"s":'))
    assert (isinstance(good, Event), isinstance(bad, BadEvent)) == (True, True)


def test_a_number_by_itself_is_the_value_of_one_feature() -> None:
    declared = {"format": "number", "topic": "plant/{plant}/{line}/{sensor}/value", "stream_id": "{plant}/{line}/{sensor}"}
    assert one(declared, message(b"-7.25e1")) == Event("north/7/pressure", {"value": -72.5})
    assert one(declared | {"feature": "bar"}, message(b"3")) == Event("north/7/pressure", {"bar": 3})
    assert wrong(declared, message(b"on")) == ("values.value", '"on"')
    assert wrong(declared, message(b"\xff"))[0] == "values.value"
    assert one({"stream_id": "topic"}, message(b"71.3")).values == {"value": 71.3}, "JSON has numbers too"


CLOUD = {"specversion": "1.0", "type": "reading", "source": "/plant/north", "id": "42", "subject": "pump-7", "time": "2026-11-26T08:00:00Z"}


def test_a_structured_cloudevent_has_its_stream_identity_and_time_in_its_attributes() -> None:
    want = Event("pump-7", {"value": 71.3}, None, "2026-11-26T08:00:00Z", "/plant/north 42")
    declared = {"format": "cloudevents"}
    assert one(declared, message(CLOUD | {"data": {"values": {"value": 71.3}}})) == want
    assert one(declared, message(CLOUD | {"data": {"value": 71.3}})) == want
    assert one(declared, message(CLOUD | {"data": 71.3})) == want
    packed = base64.b64encode(msgspec.msgpack.encode({"value": 71.3})).decode()
    assert one(declared, message(CLOUD | {"datacontenttype": "application/msgpack", "data_base64": packed})) == want
    assert events(declared, message([CLOUD | {"data": 71.3}, CLOUD | {"data": 71.3}])) == [want, want]


@pytest.mark.parametrize("prefix", ["ce_", "ce-", "cloudEvents_", "cloudEvents:", ""])
def test_a_binary_cloudevent_has_them_in_its_headers_as_each_queue_writes_them(prefix: str) -> None:
    headers = {f"{prefix}{name}": value for name, value in CLOUD.items()} | {"content-type": "application/json; charset=utf-8"}
    sent = Message(b"1", 1, 1.7e9, b'{"value": 71.3}', {name.encode(): value.encode() for name, value in headers.items()})
    assert one({"format": "cloudevents"}, sent) == Event("pump-7", {"value": 71.3}, None, "2026-11-26T08:00:00Z", "/plant/north 42")
    declared = {"format": "cloudevents", "stream_id": "{ce.source}/{ce.subject}", "event_id": "ce.id", "values": {"value": "value"}}
    assert one(declared, sent) == Event("/plant/north/pump-7", {"value": 71.3}, None, "2026-11-26T08:00:00Z", "42")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"specversion": "0.3"}, "specversion"),
        ({"id": ""}, "id"),
        ({"source": 7}, "source"),
        ({"subject": None}, "subject"),
        ({"data": {"value": "hot"}}, "value"),
        ({"data_base64": "%%%"}, "data_base64"),
        ({"data_base64": "AAAA", "datacontenttype": "image/png"}, "datacontenttype"),
    ],
)
def test_what_is_wrong_with_a_cloudevent_is_named(change: dict[str, Any], field: str) -> None:
    assert wrong({"format": "cloudevents"}, message(CLOUD | {"data": {"value": 1}} | change))[0] == field


def test_the_identity_of_a_cloudevent_fits_whatever_its_length() -> None:
    long = one({"format": "cloudevents"}, message(CLOUD | {"id": "4" * 300, "data": 1})).event_id
    other = one({"format": "cloudevents"}, message(CLOUD | {"id": "4" * 301, "data": 1})).event_id
    assert long is not None
    assert len(long) <= 256
    assert long != other


def test_fields_of_a_queue_are_mapped_like_an_object() -> None:
    sent = Message(b"1", 1, 1.7e9, None, {b"plant": b"north", b"value": b"1.5", b"at": b"1700000000000"})
    declared = {"stream_id": "{plant}", "timestamp": "at", "timestamp_unit": "ms", "values": {"value": "value"}}
    assert one(declared, sent) == Event("north", {"value": 1.5}, None, 1.7e9)


def test_limits_are_named() -> None:
    with pytest.raises((TooLarge, BadEvent), match="More than 10 events"):
        events({}, message([{"stream_id": "a", "values": {"value": 1}}] * 11))
    with pytest.raises(TooLarge, match="More than 10 events"):
        events({"stream_id": "s", "values": "v"}, message([{"s": "a", "v": 1}] * 11))
    assert wrong({}, message({}, position=POSITIONS))[0] == "id"


def test_a_message_has_no_more_events_than_positions_tell_apart_whatever_the_limit_is() -> None:
    content = b"[" + b",".join([b'{"values":{"value":1}}'] * (MAX_EVENTS + 1)) + b"]"
    for declared in (Payload(), Payload(each=".", stream_id="{topic}")):
        with pytest.raises((BadEvent, TooLarge), match=f"More than {MAX_EVENTS} events"):
            Mapper(declared, max_events=10 * MAX_EVENTS).events(message(content))


def test_whatever_comes_is_an_event_or_named_and_never_a_bug() -> None:
    contents: list[Any] = [
        None,
        1,
        "x",
        [],
        {},
        [[]],
        [None],
        {"s": None, "v": {}},
        {"s": {}, "v": 1},
        {"s": "a", "v": [1]},
        {"s": 1e400, "v": 1},
    ]
    raw = [
        b"",
        b"\x00",
        b"\xff\xfe",
        b"[" * 2000,
        b'{"s": "\\ud800", "v": 1}',
        b"1" * 5000,
        *(json.dumps(content).encode() for content in contents),
    ]
    for form in ("json", "ndjson", "msgpack", "cloudevents", "number"):
        declared = {"format": form, "stream_id": "s"} | ({"values": "v"} if form != "number" else {})
        for content in raw:
            try:
                found = events(declared, message(content))
            except BadEvent:
                continue
            assert all(isinstance(item, Event | BadEvent) for item in found)


@pytest.mark.parametrize("huge", ["9" * 350, "-" + "9" * 350, '"' + "9" * 350 + '"'])
@pytest.mark.parametrize("declared", [{"values": "v", "missing": [-9999]}, {"values": "w", "good": {"v": [192]}}])
def test_a_number_beyond_all_of_ours_is_no_bug_where_words_are_declared(declared: dict[str, Any], huge: str) -> None:
    sent = f'[{{"s": "a", "v": {huge}, "w": 1}}, {{"s": "b", "v": 192, "w": 192}}]'
    bad, good = events({"stream_id": "s"} | declared, message(sent.encode()))
    assert isinstance(bad, BadEvent | NoReading)
    assert isinstance(good, Event)
    assert good.values == {"value": 192}


# ── log lines ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_text_is_a_line_of_the_stream_that_topic_or_key_names() -> None:
    text = {"format": "text", "topic": "logs/{host}/#", "stream_id": "{host}"}
    assert one(text, message(b"Took 12.5 ms\n  at line 3\n", topic="logs/web-1/app")) == Event("web-1", None, "Took 12.5 ms\n  at line 3")
    assert one({"format": "text"}, message(b'{"not": "read"}', key="web-1")) == Event("web-1", None, '{"not": "read"}')
    assert one({"format": "text"}, message(b"caf\xe9", key="a")).message == "caf\ufffd"
    at = one({"format": "text", "timestamp": "headers.time", "timestamp_unit": "ms"}, message(b"x", key="a", time="1700000000500"))
    assert at.timestamp == 1700000000.5


def test_a_line_is_made_from_the_fields_that_are_declared() -> None:
    sent = message({"log": {"level": "WARN", "msg": "Disk sda is 93 percent full"}, "host": "web-1", "values": {"n": 1}})
    assert one({"stream_id": "host", "message": "log.msg"}, sent) == Event("web-1", None, "Disk sda is 93 percent full")
    assert one({"stream_id": "host", "message": "{log.level} {log.msg}"}, sent).message == "WARN Disk sda is 93 percent full"
    assert one({"stream_id": "host"}, message({"host": "a", "message": "own"})) == Event("a", None, "own")
    assert one({"stream_id": "host"}, message({"host": "a", "message": None, "values": {"v": 1}})) == Event("a", {"v": 1})
    assert wrong({"stream_id": "host", "message": "log.text"}, sent) == ("log.text", "")
    assert wrong({"stream_id": "host", "message": "log"}, sent)[0] == "log"


def test_fields_of_a_queue_are_a_line_where_one_is_declared() -> None:
    assert one({"message": "line", "stream_id": "host"}, message(None, line="Took 3 ms", host="a")) == Event("a", None, "Took 3 ms")


@pytest.mark.parametrize(
    ("said", "ends"), [(True, True), ("true", True), (1, True), (False, False), ("", False), (None, False), ("0", False)]
)
def test_a_session_ends_after_the_line_where_the_message_says_so(said: Any, ends: bool) -> None:
    declared = {"stream_id": "request", "message": "msg", "event_id": "id", "sequence": "n", "end": "last"}
    found = events(declared, message({"request": "r1", "msg": "bye", "id": "7", "n": 3, "last": said}))
    line = Event("r1", None, "bye", None, "7", 3)
    assert found == ([line, Event("r1", event_id="7/end", end=True)] if ends else [line])


def test_an_end_may_come_by_itself_and_is_false_where_nothing_is_said() -> None:
    assert one({"stream_id": "r", "timestamp": "t"}, message({"r": "r1", "end": True, "t": 5})) == Event("r1", None, None, 5, end=True)
    assert one({"stream_id": "r", "message": "m", "end": "last"}, message({"r": "r1", "m": "x"})) == Event("r1", None, "x")
    assert one({"stream_id": "stream_id"}, message(None, stream_id="r1", end="true")) == Event("r1", end=True)
    assert wrong({"stream_id": "r", "message": "m", "end": "last"}, message({"r": "r1", "m": "x", "last": "maybe"})) == ("last", '"maybe"')
    assert wrong({"stream_id": "r", "message": "m", "end": "last"}, message({"r": "r1", "m": "x", "last": [1]}))[0] == "last"


def test_readings_may_have_a_field_called_end() -> None:
    assert one({"stream_id": "h", "values": {"v": "v"}, "timestamp": "end"}, message({"h": "a", "v": 1.5, "end": 60})) == Event(
        "a", {"v": 1.5}, None, 60
    )
    assert one({"stream_id": "h", "values": {"e": "end"}}, message({"h": "a", "end": 2})) == Event("a", {"e": 2})


def test_a_line_with_the_end_of_its_session_is_two_events_of_one_message() -> None:
    mapper = Mapper(Payload(stream_id="r", message="m", end="last"), max_events=10)
    assert mapper.events(message({"r": "a", "m": "x"}))[1]
    found, bare = mapper.events(replace(message({"r": "a", "m": "x", "last": True}), event_id="amqp-1"))
    assert [event.event_id for event in found if isinstance(event, Event)] == ["amqp-1/0", "amqp-1/1"]
    assert not bare
