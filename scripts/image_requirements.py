"""Prints what the container image installs, one requirement a line: `image_requirements.py cpu|gpu pyproject.toml`.

pyproject.toml picks ONNX Runtime by platform, and on x86-64 Linux that is the GPU wheel, whose CUDA provider alone is 284 MB. An image
knows better than a platform marker what it is for, so it names its runtime. Exactly one is printed: the two wheels overwrite each other.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


def name_of(requirement: str) -> str:
    """The distribution's name: the requirement up to its extras, version or marker."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def without_marker(requirement: str) -> str:
    return requirement.partition(";")[0].strip()


EXTRAS = ("kafka", "nats", "mqtt", "amqp", "otel")
"""Those that every image has: which queue is read, and where traces go, is said when it is started."""


def requirements(pyproject: Path, runtime: str) -> list[str]:
    """The project's base dependencies, the EXTRAS, and one ONNX Runtime: `cpu`, or `gpu` with its CUDA libraries."""
    project = tomllib.loads(pyproject.read_text())["project"]
    base = [line for line in project["dependencies"] if name_of(line) not in RUNTIMES]
    if runtime == "cpu":
        chosen = [line for line in project["dependencies"] if name_of(line) == "onnxruntime"]
    elif runtime == "gpu":
        chosen = project["optional-dependencies"]["gpu"]
    else:
        raise SystemExit(f"RUNTIME is {runtime!r}; it is cpu or gpu")
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    return [*base, *map(without_marker, [*chosen, *extras])]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[2]), sys.argv[1])))
