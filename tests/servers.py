"""Real valkey-servers for tests, one or a cluster of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.retry import Retry

from bench.servers import free_port
from service.embedded import find_server
from tests.programs import Program

START_SECONDS = 20
NODES = 3
BOUNDS = [i * REDIS_CLUSTER_HASH_SLOTS // NODES for i in range(NODES + 1)]


class Valkey(Program):
    """A server with its data in `folder`."""

    def __init__(self, folder: Path, **options: str) -> None:
        """`options` of the server, `_` for `-`; it listens on a unix socket in the folder unless they name a port."""
        super().__init__(folder)
        self.socket = Path(options.get("unixsocket", folder / "v.sock"))
        self._options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(folder),
            "save": "",
            "logfile": str(folder / "log"),
        } | options
        self._loaded = True

    @property
    def port(self) -> int:
        """0 = it listens on the socket only."""
        return int(self._options["port"])

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self.socket}"

    def start(self, *, loaded: bool = True) -> None:
        """Returns when it answers; `loaded` = and has its data in memory."""
        self._loaded = loaded
        super().start()

    def client(self) -> redis.Redis:
        """To be closed by the caller. It does not retry: what the server says is what the test sees."""
        return redis.Redis.from_url(self.url, retry=Retry(NoBackoff(), 0))

    def _command(self) -> Sequence[str]:
        options = [part for name, value in self._options.items() for part in (f"--{name.replace('_', '-')}", *value.split(" "))]
        return [find_server(), *options]

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                client.ping()
            except redis.BusyLoadingError:
                return not self._loaded
            except redis.ConnectionError:
                return False
        return True


class ValkeyCluster:
    """Three primaries on loopback that share all slots, without replicas."""

    def __init__(self, folder: Path, **options: str) -> None:
        """`options` of every server."""
        self._options = options
        self.nodes = [self._node(folder / str(i)) for i in range(NODES)]

    @property
    def url(self) -> str:
        """Of all nodes."""
        return ",".join(node.url for node in self.nodes)

    def __enter__(self) -> ValkeyCluster:
        try:
            for node in self.nodes:
                node.__enter__()
            self._form()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        for node in self.nodes:
            node.kill()

    @contextlib.contextmanager
    def clients(self) -> Iterator[Sequence[Any]]:
        """To each node, and to it alone; their replies are what they are."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(node.client()) for node in self.nodes]

    @contextlib.contextmanager
    def replica(self, folder: Path, *, of: int) -> Iterator[Valkey]:
        """Of one of the nodes, in step with it."""
        with self._node(folder) as server, server.client() as client, self.clients() as clients:
            self._meet(clients[0], server)
            primary = clients[of].execute_command("CLUSTER", "MYID")
            self._until(lambda: primary in client.execute_command("CLUSTER", "NODES"))
            client.execute_command("CLUSTER", "REPLICATE", primary)
            self._until(lambda: client.info("replication").get("master_link_status") == "up")
            yield server

    def in_step(self, replica: Valkey, *, of: int) -> None:
        """Returns when the replica has all that the node has."""
        with replica.client() as client, self.nodes[of].client() as primary:
            self._until(lambda: client.info("replication")["slave_repl_offset"] >= primary.info("replication")["master_repl_offset"])

    def empty(self) -> None:
        with self.clients() as clients:
            for client in clients:
                client.flushall()

    def first_owner(self, slot: int) -> int:
        """Index of the node that had the slot when the cluster was formed."""
        return next(i for i in range(NODES) if slot < BOUNDS[i + 1])

    def wait(self) -> None:
        """Until every node knows all others and takes commands."""
        self._until(self._whole)

    def _until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not true():
            assert time.monotonic() < deadline, [(node.folder / "log").read_text()[-1000:] for node in self.nodes]
            time.sleep(0.02)

    def _node(self, folder: Path) -> Valkey:
        options = {"cluster_enabled": "yes", "cluster_config_file": "nodes.conf", "cluster_node_timeout": "1000"} | self._options
        return Valkey(folder, port=str(free_port()), cluster_port=str(free_port()), **options)

    def _meet(self, client: Any, node: Valkey) -> None:
        with node.client() as other:
            bus = other.config_get("cluster-port")["cluster-port"]
        client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)

    def _form(self) -> None:
        with self.clients() as clients:
            for i, client in enumerate(clients):
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", BOUNDS[i], BOUNDS[i + 1] - 1)
            for node in self.nodes[1:]:
                self._meet(clients[0], node)
        self.wait()

    def _whole(self) -> bool:
        with self.clients() as clients:
            infos = [client.execute_command("CLUSTER", "INFO") for client in clients]
            slots = [client.execute_command("CLUSTER", "SLOTS") for client in clients]
        return all(b"cluster_state:ok" in info for info in infos) and all(len(some) >= NODES for some in slots)


class Move:
    """A slot on its way to another node, step by step as operators' tools do it: each command is answered before the next."""

    def __init__(self, cluster: ValkeyCluster, slot: int) -> None:
        """From its first owner to the node after it."""
        self._cluster, self._slot = cluster, slot
        self.source = cluster.first_owner(slot)
        self.target = (self.source + 1) % NODES

    def begin(self) -> None:
        with self._cluster.clients() as clients:
            source, target = (clients[i].execute_command("CLUSTER", "MYID") for i in (self.source, self.target))
            clients[self.target].execute_command("CLUSTER", "SETSLOT", self._slot, "IMPORTING", source)
            clients[self.source].execute_command("CLUSTER", "SETSLOT", self._slot, "MIGRATING", target)

    def keys(self, *keys: bytes, most: int = 1_000_000) -> int:
        """Move these, or at most that many of what is there; returns how many there were."""
        with self._cluster.nodes[self.source].client() as client:
            some = keys or cast("Sequence[bytes]", client.execute_command("CLUSTER", "GETKEYSINSLOT", self._slot, most))
            if some:
                client.migrate("127.0.0.1", self._cluster.nodes[self.target].port, some, 0, 5000)
            return len(some)

    def end(self) -> None:
        with self._cluster.clients() as clients:
            target = clients[self.target].execute_command("CLUSTER", "MYID")
            for i in (self.target, self.source, 3 - self.source - self.target):
                clients[i].execute_command("CLUSTER", "SETSLOT", self._slot, "NODE", target)
