"""How real brokers are started, on loopback ports of their own: by soaks and benchmarks here, and by tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.servers import free_port


def program(name: str, package: str) -> str:
    """Path of a program of Debian's `package`. Raises SystemExit where it is not on this machine."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise SystemExit(f"{name} is not on this machine: apt-get install {package}")
    return found


def nats_server(folder: Path, port: int) -> list[str]:
    """Command of a nats-server with JetStream, its data in `folder`."""
    return [program("nats-server", "nats-server"), "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", str(folder)]


def mosquitto(folder: Path, port: int, options: Sequence[str] = ()) -> list[str]:
    """Command of a mosquitto, its configuration and data in `folder`; `options` are further lines of the configuration."""
    lines = [f"listener {port} 127.0.0.1", "max_queued_messages 1000000", "persistence true", f"persistence_location {folder}/", *options]
    lines += ["user root"] if os.geteuid() == 0 else []
    conf = folder / "mosquitto.conf"
    conf.write_text("\n".join(lines) + "\n")
    return [program("mosquitto", "mosquitto"), "-c", str(conf)]


@dataclass(frozen=True)
class Rabbit:
    """A rabbitmq-server, its configuration and data in `folder`, and the Erlang port mapper of its own that must run before it."""

    folder: Path
    port: int = field(default_factory=free_port)
    _mapper_port: int = field(default_factory=free_port)
    _cluster_port: int = field(default_factory=free_port)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def mapper(self) -> list[str]:
        return [program("epmd", "erlang-base"), "-address", "127.0.0.1", "-port", str(self._mapper_port)]

    def command(self) -> list[str]:
        """Writes the configuration."""
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nloopback_users = none\nlog.file = false\nlog.console = true\n"
        )
        (self.folder / "plugins").write_text("[].\n")
        program("rabbitmq-server", "rabbitmq-server")  # itself runs as root or rabbitmq only
        return ["/usr/lib/rabbitmq/bin/rabbitmq-server"]

    @property
    def environment(self) -> dict[str, str]:
        folder = str(self.folder)
        return {
            "HOME": folder,  # of the cookie
            "ERL_CRASH_DUMP": "/dev/null",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._mapper_port),
            "RABBITMQ_NODENAME": f"onset-{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": folder,
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            "RABBITMQ_DIST_PORT": str(self._cluster_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none",
            "RUNNING_UNDER_SYSTEMD": "true",  # the server in place of the shell: its pid is the server's
            "NOTIFY_SOCKET": "",
        }
