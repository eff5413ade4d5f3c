"""Everything an operator can set, from the environment (prefix ONSET_) or the command line. Read by the composition root alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.asking import LARGEST_ALPHA, SHIPPED_MODELS, SMALLEST_ALPHA, WRITTEN_BACK, Provider, per_event
from service.logs import LogLevel

CENTURY = 100 * 365 * 24 * 3600
"""Seconds: a longer time to live the store would refuse, event by event."""
TEBIBYTE = 1024**4
_PASSWORD = re.compile(r"//.*@")
"""What stands before the host of an address, or of the last of several; a password may have a / that should have been %2F."""


class Settings(BaseSettings):
    """Validated at start; an unusable value stops the service with a message that names it."""

    model_config = SettingsConfigDict(env_prefix="ONSET_", frozen=True, extra="forbid", protected_namespaces=())

    host: str = "127.0.0.1"
    """Address to listen on; the image listens on all, 0.0.0.0."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """0 = any free one."""
    allowed_hosts: str = ""
    """Names that the service is reached by, with commas between, beside localhost, addresses and `public_url`; other Hosts are refused.
    Empty: any name, also that of a page elsewhere which is made to lead here (docs/deploy.md)."""
    model: Path = SHIPPED_MODELS
    """A model file, or a folder of them; several with commas between. The word `shipped` stands for the detector that ships."""
    default_model: str = "default"
    """Which model scores when a request names none; with one model loaded, that one."""
    redis_url: str = ""
    """Empty: an embedded valkey-server is started and supervised."""
    redis_cluster: bool = False
    """Whether `redis_url` is of a Redis Cluster: of one of its nodes, or of several with commas between. Not for Redis Streams."""
    instance: str = ""
    """What is restarted by itself after a crash: a pod's uid. Such a restart brings no old model file back into force (docs/deploy.md)."""
    data_dir: Path = Path("onset-data")
    """Where the embedded store keeps its data."""
    alpha: Annotated[float, Field(ge=SMALLEST_ALPHA, lt=LARGEST_ALPHA)] = 0.001
    """The asked false-alarm rate: false onsets per event of a normal stream. Until it is changed by PUT /v1/policy."""
    cadence_seconds: Annotated[float | None, Field(gt=0)] = None
    """Seconds between two events of a stream, for `false_alarms`."""
    false_alarms: str = ""
    """The same rate for people: "1 per week" (hour, day, week, month, year) and stream; needs `cadence_seconds`, replaces alpha."""
    strict: bool = False
    """Keep to alpha from the first event on; otherwise a new stream may spend a stated learning allowance on top (docs/api.md)."""
    silence: bool = True
    """Whether a live stream that is silent for improbably long is raised."""
    accept_after: Annotated[float, Field(ge=0)] = 0
    """Seconds (of the events' own time) after which a lasting anomaly is taken for the new normal; 0 = only when someone says so."""
    canary_seconds: Annotated[float, Field(ge=0)] = 300
    """How often the canary looks whether each detector still sees a known fault; 0 = never (docs/monitoring.md)."""
    stream_metrics: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Streams (of each model) with series of their own at /metrics: 3 a stream and 5 a feature; 0 = none (docs/metrics.md)."""
    state_ttl_seconds: Annotated[int, Field(ge=1, le=CENTURY)] = 30 * 24 * 3600
    """A stream silent for this long is forgotten."""
    session_ttl_seconds: Annotated[int, Field(ge=1, le=CENTURY)] = 3600
    """A stream whose session is over (docs/log-doors.md) is forgotten after this, if no new one begins: what a session a stream leaves."""
    result_ttl_seconds: Annotated[int, Field(ge=1, le=CENTURY)] = 600
    """How long the results of a bulk can be fetched again by sending it again."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024 * 1024
    """Of one request, unpacked too; larger ones are refused with 413."""
    max_inflight_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024 * 1024
    """Bytes of all requests being read and scored at once, and of wide models' replies; more are refused with 429."""
    max_body_seconds: Annotated[float, Field(gt=0)] = 30
    """How long a body may take to arrive: until then its bytes count as being read."""
    max_batch_events: Annotated[int, Field(ge=1)] = 10_000
    """Events of one request; more are refused with 413."""
    max_queue_events: Annotated[int, Field(ge=1)] = 20_000
    """Events waiting to be scored; more are refused with 429. One sender may take half of what the others leave free."""
    copies_bytes: Annotated[int, Field(ge=0, le=TEBIBYTE)] = 64 * 1024 * 1024
    """Memory for copies of the states written last (1.4 kB a stream with the shipped detector); they save loading, 0 = none."""
    reorder_seconds: Annotated[float, Field(ge=0, le=60)] = 0
    """How long an event may be held for earlier ones of its stream that come after it, and its request with it; 0 = not at all."""
    reorder_events: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Events of one stream held at most."""
    sources: str = ""
    """Queues that events come from (docs/queues.md), and addresses for senders of another kind (docs/http-sources.md): a JSON list, or a
    file with a YAML or JSON list.
    """
    streams_input: str = ""
    """Key of a Redis Stream of events in the store's server (docs/queues.md), such as onset:events; empty = none is read."""
    streams_output: Annotated[str, Field(min_length=1)] = "onset:results"
    """Key of the Redis Stream that the results of those events go to."""
    streams_max_results: Annotated[int, Field(ge=1)] = 1_000_000
    """About how many results it keeps, some 700 bytes each (8 features: 2 kB) of the store's memory."""
    streams_partitions: Annotated[int, Field(ge=1, le=1024)] = 1
    """With several the keys are onset:events:{0}, {1}, …; each is read by one replica at a time."""
    streams_group: Annotated[str, Field(min_length=1)] = "onset"
    """The consumer group."""
    streams_keep: bool = False
    """Leave acknowledged entries in the input (another group reads it too); otherwise they are deleted."""
    streams_dead_letters: Annotated[str, Field(min_length=1)] = "onset:dead-letters"
    """Key of the Redis Stream of entries that cannot be used."""
    streams_max_dead_letters: Annotated[int, Field(ge=1)] = 100_000
    """About how many entries that cannot be used are kept."""
    streams_fuse: Annotated[float, Field(gt=0, le=1)] = 0.5
    """A partition pauses when more than this share of the recent entries cannot be used; 1 = never."""
    streams_batch: Annotated[int, Field(ge=1, le=10_000)] = 1000
    """Entries read at once."""
    streams_lease_seconds: Annotated[float, Field(ge=0.5, le=300)] = 5
    """A replica not heard of for this long has lost its partitions to the others."""
    streams_model: str = ""
    """Which model scores them; empty = the default one."""
    console: bool = True
    """Whether the page at / and what it shows live are served (docs/console.md)."""
    console_bytes: Annotated[int, Field(ge=1024 * 1024, le=TEBIBYTE)] = 160 * 1024 * 1024
    """Memory for the recent events that the page shows, at most; a stream takes it once it speaks (31 kB with the shipped detector)."""
    console_events: Annotated[int, Field(ge=10, le=100_000)] = 600
    """Recent events kept of a stream."""
    console_watchers: Annotated[int, Field(ge=1, le=1000)] = 32
    """Pages that may watch this replica at once; more are refused with 429."""
    backtest_bytes: Annotated[int, Field(ge=1024, le=1024 * 1024 * 1024)] = 32 * 1024 * 1024
    """Size of a CSV that the page takes for a backtest."""
    backtest_rows: Annotated[int, Field(ge=1)] = 100_000
    """Its rows."""
    backtest_seconds: Annotated[float, Field(gt=0)] = 120
    """How long that may take, in a process of its own; then it is ended."""
    prometheus_relabel: Path | None = None
    """YAML file of relabel_configs that choose and name the series which Prometheus sends (docs/prometheus.md); empty = all are scored."""
    prometheus_end_seconds: Annotated[float, Field(ge=0, le=86_400)] = 300
    """How long an open alert outlives its series: a failed scrape marks all series of a target as ended, and most return with the next."""
    prometheus_series: Annotated[int, Field(ge=1)] = 100_000
    """Series whose names are remembered, about 1 kB each; with fewer than are sent, each costs its rules and its name every time."""
    logs_model: str = ""
    """Which model takes the log lines that Loki's and OTLP's doors are sent (docs/log-doors.md); empty = the only one that takes lines."""
    loki_stream: str = ""
    """What names the stream of a line pushed as to Loki: a template of labels and metadata, {namespace}/{pod}; empty = all labels."""
    otlp_stream: str = ""
    """What names the stream of an OTLP record: a template of attributes, {service.name}/{k8s.pod.name}; empty = service and place."""
    max_lines: Annotated[int, Field(ge=1)] = 100_000
    """Log lines that one request of these two may bring."""
    public_url: str = ""
    """Where people reach the service, such as https://onset.example.org: links in alerts begin with it."""
    alerts_resend_seconds: Annotated[float, Field(ge=1, le=3600)] = 60
    """How often the streams of open alerts are looked at, and Alertmanager is told of them again: below its resolve_timeout (5 min)."""
    alerts_max_age_seconds: Annotated[float, Field(gt=0)] = 3600
    """An alert whose event is older than this when it is scored is of the past: it is kept, and told to no sink."""
    alerts_alertmanagers: str = ""
    """URLs of Alertmanagers, with commas between: each is told of all alerts (docs/alerts.md)."""
    alerts_keep_firing_seconds: Annotated[float, Field(ge=0, le=86_400)] = 300
    """How long an alert fires in Alertmanager at least: what is over before its group_wait or group_interval, it tells nobody of."""
    alerts_runbook_url: str = ""
    """Annotation runbook_url of alerts in Alertmanager; empty = none."""
    alerts_webhook: str = ""
    """URL that alerts are posted to, each change by itself."""
    alerts_webhook_secret: SecretStr = SecretStr("")
    """What these requests are signed with (HMAC-SHA256): text of 16 bytes at least, or base64 behind whsec_."""
    alerts_webhook_secret_file: Path | None = None
    """A file that holds it, in place of the setting."""
    alerts_stdout: bool = False
    """Whether alerts are written to the standard output as JSON lines."""
    alerts_least_severity: Literal["minor", "major", "critical"] = "minor"
    """The webhook and the standard output are told of an alert once it has reached this severity."""
    alerts_per_minute: Annotated[int, Field(ge=1)] = 30
    """Alerts of each severity that these two are told of one by one; of more in a minute there is one notice."""
    alerts_give_up_seconds: Annotated[float, Field(gt=0)] = 3600
    """How long the webhook is tried; then a notice is a dead letter."""
    alerts_max_open: Annotated[int, Field(ge=1)] = 20_000
    """Alerts open at once; further ones are logged and counted, and not opened."""
    alerts_max_resolved: Annotated[int, Field(ge=0)] = 10_000
    """Resolved alerts that are kept, the latest."""
    alerts_retention_seconds: Annotated[float, Field(ge=0)] = 7 * 24 * 3600
    """How long resolved alerts are kept, at most `alerts_max_resolved` of them."""
    remote_write_url: str = ""
    """Where scores are written back, such as http://prometheus:9090/api/v1/write (docs/prometheus.md); empty = nowhere."""
    remote_write_headers: Annotated[dict[str, SecretStr], NoDecode] = {}
    """Headers of these requests as JSON: {"authorization": "Bearer ...", "x-scope-orgid": "a"}."""
    remote_write_metrics: str = "anomaly_score,onset_anomaly,yhat,yhat_lower,yhat_upper"
    """Which series are written; there are alert_score and y, too."""
    remote_write_queue_events: Annotated[int, Field(ge=1)] = 100_000
    """Events whose scores wait to be written; of more, the oldest are dropped."""
    remote_write_max_age_seconds: Annotated[float, Field(gt=0)] = 1800
    """Scores of older events are not written: Prometheus refuses a whole request for a sample of more than an hour ago."""
    max_streams: Annotated[int, Field(ge=1)] = 1_000_000
    """Streams the store holds, of all models; an event of a new one beyond them is refused."""
    max_future_seconds: Annotated[float, Field(ge=0)] = 24 * 3600
    """A timestamp further ahead of the store's clock is refused: it would make every later event late."""
    inference_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Threads of ONNX Runtime for a step; more than one rarely pays for networks this small."""
    provider: Provider = "cpu"
    """Where a step runs: cpu, or cuda (an NVIDIA GPU; needs the extra `gpu`). What cannot be had stops the service."""
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 10
    """How long a stopping service finishes what it has accepted."""
    log_level: LogLevel = "info"
    """Until it is changed by PUT /v1/log-level."""
    log_hash_streams: bool = False
    """Whether log lines name streams by a hash."""
    log_json: bool = True
    """JSON lines; false = plain text."""

    @property
    def asked_alpha(self) -> float:
        """False onsets per event: `alpha`, or what `false_alarms` means at the stated cadence."""
        return per_event(self.false_alarms, self.cadence_seconds or 0) if self.false_alarms else self.alpha

    @field_validator("instance")
    @classmethod
    def _is_one_word(cls, value: str) -> str:
        if not re.fullmatch("[!-~]{0,256}", value):
            raise ValueError("it is one word of at most 256 visible ASCII characters, such as a pod's uid")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _are_names(cls, value: str) -> str:
        if wrong := next((name for name in value.split(",") if value and not re.fullmatch(r"[\w.-]+", name.strip(), re.ASCII)), None):
            raise ValueError(f"{wrong!r} is no name such as onset.example.org, without http:// and port")
        return value

    @field_validator("public_url")
    @classmethod
    def _begins_links(cls, value: str) -> str:
        # An Alertmanager refuses all alerts of a request where the link of one is no address.
        if value and not re.fullmatch(r"https?://[^\s/?#%]+(/[^\s?#%]*)?", value):
            raise ValueError("it is an address such as https://onset.example.org, without a query")
        return value

    @field_validator("remote_write_headers", mode="before")
    @classmethod
    def _are_headers(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f'it is not JSON ({error}) such as {{"authorization": "Bearer ..."}}') from error
        if not isinstance(value, dict) or not all(re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) for name in value):
            raise ValueError('it is a JSON object of names and values of headers, such as {"authorization": "Bearer ..."}')
        return value

    @field_validator("remote_write_metrics")
    @classmethod
    def _are_written(cls, value: str) -> str:
        unknown = [name for name in value.split(",") if name not in WRITTEN_BACK]
        if unknown:
            raise ValueError(f"it has {unknown[0]!r}; there are {', '.join(WRITTEN_BACK)}")
        return value

    @field_validator("false_alarms")
    @classmethod
    def _means_a_rate(cls, value: str, info: ValidationInfo) -> str:
        cadence = info.data.get("cadence_seconds")
        if not value:
            return value
        if cadence is None:
            raise ValueError("it needs ONSET_CADENCE_SECONDS, the seconds between two events of a stream")
        per_event(value, cadence)
        return value


def refusal(error: ValidationError) -> str:
    """A sentence that names the setting and its value, where that is no secret."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    secret = name in Settings.model_fields and "SecretStr" in str(Settings.model_fields[name].annotation)
    value = "cannot be used" if secret else f"or its option is {_PASSWORD.sub('//…@', repr(first.get('input')))}"
    return f"ONSET_{name.upper()} {value}: {message}."


def unknown(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Variables that begin with ONSET_ and are no setting, misspelt perhaps, and the setting that each is most like."""
    known = [f"ONSET_{name.upper()}" for name in Settings.model_fields]
    strange = sorted(name for name in environment if name.startswith("ONSET_") and name.upper() not in known)
    return {name: next(iter(get_close_matches(name, known, 1, 0.75)), None) for name in strange}
