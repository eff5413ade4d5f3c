"""ONSET_SOURCES: one validated list, whose wrong values are named by source and field before anything is opened."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from service import queues
from service.app import DOORS, Service
from service.errors import BadSetting
from service.settings import Settings
from service.sources import options
from service.sources.options import MqttSource, RedisStreamsSource
from service.sources.templates import Pattern, Template
from tests.tiny import build_tiny
from tests.tiny_log import build_tiny_log


def test_a_file_and_inline_json_say_the_same(tmp_path: Path) -> None:
    given = [
        {"type": "redis_streams", "name": "plant", "key": "in", "fuse": 0.2, "payload": {"stream_id": "{line}/{sensor}", "values": "v"}}
    ]
    as_yaml = tmp_path / "sources.yaml"
    as_yaml.write_text(
        "- type: redis_streams\n  name: plant\n  key: in\n  fuse: 0.2\n  payload:\n    stream_id: '{line}/{sensor}'\n    values: v\n"
    )
    as_json = tmp_path / "sources.json"
    as_json.write_text(json.dumps(given))
    [want] = options.read(json.dumps(given))
    assert isinstance(want, RedisStreamsSource)
    assert (want.called, want.key, want.fuse, want.payload.plain) == ("plant", "in", 0.2, False)
    assert options.read(str(as_yaml)) == options.read(str(as_json)) == [want]
    assert options.read("  ") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "is not JSON"),
        ("missing.yaml", "cannot be read"),
        ('[{"type": "pigeon"}]', "source 1 (pigeon)"),
        ("[{}]", "source 1"),
        ("[7]", "source 1"),
        ('[{"type": "redis_streams", "speed": 1}]', "source 1 (redis_streams): speed: Extra inputs are not permitted; got 1."),
        ('[{"type": "redis_streams"}, {"type": "redis_streams", "name": "b", "fuse": 2}]', "source 2 (redis_streams): fuse:"),
        ('[{"type": "redis_streams", "name": "Big Name"}]', "source 1 (redis_streams): name: a name has small letters"),
        ('[{"type": "redis_streams"}, {"type": "redis_streams"}]', "two sources are called 'redis_streams'"),
        ('[{"type": "redis_streams", "payload": {"stream_id": "{a"}}]', "payload.stream_id: '{a' has a brace without its partner"),
        ('[{"type": "redis_streams", "payload": {"topic": "a/{b}/{b}"}}]', "payload.topic: 'a/{b}/{b}' has a name twice"),
        ('[{"type": "redis_streams", "payload": {"format": "number", "stream_id": "topic", "values": "v"}}]', "no values"),
        ('[{"type": "redis_streams", "payload": {"format": "number"}}]', "payload: a number by itself does not name its stream"),
        ('[{"type": "redis_streams", "payload": {"format": "text"}}]', "payload: a text by itself does not name its stream"),
        ('[{"type": "redis_streams", "payload": {"format": "text", "message": "m"}}]', "a text is the line itself"),
        ('[{"type": "redis_streams", "payload": {"message": "m", "values": "v"}}]', "declare one of values and message"),
        ('[{"type": "redis_streams", "payload": {"message": "{m"}}]', "payload.message: '{m' has a brace without its partner"),
        ('[{"type": "http"}]', "source 1 (http): name: Field required"),
        ('[{"type": "http", "name": "gateway", "fuse": 1}]', "source 1 (http): fuse: Extra inputs are not permitted; got 1."),
        ('[{"type": "http", "name": "gateway", "payload": {"each": []}}]', "source 1 (http): payload.each"),
        ('[{"type": "kafka", "topics": ["a"]}]', "source 1 (kafka): brokers: Field required"),
        ('[{"type": "kafka", "brokers": "b", "topics": []}]', "source 1 (kafka): topics: List should have at least 1 item"),
        ('[{"type": "kafka", "brokers": "b", "topics": ["^onset"]}]', "'onset-results' is read and written by the same source"),
        ('[{"type": "kafka", "brokers": "b", "topics": ["a"], "options": {"acks": "1"}}]', "options: acks is the source's own to decide"),
        ('[{"type": "nats", "servers": ["n"], "subjects": ["onset.>"]}]', "'onset.results' is read and written by the same source"),
        ('[{"type": "nats", "servers": ["n"], "subjects": ["*.results"]}]', "'onset.results' is read and written by the same source"),
        ('[{"type": "nats", "servers": ["n"], "subjects": ["a"], "group": "a.b"}]', "source 1 (nats): group:"),
        ('[{"servers": ["n"]}]', "source 1 has no type; there are redis_streams, kafka, nats, mqtt, amqp, http."),
        ('[{"type": "redis_streams", "key": "${NOWHERE_TO_BE_FOUND}"}]', "${NOWHERE_TO_BE_FOUND}, which the environment does not have"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(content: str, said: str) -> None:
    with pytest.raises(BadSetting) as caught:
        options.read(content)
    assert caught.value.detail.startswith("ONSET_SOURCES")
    assert said in caught.value.detail
    assert caught.value.detail.endswith(".")


def test_what_may_be_a_secret_is_not_in_the_sentence() -> None:
    with pytest.raises(BadSetting) as caught:
        options.read('[{"type": "nats", "servers": ["n"], "subjects": ["a"], "password": {"is": "s3cret"}}]')
    assert "password" in caught.value.detail
    assert "s3cret" not in caught.value.detail


@pytest.mark.parametrize("path", sorted(Path("sources").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_of_a_source_is_one_that_starts(path: Path) -> None:
    [source] = options.read(str(path))
    assert source.type in (path.stem, {"rabbitmq": "amqp"}.get(path.stem))


MQTT = {"type": "mqtt", "url": "mqtt://u:p%40ss@broker:1884", "topics": ["plant/+/temperature", "line/#"]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "http://broker"}, "url: an address is mqtt://host or mqtts://host"),
        ({"url": "mqtt://"}, "url: an address is mqtt://host"),
        ({"topics": []}, "topics:"),
        ({"topics": ["a/#/b"]}, "topics: 'a/#/b' is no filter"),
        ({"topics": ["a/b+"]}, "topics: 'a/b+' is no filter"),
        ({"topics": ["$share/g/a"]}, "topics: '$share/g/a' is shared"),
        ({"output": "plant/{stream_id}/temperature"}, "output is 'plant/x/temperature', which 'plant/+/temperature' would read again"),
        ({"dead_letters": "line/dead"}, "dead_letters is 'line/dead', which 'line/#' would read again"),
        ({"output": "out/#"}, "output is 'out/#', which nothing can be published to"),
        ({"batch": 100_000}, "batch:"),
    ],
)
def test_what_is_wrong_with_an_mqtt_source_is_said_and_no_password_is(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSetting) as caught:
        options.read(json.dumps([MQTT | given]))
    assert said in caught.value.detail
    assert "p%40ss" not in caught.value.detail


def test_a_topic_names_its_stream_and_the_broker_sends_twice_a_batch_ahead() -> None:
    [source] = options.read(json.dumps([MQTT | {"payload": {"format": "number"}, "batch": 50}]))
    assert isinstance(source, MqttSource)
    assert source.receive_maximum == 100


@pytest.mark.parametrize(
    ("pattern", "topic", "heard"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "a/b", True),
        ("+/b/#", "a/c/d", False),
        ("a/b", "a", False),
    ],
)
def test_a_filter_lets_topics_through(pattern: str, topic: str, heard: bool) -> None:
    assert options.lets_through(pattern, topic) == heard


AMQP = {"type": "amqp", "url": "amqp://u:s3cret@broker/plant", "queues": ["a", "b"]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "mqtt://broker"}, "url: an address is amqp://host or amqps://host"),
        ({"queues": []}, "queues:"),
        ({"queues": ["a", "a"]}, "queues: a queue is named twice"),
        ({"dead_letters": "b"}, "dead_letters is 'b', which is read again"),
        ({"exchange": "plant", "binding_keys": []}, "binding_keys:"),
        ({"batch": 0}, "batch:"),
        ({"payload": {"format": "number"}}, "payload: a number by itself does not name its stream"),
    ],
)
def test_what_is_wrong_with_an_amqp_source_is_said_and_no_password_is(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSetting) as caught:
        options.read(json.dumps([AMQP | given]))
    assert said in caught.value.detail
    assert "s3cret" not in caught.value.detail


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    path.write_text("type: redis_streams")
    with pytest.raises(BadSetting, match="is a list of sources"):
        options.read(str(path))
    path.write_text("a: [")
    with pytest.raises(BadSetting, match="is not YAML"):
        options.read(str(path))


def test_the_environment_fills_in_what_need_not_be_in_the_file() -> None:
    [source] = options.read('[{"type": "redis_streams", "key": "in-${LINE}-${PART}"}]', {"LINE": "7", "PART": "a"})
    assert isinstance(source, RedisStreamsSource)
    assert source.key == "in-7-a"


def test_the_short_way_is_one_more_source() -> None:
    listed = json.dumps([{"type": "redis_streams", "name": "other", "key": "in"}])
    short, other = queues.declared(Settings(streams_input="events", streams_batch=7, sources=listed))
    assert (short.called, other.called) == ("redis_streams", "other")
    assert isinstance(short, RedisStreamsSource)
    assert (short.key, short.batch) == ("events", 7)
    with pytest.raises(BadSetting, match="give that one another name"):
        queues.declared(Settings(streams_input="events", sources='[{"type": "redis_streams"}]'))


def test_no_source_is_called_as_a_door_is_in_the_metrics(tiny_model_path: Path) -> None:
    for name in DOORS:
        with pytest.raises(BadSetting, match=f"called '{name}', as a door of the service"):
            Service(Settings(model=tiny_model_path, sources=json.dumps([{"type": "http", "name": name}])))


@pytest.mark.parametrize("settings", [{"streams_input": "events"}, {"sources": '[{"type": "redis_streams", "key": "events"}]'}])
def test_redis_streams_and_a_cluster_are_refused_together(settings: dict[str, Any]) -> None:
    with pytest.raises(BadSetting, match="'events' and ONSET_REDIS_CLUSTER"):
        queues.declared(Settings(redis_cluster=True, redis_url="redis://a", **settings))


def test_a_template_is_filled_and_a_text_without_braces_is_one_reference() -> None:
    template = Template("{plant}/line {line}!")
    assert (template.references, template.filled(("n", "7"))) == (("plant", "line"), "n/line 7!")
    assert (Template("a.b").references, Template("a.b").filled(("x",))) == (("a.b",), "x")
    for bad in ("{}", "{ a }", "a}", "{a}}"):
        with pytest.raises(ValueError, match="brace"):
            Template(bad)


@pytest.mark.parametrize(
    ("pattern", "topic", "levels"),
    [
        ("plant/{line}/{sensor}/value", "plant/7/p.1/value", {"line": "7", "sensor": "p.1"}),
        ("plant/{line}/{sensor}/value", "plant/7/value", None),
        ("plant.{line}.{sensor}", "plant.7.a/b", {"line": "7", "sensor": "a/b"}),
        ("plant.{line}.{sensor}", "plant.7.a.b", None),
        ("+/{line}/#", "x/7/a/b", {"line": "7"}),
        ("*.{line}.>", "x.7.a.b", {"line": "7"}),
        ("+/{line}/#", "x/7", None),
        ("line-{line}/{sensor}", "line-7/a", {"line": "7", "sensor": "a"}),
        ("{whole}", "a", {"whole": "a"}),
    ],
)
def test_a_pattern_names_levels_of_a_topic(pattern: str, topic: str, levels: dict[str, str] | None) -> None:
    assert Pattern(pattern).match(topic) == levels


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("plant.>", "plant.line1.>", True),
        ("plant.*.temperature", "plant.line1.>", True),
        ("plant.*", "*.line1", True),
        ("plant.line1", "plant.line1", True),
        ("plant.>", "plant", False),
        ("plant.*", "plant.line1.a", False),
        ("plant.*.pressure", "plant.line1.temperature", False),
        ("plant.>", "other.>", False),
    ],
)
def test_filters_of_subjects_meet_where_some_subject_matches_both(one: str, other: str, both: bool) -> None:
    assert options.meet(one, other) is options.meet(other, one) is both


@pytest.mark.parametrize("bad", ["a/{b", "a/{1}", "a//b", "a/#/b", "a/x+"])
def test_a_pattern_that_means_nothing_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="has"):
        Pattern(bad)


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (
            {"payload": {"values": {"temp": "t", "value": "v"}}},
            "model 'tiny' has no feature 'temp', which payload declares; it knows 'value'.",
        ),
        ({"payload": {"format": "number", "feature": "temp", "stream_id": "key"}}, "model 'tiny' has no feature 'temp'"),
        ({"payload": {"message": "m"}}, "model 'tiny' takes numbers, and payload declares a log line"),
        ({"payload": {"format": "text", "stream_id": "key"}}, "model 'tiny' takes numbers"),
        ({"model": "tiny-log", "payload": {"values": "v"}}, "model 'tiny-log' takes log lines, and payload declares numbers"),
        ({"model": "other"}, "names the model 'other', which is not loaded."),
        ({"key": "onset:results"}, "reads 'onset:results', which its results go to: they would be its events."),
        ({"key": "in", "partitions": 2, "dead_letters": "in:{1}"}, "reads 'in:{1}', which its dead letters go to"),
    ],
)
async def test_a_source_of_which_nothing_could_be_scored_stops_the_service(tmp_path: Path, declared: dict[str, Any], says: str) -> None:
    build_tiny(tmp_path)
    build_tiny_log(tmp_path)
    sources = json.dumps([{"type": "redis_streams"} | declared])
    with pytest.raises(BadSetting, match=re.escape(says)):
        async with Service(Settings(sources=sources, model=tmp_path, default_model="tiny", data_dir=tmp_path / "data")).running():
            pass


def test_the_examples_of_the_documentation_are_sources_that_start(tmp_path: Path) -> None:
    docs = Path(__file__).parents[1] / "docs" / "queues.md"
    started = []
    for example in docs.read_text().split("```yaml\n")[1:]:
        (tmp_path / "sources.yaml").write_text(example.partition("```")[0])
        passwords = dict.fromkeys(("KAFKA_PASSWORD", "MQTT_PASSWORD", "AMQP_PASSWORD"), "secret")
        started.append([source.type for source in options.read(str(tmp_path / "sources.yaml"), passwords)])
    assert started == [["redis_streams"], ["mqtt"] * 4, ["kafka", "nats", "mqtt"], ["kafka"], ["nats"], ["mqtt"], ["amqp"]]
