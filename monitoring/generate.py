"""Writes what is made from code: `python -m monitoring.generate`. A test fails where what is committed is anything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from monitoring import pages

ROOT = Path(__file__).parent.parent


def files() -> Mapping[str, str]:
    """Path below the repository's root → content."""
    return {"docs/metrics.md": pages.metrics()}


def main() -> None:
    for name, content in files().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(name)


if __name__ == "__main__":
    main()
