"""Fixtures that several folders of tests share."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import redis
import structlog

from bench.kafka_mock import MockKafka
from service.detector import Detector
from service.stores import StateStore
from service.stores.memory import MemoryStore
from service.stores.redis import RedisStore
from tests.brokers import Mosquitto, NatsServer, RabbitMQ
from tests.servers import Valkey, ValkeyCluster
from tests.tiny import build_tiny
from tests.tiny_log import build_tiny_log

LONGEST = (
    "contracts/test_sources.py",
    "training/test_fit.py",
    "e2e/test_browser.py",
    "e2e/test_chaos_queues.py",
    "training/test_distributed.py",
    "e2e/test_alert_sinks.py",
    "training/test_logpipeline.py",
    "e2e/test_chaos.py",
    "training/test_logs.py",
    "e2e/test_serve.py",
    "monitoring/test_proof.py",
    "training/test_waveform.py",
    "test_bench_quality.py",
    "integration/test_cluster.py",
    "training/test_verify.py",
    "e2e/test_replay_service.py",
    "e2e/test_kill.py",
    "training/test_signals.py",
    "training/test_stillness.py",
    "integration/test_redis_streams.py",
    "test_protocol_model.py",
    "contracts/test_stores.py",
    "integration/test_openapi.py",
    "training/test_cells.py",
    "e2e/test_cluster.py",
    "e2e/test_clocks.py",
    "e2e/test_demo.py",
    "test_lasting.py",
    "e2e/test_mqtt_kill.py",
    "monitoring/test_files.py",
    "training/test_cache.py",
)
"""The longest files (15 s and more), those that wait between those that compute: whichever began last would end long after the others."""


def pytest_collectstart() -> None:
    gc.disable()  # until all is imported: a million objects that stay would be looked through again and again


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported stays, so no later search for garbage looks at it: that was a fifth of the processor time of the tests after it.

    New objects are looked at by the twenty thousand, as in the service (`memory.settle`), yet old ones often enough that what an export
    leaves behind does not pile up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


@pytest.fixture(autouse=True)
def _log_level_is_put_back() -> Iterator[None]:
    """A service in the test's process may have changed it for the whole process, as the fuzzed PUT /v1/log-level does."""
    root, ours = logging.getLogger(), logging.getLogger("service")
    wrapper, levels = structlog.get_config()["wrapper_class"], (root.level, ours.level)
    yield
    if structlog.get_config()["wrapper_class"] is not wrapper:
        structlog.configure(wrapper_class=wrapper)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed one-feature artifact (`value`), built without torch."""
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_detector(tiny_model_path: Path) -> Detector:
    return Detector.load(tiny_model_path)


@pytest.fixture(scope="session")
def log_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed artifact that takes log lines, built without torch."""
    return build_tiny_log(tmp_path_factory.mktemp("tiny-log"))


@pytest.fixture(scope="session")
def log_detector(log_path: Path) -> Detector:
    return Detector.load(log_path)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real server, started once for the session."""
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture
def empty_server(valkey_server: str) -> str:
    """The server's URL, with nothing in it."""
    with redis.Redis.from_url(valkey_server) as client:
        client.flushall()
    return valkey_server


@pytest.fixture(scope="session")
def valkey_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyCluster]:
    """A real cluster of three nodes, started once for the session. None is to die, so a busy machine has time."""
    with ValkeyCluster(tmp_path_factory.mktemp("cluster"), cluster_node_timeout="10000") as cluster:
        yield cluster


@pytest.fixture
def empty_cluster(valkey_cluster: ValkeyCluster) -> ValkeyCluster:
    """The cluster, with nothing in it."""
    valkey_cluster.empty()
    return valkey_cluster


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """What a test enters is left with it."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def redis_store(empty_server: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(empty_server, state_ttl=3600, result_ttl=600)
    await store.open()
    yield store
    await store.close()


@pytest.fixture(params=["memory", "redis"])
def any_store(request: pytest.FixtureRequest) -> StateStore:
    """One of memory, and a real one."""
    if request.param == "memory":
        return MemoryStore(state_ttl=3600, result_ttl=600)
    store: RedisStore = request.getfixturevalue("redis_store")
    return store


@pytest.fixture(scope="session")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A real MQTT 5 broker, started once for the session: topics and client ids are to be a test's own."""
    with Mosquitto(tmp_path_factory.mktemp("mosquitto")) as broker:
        yield broker


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A real AMQP broker, started once for the session: queues are to be a test's own."""
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as broker:
        yield broker


@pytest.fixture(scope="session")
def kafka() -> Iterator[MockKafka]:
    """librdkafka's mock cluster, started once for the session: topics and groups are to be a test's own."""
    with MockKafka() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def jetstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A real nats-server with JetStream, started once for the session: streams are to be a test's own."""
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server
