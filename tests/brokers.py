"""Real brokers for tests."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import nats
from nats.aio.client import Client

from bench import brokers
from bench.servers import free_port
from tests.needs import needed, program
from tests.programs import Program


class _Broker(Program):
    """It listens on a port of its own, which it keeps."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True


class NatsServer(_Broker):
    """NATS with JetStream, whose streams outlive `stop` and `kill`."""

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        """`secure` = TLS."""
        super().__init__(folder)
        self.ca = folder / "cert.pem" if secure else None

    @property
    def url(self) -> str:
        return f"{'tls' if self.ca else 'nats'}://127.0.0.1:{self.port}"

    async def connect(self) -> Client:
        return await nats.connect(self.url, allow_reconnect=True, max_reconnect_attempts=-1, reconnect_time_wait=1, error_cb=_quiet)

    def _command(self) -> Sequence[str]:
        secured = ["--tls", "--tlscert", str(self.ca), "--tlskey", str(_certified(self.ca))] if self.ca else []
        return [*brokers.nats_server(self.folder, self.port), *secured]


def _certified(ca: Path) -> Path:
    """The key of a certificate of this machine that is made there."""
    key = ca.with_name("key.pem")
    about = ["-subj", "/CN=onset-test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    openssl = program("openssl", "openssl")
    subprocess.run([openssl, "req", "-x509", *curve, *about, "-keyout", str(key), "-out", str(ca)], check=True, capture_output=True)
    return key


async def _quiet(error: Exception) -> None: ...


class Mosquitto(_Broker):
    """MQTT 5. Its sessions and their messages outlive `stop`."""

    USER, PASSWORD = "plant", "p:ss/w@rd"

    def __init__(self, folder: Path, *, secure: bool = False, options: Sequence[str] = ()) -> None:
        """`secure` = TLS, and only this user with this password; `options` = further lines of its configuration."""
        super().__init__(folder)
        self._options = options
        self.ca = folder / "cert.pem" if secure else None

    @property
    def url(self) -> str:
        if self.ca:
            return f"mqtts://{self.USER}:{quote(self.PASSWORD, safe='')}@127.0.0.1:{self.port}"
        return f"mqtt://127.0.0.1:{self.port}"

    def _secured(self, ca: Path) -> list[str]:
        key, users = _certified(ca), self.folder / "users"
        subprocess.run([program("mosquitto_passwd", "mosquitto"), "-b", "-c", str(users), self.USER, self.PASSWORD], check=True)
        return ["allow_anonymous false", f"certfile {ca}", f"keyfile {key}", f"password_file {users}"]

    def _command(self) -> Sequence[str]:
        access = self._secured(self.ca) if self.ca else ["allow_anonymous true"]
        return brokers.mosquitto(self.folder, self.port, [*self._options, *access])


class RabbitMQ(_Broker):
    """AMQP 0-9-1. Durable queues outlive `stop` and `kill`. It has an Erlang port mapper of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._rabbit = brokers.Rabbit(folder, self.port)
        self._mapper: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self._rabbit.url

    def __enter__(self) -> Self:
        with needed():
            command = self._rabbit.mapper
        self._mapper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return super().__enter__()
        except BaseException:
            self._end_mapper()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._end_mapper()

    def add_user(self, name: str) -> str:
        """The address for a user with this name and password, who may do nothing yet."""
        self._control("add_user", name, name)
        return self.url.replace("guest:guest", f"{name}:{name}")

    def permit(self, user: str, *, read: str) -> None:
        """Make and write all, and read what this expression matches."""
        self._control("set_permissions", user, ".*", ".*", read)

    def _control(self, *words: str) -> None:
        command = ["/usr/lib/rabbitmq/bin/rabbitmqctl", *words]
        subprocess.run(command, env=os.environ | self._environment(), check=True, capture_output=True, timeout=60)

    def _end_mapper(self) -> None:
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait()

    def _command(self) -> Sequence[str]:
        return self._rabbit.command()

    def _environment(self) -> dict[str, str]:
        return self._rabbit.environment

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.settimeout(1)
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return bool(connection.recv(1))
        except OSError:
            return False
