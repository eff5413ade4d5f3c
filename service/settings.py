"""Everything an operator can set, from the environment (prefix ONSET_) or the command line. Read by the composition root alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

SHIPPED_MODELS = Path(__file__).parent / "models"


class Settings(BaseSettings):
    """Validated at start; an unusable value stops the service with a message that names it."""

    model_config = SettingsConfigDict(env_prefix="ONSET_", frozen=True, extra="forbid", protected_namespaces=())

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    model: Path = SHIPPED_MODELS
    """A model file, or a folder of them."""
    default_model: str = "default"
    """Which model scores when a request names none; with one model loaded, that one."""
    redis_url: str = ""
    """Empty: an embedded valkey-server is started and supervised."""
    data_dir: Path = Path("onset-data")
    """Where the embedded store keeps its data."""
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.001
    """The asked false-alarm rate: false onsets per event of a normal stream."""
    accept_after: Annotated[float, Field(ge=0)] = 0
    """Seconds (of the events' own time) after which a lasting anomaly is taken for the new normal; 0 = only when someone says so."""
    state_ttl_seconds: Annotated[int, Field(ge=1)] = 30 * 24 * 3600
    """A stream silent for this long is forgotten."""
    result_ttl_seconds: Annotated[int, Field(ge=1)] = 600
    """How long the results of a bulk can be fetched again by sending it again."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 1024 * 1024
    max_inflight_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024 * 1024
    """Bytes of all requests being read and scored at once; more are refused with 429."""
    max_body_seconds: Annotated[float, Field(gt=0)] = 30
    """How long a body may take to arrive: until then its bytes count as being read."""
    max_batch_events: Annotated[int, Field(ge=1)] = 10_000
    max_queue_events: Annotated[int, Field(ge=1)] = 20_000
    """Events waiting to be scored; more are refused with 429."""
    max_streams: Annotated[int, Field(ge=1)] = 1_000_000
    max_future_seconds: Annotated[float, Field(ge=0)] = 24 * 3600
    """A timestamp further ahead of this clock is refused: it would make every later event late."""
    inference_threads: Annotated[int, Field(ge=1)] = 1
    drain_seconds: Annotated[float, Field(ge=0)] = 10
    """How long a stopping service finishes what it has accepted."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = True
