"""A store that answers and refuses: nothing is lost by that, and what is told says what helps."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import os
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import redis
from structlog.testing import capture_logs

from service.app import Service
from service.claims import BEAT_SECONDS, EXPIRY_SECONDS, StoredClaim
from service.detector import Detector
from service.errors import StoreRefused, StoreUnavailable, TooManyStreams
from service.events import Event, Lease, Result
from service.metrics import Metrics
from service.policy import Policy
from service.problems import problem_of
from service.scorer import Limits, Scorer
from service.settings import Settings
from service.stores import LOST, OUTPUT, WRITTEN, Write
from service.stores.book import Book
from service.stores.redis import RedisStore, check_url, log_key, shard_of, state_key, trail_key
from tests.servers import Valkey
from tests.times import until
from tests.tiny import build_tiny

MODEL = "tiny"
RIGHTS = ("~onset:*", "~{onset:*", "+@all", "-@dangerous", "+info")
"""As docs/deploy.md has them."""


def value() -> bytes:
    return os.urandom(100)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h:6379/0",
        "redis://h:6379/0\n",  # of a Secret made of a file
        "redis://h:6379/",
        "redis://:6379/0",
        "redis:///0",
        "redis://h?db=2",
        f"rediss://anna:s3%2Fcr@h:6380/0?ssl_ca_certs={__file__}&ssl_check_hostname=no",
        "redis://[::1]:6379/0",
        "unix:///run/valkey.sock?db=1",
    ],
)
def test_an_address_that_the_client_takes_is_taken(url: str) -> None:
    check_url(url)


def test_a_certificate_that_may_not_be_read_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a key that belongs to root, in a folder that is closed or not; tests may run as root, who reads all."""

    def closed(path: Path, *arguments: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", closed)
    monkeypatch.setattr(Path, "stat", closed)
    with pytest.raises(ValueError, match=r"ssl_keyfile is /tls/key\.pem, which cannot be read \(Permission denied\)"):
        check_url("rediss://h/0?ssl_keyfile=/tls/key.pem")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Valkey]:
    with Valkey(tmp_path / "own") as server:
        yield server


