"""A real syslog-ng for tests, with the configuration that docs/log-doors.md gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tests.needs import program
from tests.programs import Program

DOCS = Path(__file__).parents[1] / "docs" / "log-doors.md"


def documented() -> str:
    """The documented configuration."""
    [config] = re.findall(r"```\n(@version.*?)```", DOCS.read_text(), re.DOTALL)
    return str(config)


class SyslogNg(Program):
    """Debian's syslog-ng, which tails `file` and keeps what it knows in `folder`."""

    def __init__(self, folder: Path, config: str, file: Path, url: str) -> None:
        super().__init__(folder)
        for documented, ours in (("/var/log/shop/app.log", str(file)), ("http://onset:8080", url), ("/var/lib/syslog-ng", str(folder))):
            assert documented in config
            config = config.replace(documented, ours)
        self._config = config

    def _command(self) -> Sequence[str]:
        config = self.folder / "onset.conf"
        config.write_text(self._config)
        state = [f"--{name}={self.folder / name}" for name in ("persist-file", "control", "pidfile")]
        return [program("syslog-ng", "syslog-ng-core"), "--foreground", "--no-caps", f"--cfgfile={config}", *state]
