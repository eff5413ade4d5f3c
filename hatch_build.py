"""The wheel holds the built console: made here where npm is, unless `make console` has made it already.

Without npm, or where its registry cannot be reached, the wheel is built without it, and said so: the service then serves its plain table.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConsoleBuild(BuildHookInterface[Any]):
    """Runs `npm ci` and `npm run build` in console/ before a wheel is made. An editable install leaves that to `make console`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`version` is standard or editable."""
        root = Path(self.root)
        built = root / "service" / "console" / "dist" / "index.html"
        if version == "editable" or built.is_file() or not (root / "console" / "package.json").is_file():
            return
        npm = shutil.which("npm")
        if npm is None:
            self.app.display_warning("npm is not on this machine: the wheel has no console, and the service will serve its plain table.")
            return
        try:
            for command in (["ci", "--fetch-retries=1", "--no-audit", "--no-fund"], ["run", "build"]):
                subprocess.run([npm, *command], cwd=root / "console", check=True)
        except subprocess.CalledProcessError as error:
            self.app.display_warning(f"The console could not be built ({error}): the service will serve its plain table.")