@contextlib.asynccontextmanager
async def as_user(server: Valkey, *rights: str) -> AsyncIterator[RedisStore]:
    """A store under a user with these rights, opened before they are all it has."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "onset", "reset", "on", ">secret", "+@all", "~*")
        store = RedisStore(f"unix://onset:secret@{server.socket}", state_ttl=60, result_ttl=60)
        await store.open()
        client.execute_command("ACL", "SETUSER", "onset", "reset", "on", ">secret", *rights)
        yield store
        await store.close()


async def test_a_full_store_refuses_without_loss_says_what_helps_and_takes_the_same_event_once_it_has_room(
    server: Valkey, tiny_detector: Detector
) -> None:
    store, metrics = RedisStore(server.url, state_ttl=60, result_ttl=60), Metrics()
    await store.open()
    scorer = Scorer(tiny_detector, Policy(), store, metrics, Limits())
    scorer.start()
    event = Event("a", {"value": 1.0}, timestamp=1.7e9)
    with server.client() as client, capture_logs() as logs:
        client.config_set("maxmemory", "1")
        for _ in range(3):
            with pytest.raises(StoreRefused, match=r"its memory is full \(maxmemory\): give it more") as refused:
                await scorer.score([event])
        client.config_set("maxmemory", "0")
    [told] = [entry for entry in logs if entry["event"] == "store_refuses"]
    assert told["reason"] == refused.value.detail
    [answer] = await scorer.score([event])
    assert isinstance(answer, Result)
    assert (answer.state_version, answer.duplicate) == (1, False)
    problem = problem_of(refused.value)
    assert (problem.status, problem.type, problem.retry_after) == (503, "urn:onset:store-refused", 10)
    await scorer.drain(5)
    await store.close()


async def test_a_store_that_is_nearly_full_takes_no_new_streams_and_known_ones_go_on(
    server: Valkey, tiny_detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.scorer.COUNT_SECONDS", 0.0)
    store = RedisStore(server.url, state_ttl=60, result_ttl=60)
    await store.open()
    scorer = Scorer(tiny_detector, Policy(), store, Metrics(), Limits())
    scorer.start()

    async def kinds(*names: str) -> list[type]:
        return [type(answer) for answer in await scorer.score([Event(name, {"value": 1.0}) for name in names])]

    assert await kinds("a", "b") == [Result, Result]
    with server.client() as client:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] / 0.95))
        assert await kinds("a", "c", "b") == [Result, TooManyStreams, Result]
        [refused] = await scorer.score([Event("c", {"value": 1.0})])
        assert isinstance(refused, TooManyStreams)
        assert re.fullmatch(r"Stream 'c' is new and the store's memory is 9\d% full \(maxmemory\): beyond 90% .*", refused.detail)
        client.config_set("maxmemory-policy", "allkeys-lru")  # it makes room by itself
        assert await kinds("c") == [Result]
        client.config_set("maxmemory-policy", "noeviction")
        assert await kinds("d") == [TooManyStreams]
        client.config_set("maxmemory", 2 * client.info("memory")["used_memory"])
        assert await kinds("d", "a") == [Result, Result]
    await scorer.drain(5)
    await store.close()


async def test_how_full_the_store_is_can_be_seen_before_it_refuses(server: Valkey, tiny_model_path: Path) -> None:
    async def shown() -> float:
        async with Service(Settings(redis_url=server.url, model=tiny_model_path)).running() as service:
            assert await service.ready() is None
            return service.metrics.registry.get_sample_value("onset_store_memory_ratio") or 0.0

    assert math.isnan(await shown()), "no limit"
    with server.client() as client:
        client.config_set("maxmemory", 4 * client.info("memory")["used_memory"])
        assert 0.1 < await shown() < 0.9
    async with as_user(server, "~onset:*", "~{onset:*", "+@all", "-@dangerous") as store:
        assert math.isnan((await store.memory()).fullness), "it does not say"


async def test_a_replica_is_told_from_a_store_that_refuses_for_good(server: Valkey) -> None:
    store = RedisStore(server.url, state_ttl=60, result_ttl=60)
    await store.open()
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
        for call in (store.ping(), store.commit(MODEL, [Write("a", b"", value())]), store.change_policy({"alpha": b"1"}), store.open()):
            with pytest.raises(StoreUnavailable, match="it is a replica") as refused:
                await call
            assert type(refused.value) is StoreUnavailable
        client.replicaof("NO", "ONE")
    await store.ping()
    await store.close()


@pytest.mark.parametrize(("setting", "refusing", "back"), [("maxmemory", "1", "0"), ("min-replicas-to-write", "1", "0")])
async def test_while_the_store_refuses_the_file_in_force_keeps_its_model_which_nobody_can_renew(
    server: Valkey, tmp_path: Path, setting: str, refusing: str, back: str
) -> None:
    now = 0.0
    store = RedisStore(server.url, state_ttl=60, result_ttl=60)
    await store.open()
    old, new = (StoredClaim(Detector.load(build_tiny(tmp_path, version=version)), store, Metrics(), lambda: now) for version in ("1", "2"))
    await old.take()
    await new.take()
    await old.beat()
    with server.client() as client:
        client.config_set(setting, refusing)
        for _ in range(2 * round(EXPIRY_SECONDS)):
            now += BEAT_SECONDS
            for claim in (old, new):
                with pytest.raises(StoreUnavailable):
                    await claim.beat()
        client.config_set(setting, back)
    for _ in range(2 * round(EXPIRY_SECONDS)):
        now += BEAT_SECONDS
        await old.beat()  # before those in force
        await new.beat()
    assert (old.in_force.is_set(), new.in_force.is_set()) == (False, True)
    await store.close()


async def test_a_store_that_waits_for_its_replicas_is_not_one_that_refuses_for_good(server: Valkey) -> None:
    store = RedisStore(server.url, state_ttl=60, result_ttl=60)
    await store.open()
    with server.client() as client:
        client.config_set("min-replicas-to-write", "1")
        with pytest.raises(StoreUnavailable, match="min-replicas-to-write") as refused:
            await store.ping()
        assert type(refused.value) is StoreUnavailable
    await store.close()


async def test_a_password_that_is_not_the_right_one_is_told_as_such(server: Valkey) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "resetpass", ">right")
    for url in (server.url, f"unix://:wrong@{server.socket}"):
        store = RedisStore(url, state_ttl=60, result_ttl=60)
        with pytest.raises(StoreRefused, match="it wants another user or password: ONSET_REDIS_URL"):
            await store.open()
        await store.close()


async def test_readiness_says_why_the_store_could_not_be_opened_last(server: Valkey, tiny_model_path: Path) -> None:
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "onset", "reset", "on", ">right")
    async with Service(Settings(redis_url=f"unix://onset:right@{server.socket}", model=tiny_model_path)).running() as service:
        assert re.search("not been opened yet.*NoPermission", await service.ready() or "")
        server.kill()
        async with asyncio.timeout(60):
            while True:
                if "not been opened yet. The state store does not answer" in (await service.ready() or ""):
                    break
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("others", [1_000, 30_000])
async def test_what_others_keep_in_the_same_database_takes_no_stream_its_room(server: Valkey, tiny_detector: Detector, others: int) -> None:
    store = RedisStore(server.url, state_ttl=60, result_ttl=60)
    await store.open()
    with server.client() as client:
        client.mset({f"session:{i}": "x" for i in range(others)})
        client.mset({f"onset:{{{i % 256:03d}}}:tiny:other-{i}": "x" for i in range(others // 2)})
    assert await store.count() == pytest.approx(others // 2, rel=0.25)
    scorer = Scorer(tiny_detector, Policy(), store, Metrics(), Limits(max_streams=others))
    scorer.start()
    [answer] = await scorer.score([Event("a", {"value": 1.0}, timestamp=1.7e9)])
    assert isinstance(answer, Result)
    await scorer.drain(1)
    await store.close()


async def test_a_restarted_replica_knows_how_many_streams_there_are(server: Valkey, tiny_model_path: Path) -> None:
    async def shown(service: Service) -> float | None:
        assert await service.ready() is None
        return service.metrics.registry.get_sample_value("onset_streams")

    settings = Settings(redis_url=server.url, model=tiny_model_path)
    async with Service(settings).running() as service:
        await service.scorers["tiny"].score([Event(f"s{i}", {"value": 1.0}) for i in range(7)])
        assert await shown(service) == 7
    async with Service(settings).running() as service:
        assert await shown(service) == 7
        with server.client() as client:
            client.config_set("maxmemory", "1")
            assert (await service.ready() or "").startswith("The state store refuses: its memory is full")
            client.config_set("maxmemory", "0")


async def test_a_replica_of_a_superseded_file_knows_how_many_streams_there_are_too(server: Valkey, tmp_path: Path) -> None:
    old, new = (Settings(redis_url=server.url, model=build_tiny(tmp_path, version=version)) for version in ("1", "2"))
    async with Service(old).running() as superseded, Service(new).running() as service:
        await service.scorers["tiny"].score([Event(f"s{i}", {"value": 1.0}) for i in range(7)])
        await superseded.claims["tiny"].beat()
        assert (await superseded.ready() or "").startswith("Model 'tiny' is superseded")
        assert superseded.metrics.registry.get_sample_value("onset_ready") == 0
        assert superseded.metrics.registry.get_sample_value("onset_streams") == 7


async def test_the_rights_that_the_documentation_names_are_enough(server: Valkey, tiny_detector: Detector) -> None:
    lease = Lease(b"{onset:events}:in", b"{onset:events}:lease", b"token", b"group")
    with server.client() as client:
        client.set(lease.key, lease.token)
        client.xgroup_create(lease.stream, lease.group, mkstream=True)
    async with as_user(server, *RIGHTS) as store:
        with server.client() as client:
            client.function_flush()
        await store.open()
        await store.ping()
        write = Write("a", b"", value(), b"trail", 1.0, [b"result"], [(lease, b"1-1")], [b"entry"])
        assert await store.commit(MODEL, [write]) == [WRITTEN]
        assert (await store.scan(MODEL, "", 10)).stream_ids == ["a"]
        assert await store.due(MODEL, 2.0, 10) == ["a"]
        assert await store.waited(MODEL, 1) == (1, ["a"])
        assert await store.load_trails(MODEL, ["a"]) == [[b"trail"]]
        await store.change_policy({"alpha": b"1"})
        assert await store.claim(MODEL, b"", b"ours") == b""
        assert await store.claimed(MODEL) == b"ours"
        assert await store.count() == 1
        with server.client() as client:
            assert client.execute_command("ACL", "DRYRUN", "onset", "RANDOMKEY") == b"OK"
        assert await store.hold("name", "me", 5)
        assert await store.note("name", "me", b"note", 3)
        await store.release("name", "me")
        book = Book(store)
        assert await book.take("token")
        assert len(await book.read({}, 10)) == 1
        await book.write("token", [], [], {shard_of("a"): "1-1"})
        await book.release("token")
        assert await store.delete(MODEL, "a", b"gone")
        assert await store.count() == 0


@pytest.mark.parametrize(
    ("missing", "log"),
    [("xadd", [b"entry"]), ("xadd", []), ("rpush", [b"entry"]), ("zadd", [b"entry"]), ("expire", []), ("set", [b"entry"])],
)
async def test_an_event_whose_write_lacks_a_right_in_the_middle_is_not_known_and_is_whole_when_it_is_sent_again(
    server: Valkey, missing: str, log: list[bytes]
) -> None:
    async with as_user(server, *RIGHTS, f"-{missing}") as store:
        write = Write("a", b"", value(), b"trail", 1.0, results=[b"result"], log=log)
        with pytest.raises(StoreRefused, match=r"its user may not do this: docs/deploy\.md.*") as refused:
            await store.commit(MODEL, [Write("before", b"", value()), write])
        assert missing in refused.value.detail
        assert await store.load(MODEL, ["before", "a"]) == [None, None]
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "onset", f"+{missing}")
            assert await store.commit(MODEL, [write]) == [WRITTEN]
            assert [fields for _, fields in client.xrange(log_key(shard_of("a")))][-len(log) :] == [{b"transition": b"entry"}] * len(log)
            assert client.xrange(OUTPUT.key)[-1][1] == {b"result": b"result"}


async def test_a_key_in_which_another_program_has_put_something_else_is_a_stream_that_begins(server: Valkey) -> None:
    store = RedisStore(server.url, state_ttl=60, result_ttl=60)
    await store.open()
    with server.client() as client:
        client.rpush(state_key(MODEL, "odd"), "a list")
        client.set(trail_key(MODEL, "torn"), "no list")
    assert await store.load(MODEL, ["odd"]) == [None]
    mine = value()
    writes = [Write("before", b"", value()), Write("odd", b"", mine), Write("behind", b"", value()), Write("odd", b"x" * 16, value())]
    assert await store.commit(MODEL, writes) == [WRITTEN, WRITTEN, WRITTEN, LOST]
    assert await store.load(MODEL, ["odd"]) == [mine]
    with pytest.raises(StoreRefused, match="a key of the service's holds what another program has written"):
        await store.commit(MODEL, [Write("torn", b"", value(), b"trail")])
    assert await store.load(MODEL, ["torn"]) == [None]
    await store.close()


@pytest.mark.parametrize("at_the_start", ["allkeys-lru", "noeviction"])
async def test_a_server_that_evicts_states_is_told_of_whenever_it_is_set(tmp_path: Path, tiny_model_path: Path, at_the_start: str) -> None:
    def told() -> list[str]:
        return [entry["maxmemory_policy"] for entry in logs if entry["event"] == "store_evicts"]

    with Valkey(tmp_path / "own", maxmemory="100mb", maxmemory_policy=at_the_start) as server, capture_logs() as logs:
        async with Service(Settings(redis_url=server.url, model=tiny_model_path)).running() as service:

            async def evicts(value: float) -> bool:
                assert await service.ready() is None
                return service.metrics.registry.get_sample_value("onset_store_evicts") == value

            assert await evicts(float(at_the_start != "noeviction"))
            assert told() == [at_the_start] * (at_the_start != "noeviction")
            with server.client() as client:
                client.config_set("maxmemory-policy", "volatile-ttl")
                await until(lambda: "volatile-ttl" in told() or evicts(-1))
                assert await evicts(1)
                client.config_set("maxmemory-policy", "noeviction")
                await until(lambda: evicts(0))
    assert told().count("volatile-ttl") == 1


async def test_a_queue_in_a_store_that_refuses_says_why_and_goes_on_once_it_does_not(server: Valkey, tiny_model_path: Path) -> None:
    settings = Settings(streams_input="in", streams_lease_seconds=1, redis_url=server.url, model=tiny_model_path, drain_seconds=5)
    with server.client() as client, capture_logs() as logs:
        async with Service(settings).running(), asyncio.timeout(60):
            client.config_set("maxmemory", "1")
            while not any("Redis Streams refuse: its memory is full" in str(entry.get("error")) for entry in logs):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            client.config_set("maxmemory", "0")
            client.xadd("in", {"event": json.dumps({"stream_id": "a", "values": {"value": 1}})})
            while not client.xlen("onset:results"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert client.xlen("in") == 0


async def test_a_store_that_cannot_write_its_file_anew_is_told_of_before_its_disk_is_full(tmp_path: Path, tiny_model_path: Path) -> None:
    files = tmp_path / "own" / "appendonlydir"
    with Valkey(tmp_path / "own", appendonly="yes") as server, server.client() as client, capture_logs() as logs:
        async with Service(Settings(redis_url=server.url, model=tiny_model_path)).running() as service:

            async def failed(value: float) -> bool:
                assert await service.ready() is None
                return service.metrics.registry.get_sample_value("onset_store_rewrite_failed") == value

            assert await failed(0)
            files.rename(tmp_path / "away")
            files.touch()  # no folder: the new file has no place
            with pytest.raises(redis.ResponseError):
                client.bgrewriteaof()
            await until(lambda: failed(1))
            files.unlink()
            (tmp_path / "away").rename(files)
            client.bgrewriteaof()
            await until(lambda: failed(0))
    [told] = [entry for entry in logs if entry["event"] == "store_rewrite_failed"]
    assert "until the disk is full" in told["detail"]
