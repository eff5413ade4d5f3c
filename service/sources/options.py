"""What can be declared of a source (ONSET_SOURCES): one validated list, in a file or inline, shared by all kinds of sources.

    - type: kafka | nats | mqtt | amqp | redis_streams | http
      name, model                            of every source
      fuse                                   of every queue
      payload: {format, stream_id, ...}      how an event is read from a message, the same everywhere (mapping.py)
      ...                                    what only this kind has

Queues are read; to an address (http) others send. Nothing here needs a queue's client: a wrong value stops the service before anything
is opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from service.errors import BadSetting
from service.events import MAX_NAME_LENGTH, shown
from service.sources.templates import Pattern, Template

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TAG = re.compile(r"[a-z0-9_-]{1,64}")
FormatName = Literal["json", "ndjson", "msgpack", "cloudevents", "influx", "number", "text"]
TimeUnit = Literal["s", "ms", "us", "ns"]
KAFKA_OWN = frozenset(
    {
        "bootstrap.servers",
        "group.id",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "auto.offset.reset",
        "partition.assignment.strategy",
        "enable.idempotence",
        "acks",
        "log_level",
    }
)
"""Settings of librdkafka that delivery rests on."""
NonEmpty = Annotated[str, Field(min_length=1)]
Word = bool | int | str


class Declared(BaseModel):
    """Frozen, and unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Payload(Declared):
    """How a message becomes events. With nothing declared it is one or several events as POST /v1/events takes them.

    A reference is a dotted path in the payload (`data.0.temperature`), or `key`, `topic`, `headers.NAME`, `ce.ATTRIBUTE` of a CloudEvent,
    or a name of the topic pattern; `payload.PATH` where a field's name is one of these. A template has references in braces.
    """

    format: FormatName = "json"
    each: str | Annotated[tuple[NonEmpty, ...], Field(min_length=1)] = ""
    """Reference to a list of events within the payload, or to an object of which each number is one, with `name` and `value`; `.` = the
    payload itself. All else is then within such an event, but for `payload.PATH`, which is of the whole payload. Several: one within
    the other, and `payload.PATH` is of what the innermost one is in.
    """
    topic: str = ""
    """Pattern of the topic, subject or routing key whose levels have names: plant/{line}/{sensor}/value."""
    stream_id: str = ""
    """Reference or template: {plant}/{line}/{sensor}. Default: the payload's stream_id, or else the message's key."""
    timestamp: str = ""
    """Reference. Default: the payload's timestamp, or else the time at which the message came to the queue."""
    timestamp_unit: TimeUnit = "s"
    """Of times that are numbers; of `influx` nanoseconds where nothing else is declared."""
    values: str | dict[Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)], NonEmpty] = ""
    """Feature → reference, or one reference to an object of numbers. Default: the payload's values."""
    feature: Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH)] = "value"
    """What a number by itself is the value of."""
    missing: tuple[float | str, ...] = ()
    """Numbers and words that stand for no reading: -9999, Bad. An event of which no reading is left is passed over."""
    good: dict[NonEmpty, tuple[Word, ...] | Word] = Field(default_factory=dict, max_length=1)
    """Reference to a quality → what it says of a good reading. Events of another are passed over."""
    message: str = ""
    """Reference or template of a log line. Default: the payload's message; of `text` all of it."""
    end: str = ""
    """Reference: where it is true the session ends, after the message's line if there is one. Default: the payload's end."""
    event_id: str = ""
    """Reference or template. Default: the payload's event_id; of a CloudEvent source and id."""
    sequence: str = ""
    """Reference. Default: the payload's sequence."""

    @property
    def plain(self) -> bool:
        """Whether nothing is mapped: messages hold events as REST takes them."""
        return self.format in ("json", "ndjson", "msgpack") and self.timestamp_unit == "s" and not self._mapped

    @property
    def _mapped(self) -> bool:
        read = self.timestamp or self.values or self.missing or self.good or self.message or self.end or self.event_id or self.sequence
        return bool(self.each or self.topic or self.stream_id or read)

    @property
    def nested(self) -> tuple[str, ...]:
        """What `each` names, the outermost first."""
        return self.each if isinstance(self.each, tuple) else (self.each,) if self.each else ()

    @model_validator(mode="before")
    @classmethod
    def _of_influx(cls, declared: Any) -> Any:
        """With what is meant where nothing else is declared of InfluxDB's lines: a stream for each field of a series, and nanoseconds."""
        if not isinstance(declared, dict) or declared.get("format") != "influx":
            return declared
        mapped = any(declared.get(name) for name in ("each", "values", "message"))
        whole = (
            {"stream_id": "{payload.series}"} if mapped else {"stream_id": "{payload.series}/{name}", "each": "fields", "values": "value"}
        )
        return {"timestamp_unit": "ns"} | whole | declared

    @field_validator("stream_id", "event_id", "message")
    @classmethod
    def _is_a_template(cls, text: str) -> str:
        if text:
            Template(text)
        return text

    @field_validator("topic")
    @classmethod
    def _is_a_pattern(cls, text: str) -> str:
        if text:
            Pattern(text)
        return text

    @model_validator(mode="after")
    def _fits_the_format(self) -> Self:
        if self.format == "number":
            for name in ("each", "values", "timestamp", "sequence", "message", "good"):
                if getattr(self, name):
                    raise ValueError(f"a number by itself has no {name}: leave it out, or choose another format")
        if self.format == "text" and (self.each or self.values or self.message):
            raise ValueError("a text is the line itself: leave each, values and message out, or choose another format")
        if (self.missing or self.good) and (self.message or self.format == "text"):
            raise ValueError("missing and good are of readings, not of lines: leave them out")
        if self.values and self.message:
            raise ValueError("a message has values or is a line: declare one of values and message")
        if self.timestamp_unit != "s" and self.format == "number":
            raise ValueError("a number by itself has no timestamp, so no timestamp_unit")
        return self


