"""A real syslog-ng for tests, with the configuration that docs/log-doors.md gives: started on entering, ended by its pid on leaving."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import TracebackType

from tests.needs import program

DOCS = Path(__file__).parents[1] / "docs" / "log-doors.md"


def documented() -> str:
    """The documented configuration."""
    [config] = re.findall(r"```\n(@version.*?)```", DOCS.read_text(), re.DOTALL)
    return str(config)


class SyslogNg:
    """Debian's syslog-ng, which tails `file` and keeps what it knows in `folder`. It can be killed and started again."""

    def __init__(self, folder: Path, config: str, file: Path, url: str) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for documented, ours in (("/var/log/shop/app.log", str(file)), ("http://onset:8080", url), ("/var/lib/syslog-ng", str(folder))):
            assert documented in config
            config = config.replace(documented, ours)
        (folder / "onset.conf").write_text(config)
        state = [f"--{name}={folder / name}" for name in ("persist-file", "control", "pidfile")]
        self._command = [program("syslog-ng", "syslog-ng-core"), "--foreground", "--no-caps", f"--cfgfile={folder / 'onset.conf'}", *state]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SyslogNg:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def stop(self) -> None:
        """It ends in order."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
