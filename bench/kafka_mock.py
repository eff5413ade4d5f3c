"""Kafka's protocol for tests and soaks: librdkafka's mock cluster in a process of its own, where brokers can be taken down and up again.

    python -m bench.kafka_mock BROKERS        prints its bootstrap servers, then obeys lines: `topic NAME PARTITIONS`,
                                              `delete NAME`, `down I`, `up I`

It keeps records in memory and speaks to any client over TCP: groups, commits, cooperative rebalances and idempotent producers work. What it
is not: durable, transactional, or as slow as a real cluster. Its functions are not in the Python client, so they are called by ctypes.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import confluent_kafka

PRODUCER = 0
REBALANCE_MS = 200
"""How long a group that begins waits for more members."""


class MockKafka:
    """The process, started on entering, ended on leaving."""

    def __init__(self, brokers: int = 1) -> None:
        self.brokers = brokers
        self.servers = ""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> MockKafka:
        command = [sys.executable, "-m", "bench.kafka_mock", str(self.brokers)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parents[1]
        )
        self.servers = self._answer()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def topic(self, name: str, partitions: int) -> None:
        self._order(f"topic {name} {partitions}")

    def delete(self, name: str) -> None:
        """A topic, with its groups' offsets."""
        self._order(f"delete {name}")

    def down(self) -> None:
        """All brokers: their connections end and no new ones are taken. What they hold stays."""
        for i in range(1, self.brokers + 1):
            self._order(f"down {i}")

    def up(self) -> None:
        for i in range(1, self.brokers + 1):
            self._order(f"up {i}")

    def _order(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        assert self._answer() == "0", line

    def _answer(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main(brokers: int) -> None:
    [path] = (Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs").glob("librdkafka*")
    library = ctypes.CDLL(str(path))
    library.rd_kafka_conf_new.restype = ctypes.c_void_p
    library.rd_kafka_new.restype = library.rd_kafka_mock_cluster_new.restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    client = ctypes.c_void_p(library.rd_kafka_new(PRODUCER, ctypes.c_void_p(library.rd_kafka_conf_new()), None, 0))
    cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(client, brokers))
    library.rd_kafka_mock_group_initial_rebalance_delay_ms(cluster, REBALANCE_MS)
    print(library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), flush=True)
    for line in sys.stdin:
        order, *arguments = line.split()
        if order == "topic":
            done = library.rd_kafka_mock_topic_create(cluster, arguments[0].encode(), int(arguments[1]), 1)
        elif order == "delete":
            done = library.rd_kafka_mock_topic_delete(cluster, arguments[0].encode())
        else:
            function = library.rd_kafka_mock_broker_set_down if order == "down" else library.rd_kafka_mock_broker_set_up
            done = function(cluster, int(arguments[0]))
        print(done, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