class Source(Declared):
    """What every source has."""

    name: str = ""
    """As metrics and logs call it; must differ between sources. Default: its type."""
    model: str = ""
    """Which model scores it. Default: the service's default one."""
    payload: Payload = Payload()
    keyed: ClassVar[bool] = False
    """Whether a message's key names its stream where nothing else does."""

    @property
    def called(self) -> str:
        return self.name or str(getattr(self, "type"))  # noqa: B009

    @field_validator("name")
    @classmethod
    def _is_a_tag(cls, name: str) -> str:
        if name and not _TAG.fullmatch(name):
            raise ValueError("a name has small letters, digits, - and _, 64 at most")
        return name

    @field_validator("payload")
    @classmethod
    def _names_its_stream(cls, payload: Payload) -> Payload:
        if payload.format in ("number", "text") and not payload.stream_id and not cls.keyed:
            raise ValueError(f"a {payload.format} by itself does not name its stream: declare stream_id, such as {{topic}}")
        return payload


class Queue(Source):
    """What every source that is read has."""

    fuse: Annotated[float, Field(gt=0, le=1)] = 0.5
    """A partition pauses when more than this share of the recent messages cannot be used; 1 = never."""


class RedisStreamsSource(Queue):
    """Redis Streams in the state store's server; `key`, `group` and so on are what ONSET_STREAMS_… are (docs/queues.md)."""

    type: Literal["redis_streams"] = "redis_streams"
    key: NonEmpty = "onset:events"
    partitions: Annotated[int, Field(ge=1, le=1024)] = 1
    group: NonEmpty = "onset"
    dead_letters: NonEmpty = "onset:dead-letters"
    max_dead_letters: Annotated[int, Field(ge=1)] = 100_000
    keep: bool = False
    batch: Annotated[int, Field(ge=1, le=10_000)] = 1000
    lease_seconds: Annotated[float, Field(ge=0.5, le=300)] = 5


class KafkaSource(Queue):
    """Topics of a Kafka cluster, shared by the replicas of one consumer group."""

    type: Literal["kafka"] = "kafka"
    keyed: ClassVar[bool] = True
    brokers: NonEmpty
    """HOST:PORT of some brokers, with commas between."""
    topics: Annotated[list[NonEmpty], Field(min_length=1)]
    """Names, or regular expressions that begin with ^. Keyed by stream, so that a stream's events are all in one partition."""
    group: NonEmpty = "onset"
    output: str = "onset-results"
    """Topic of the results; empty = none."""
    dead_letters: NonEmpty = "onset-dead-letters"
    start: Literal["earliest", "latest"] = "earliest"
    """Where a group begins that has no offset yet."""
    batch: Annotated[int, Field(ge=1, le=10_000)] = 1000
    """Messages of a partition under way at once; AHEAD times as many wait at most."""
    options: dict[str, str | int | float | bool] = {}
    """Further settings of librdkafka: security.protocol, sasl.username, compression.type, session.timeout.ms, ..."""

    @model_validator(mode="after")
    def _does_not_read_itself(self) -> Self:
        for topic in filter(None, (self.output, self.dead_letters)):
            if any(re.match(own, topic) if own.startswith("^") else own == topic for own in self.topics):
                raise ValueError(f"'{topic}' is read and written by the same source: its results would be its events")
        return self

    @field_validator("options")
    @classmethod
    def _are_not_ours(cls, options: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
        for name in options:
            if name in KAFKA_OWN:
                raise ValueError(f"{name} is the source's own to decide")
        return options


class NatsSource(Queue):
    """Subjects of a NATS JetStream stream, each read in its order by one replica at a time."""

    type: Literal["nats"] = "nats"
    servers: Annotated[list[NonEmpty], Field(min_length=1)]
    """nats://HOST:PORT, tls://HOST:PORT"""
    subjects: Annotated[list[NonEmpty], Field(min_length=1)]
    """Filters such as plant.line1.>, each a partition. They must not overlap, and a stream's events must all match the same one."""
    stream: str = ""
    """Name of the JetStream stream. Default: the one that takes the first subject."""
    group: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "onset"
    """Shared by the replicas. The durable consumers are called so, with several subjects `group-0`, `group-1`, ..."""
    output: str = "onset.results"
    """Subject of the results, which a JetStream stream must take; empty = none."""
    dead_letters: NonEmpty = "onset.dead-letters"
    start: Literal["earliest", "latest"] = "earliest"
    """Where a group begins that has no consumer yet."""
    batch: Annotated[int, Field(ge=1, le=10_000)] = 500
    """Messages of a partition under way at once; AHEAD times as many wait at most."""
    ack_seconds: Annotated[float, Field(ge=0.2, le=3600)] = 30
    """After this the server delivers again what is not acknowledged; what is under way is kept alive meanwhile."""
    lease_seconds: Annotated[float, Field(ge=0.5, le=300)] = 5
    """A replica not heard of for this long has lost its partitions to the others."""
    user: str = ""
    password: str = ""
    token: str = ""
    credentials: str = ""
    """Path of a .creds file."""
    tls_ca: str = ""
    """Path of the certificates that the servers are checked against. Default: the system's."""

    @model_validator(mode="after")
    def _does_not_read_itself(self) -> Self:
        for subject in filter(None, (self.output, self.dead_letters)):
            if any(meet(own, subject) for own in self.subjects):
                raise ValueError(f"'{subject}' is read and written by the same source: its results would be its events")
        return self


class MqttSource(Queue):
    """One session at an MQTT 5 broker; replicas take turns on it. A message's key is its topic."""

    type: Literal["mqtt"] = "mqtt"
    url: NonEmpty
    """mqtt://user:password@host:1883, or mqtts:// for TLS."""
    tls_ca: str = ""
    """Certificates that the broker's is signed by; default: those of the system."""
    topics: Annotated[list[NonEmpty], Field(min_length=1)]
    """Filters: plant/+/temperature, plant/#. They must not overlap, or the broker may send a message twice."""
    session: NonEmpty = "onset"
    """Client id, under which the broker keeps what nobody has acknowledged."""
    session_expiry_seconds: Annotated[int, Field(ge=60, le=2**32 - 1)] = 7 * 24 * 3600
    """How long the broker keeps it while no replica is connected."""
    keepalive_seconds: Annotated[int, Field(ge=5, le=65_535)] = 15
    batch: Annotated[int, Field(ge=1, le=5_000)] = 1000
    """Messages scored at once at most; the broker sends twice as many ahead."""
    lease_seconds: Annotated[float, Field(ge=0.5, le=300)] = 5
    """A replica not heard of for this long has lost the session to another one."""
    dead_letters: NonEmpty = "onset/dead-letters"
    """Topic."""
    output: str = ""
    """Topic, such as onset/results/{stream_id}; empty = results are not published."""
    keyed: ClassVar[bool] = True

    @property
    def receive_maximum(self) -> int:
        return 2 * self.batch

    @field_validator("url")
    @classmethod
    def _is_mqtt(cls, url: str) -> str:
        return _with_scheme(url, "mqtt", "mqtts")

    @field_validator("topics")
    @classmethod
    def _are_filters(cls, topics: list[str]) -> list[str]:
        for topic in topics:
            levels = topic.split("/")
            if topic.startswith("$share/"):
                raise ValueError(
                    f"'{topic}' is shared: replicas would have each stream's messages in any order; they share a session instead"
                )
            if any(("#" in level or "+" in level) and len(level) > 1 for level in levels) or "#" in levels[:-1]:
                raise ValueError(f"'{topic}' is no filter: + stands for one whole level, # for all at the end")
        return topics

    @model_validator(mode="after")
    def _does_not_hear_itself(self) -> Self:
        for field, topic in (("output", self.output.replace("{stream_id}", "x")), ("dead_letters", self.dead_letters)):
            if "+" in topic or "#" in topic:
                raise ValueError(f"{field} is '{topic}', which nothing can be published to: it has a wildcard")
            if (heard := next((one for one in self.topics if topic and lets_through(one, topic)), None)) is not None:
                raise ValueError(f"{field} is '{topic}', which '{heard}' would read again")
        return self


class AmqpSource(Queue):
    """Queues of a RabbitMQ, or of another AMQP 0-9-1 broker; each is a partition."""

    type: Literal["amqp"] = "amqp"
    url: NonEmpty
    """amqp://user:password@host:5672/vhost, or amqps:// for TLS."""
    queues: Annotated[list[NonEmpty], Field(min_length=1)]
    """Made (durable) where they are missing. A stream's messages must all go to one of them."""
    exchange: str = ""
    """A queue that is made is bound to this exchange; empty = it has the messages that are sent to its name."""
    binding_keys: Annotated[list[str], Field(min_length=1)] = ["#"]
    """Routing keys of that binding."""
    single_active_consumer: bool = False
    """Whether the queues have x-single-active-consumer, so that replicas stand in line; otherwise the first has an exclusive consumer."""
    batch: Annotated[int, Field(ge=1, le=10_000)] = 500
    """Messages scored at once at most; the broker sends twice as many ahead (prefetch)."""
    dead_letters: NonEmpty = "onset.dead-letters"
    """A queue, made where it is missing."""
    output: str = ""
    """Exchange, a topic exchange where it is made; empty = results are not published."""
    output_key: str = "{stream_id}"
    """Their routing key."""

    @field_validator("url")
    @classmethod
    def _is_amqp(cls, url: str) -> str:
        return _with_scheme(url, "amqp", "amqps")

    @field_validator("queues")
    @classmethod
    def _are_several(cls, queues: list[str]) -> list[str]:
        if len(set(queues)) < len(queues):
            raise ValueError("a queue is named twice")
        return queues

    @model_validator(mode="after")
    def _does_not_hear_itself(self) -> Self:
        if self.dead_letters in self.queues:
            raise ValueError(f"dead_letters is '{self.dead_letters}', which is read again")
        return self


class HttpSource(Source):
    """An address that others send to, POST /v1/sources/{name}. A message's topic, and its key, is what follows the name in the address."""

    type: Literal["http"] = "http"
    keyed: ClassVar[bool] = True
    name: NonEmpty


AnyQueue = RedisStreamsSource | KafkaSource | NatsSource | MqttSource | AmqpSource
AnySource = Annotated[AnyQueue | HttpSource, Field(discriminator="type")]
_sources: TypeAdapter[list[AnySource]] = TypeAdapter(list[AnySource])


def meet(one: str, other: str) -> bool:
    """Whether some NATS subject matches both filters; a subject is one, too."""
    for a, b in zip_longest(one.split("."), other.split(".")):
        if a is None or b is None:
            return False
        if ">" in (a, b):
            return True
        if a != b and "*" not in (a, b):
            return False
    return True


def read(given: str, environment: Mapping[str, str] = os.environ) -> list[AnySource]:
    """The sources that ONSET_SOURCES names: a JSON list, or the path of a file with a YAML or JSON list. Raises BadSetting.

    `${NAME}` within a text is the environment's NAME, so that no password need be in the file.
    """
    if not given.strip():
        return []
    inline = given.lstrip().startswith("[")
    where = "ONSET_SOURCES" if inline else f"ONSET_SOURCES ({given})"
    try:
        content = json.loads(given) if inline else yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSetting(f"{where} cannot be read: {error.strerror}. It is a JSON list of sources, or a file with one.") from error
    except (ValueError, yaml.YAMLError) as error:
        raise BadSetting(f"{where} is not {'JSON' if inline else 'YAML'}: {' '.join(str(error).split())}.") from error
    if not isinstance(content, list):
        raise BadSetting(f"{where} is a list of sources, not {shown(content)}.")
    try:
        sources = _sources.validate_python(_filled(content, environment, where))
    except ValidationError as error:
        raise BadSetting(_sentence(where, content, error)) from error
    _differ(where, sources)
    return sources


def _filled(content: Any, environment: Mapping[str, str], where: str) -> Any:
    """The same with the environment's values in place of `${NAME}`."""

    def value_of(found: re.Match[str]) -> str:
        if (value := environment.get(found[1])) is None:
            raise BadSetting(f"{where} names ${{{found[1]}}}, which the environment does not have.")
        return value

    if isinstance(content, str):
        return _VARIABLE.sub(value_of, content)
    if isinstance(content, list):
        return [_filled(item, environment, where) for item in content]
    if isinstance(content, dict):
        return {name: _filled(item, environment, where) for name, item in content.items()}
    return content


def _sentence(where: str, content: Sequence[Any], error: ValidationError) -> str:
    """The first thing that is wrong, by source and field. Its value is shown unless it may be a secret."""
    first = error.errors()[0]
    index, *path = first["loc"]
    entry = content[int(index)] if isinstance(index, int) else None
    kind = entry.get("type", "") if isinstance(entry, dict) else ""
    if first["type"] == "union_tag_not_found":
        kinds = ", ".join(str(source.model_fields["type"].default) for source in get_args(get_args(AnySource)[0]))
        return f"{where}: source {int(index) + 1} has no type; there are {kinds}."
    field = ".".join(str(part) for part in path if part != kind) or "it"
    what = first["msg"].removeprefix("Value error, ")
    got = "" if _secret(field) or isinstance(first["input"], dict) else f"; got {shown(first['input'])}"
    named = f" ({kind})" if isinstance(kind, str) and kind else ""
    return f"{where}: source {int(index) + 1}{named}: {field}: {what}{got}."


def _with_scheme(url: str, *schemes: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError(f"an address is {schemes[0]}://host or {schemes[1]}://host, with user:password@ before the host where needed")
    return url


def lets_through(pattern: str, topic: str) -> bool:
    """Whether an MQTT filter lets a topic through."""
    wanted, levels = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted, levels = wanted[:-1], levels[: len(wanted) - 1]
    return len(wanted) == len(levels) and all(one in ("+", level) for one, level in zip(wanted, levels, strict=True))


def _secret(field: str) -> bool:
    return any(word in field for word in ("password", "token", "secret", "options", "url", "servers"))


def _differ(where: str, sources: Sequence[Source]) -> None:
    seen: set[str] = set()
    for source in sources:
        if source.called in seen:
            raise BadSetting(f"{where}: two sources are called '{source.called}': give each its own name.")
        seen.add(source.called)
