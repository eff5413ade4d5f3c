"""Reads the files that deploy Onset, for the tests that hold them together."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml

from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
COMPOSE = ROOT / "docker-compose.yml"
K8S = ROOT / "k8s"
BASE = K8S / "base"
SINGLE = K8S / "overlays" / "single"

STREAM_BYTES = 2500
"""What a stream of eight features takes in the store (`python -m bench.memory`), and a part of what else is in there."""

Document = dict[str, Any]


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs a command-line tool of this virtual environment."""
    return subprocess.run([Path(sys.executable).parent / name, *arguments], capture_output=True, text=True, check=False, timeout=60)


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, rest of its logical line)."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    logical = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in logical if line.strip()]


def image_environment() -> dict[str, str]:
    """What the final stage's ENV sets, in the last image only."""
    last_stage = max(i for i, (name, _) in enumerate(instructions()) if name == "FROM")
    text = " ".join(rest for name, rest in instructions()[last_stage:] if name == "ENV")
    return dict(pair.split("=", 1) for pair in text.split())


def compose() -> Document:
    document: Document = yaml.safe_load(COMPOSE.read_text())
    return document


def manifests(folder: Path) -> list[Document]:
    """Every object of a kustomize folder's own manifests, without the kustomization and its patches."""
    others = ("kustomization.yaml", "sources.yaml")
    paths = [path for path in sorted(folder.glob("*.yaml")) if path.name not in others and not path.name.endswith("-patch.yaml")]
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def find(documents: list[Document], kind: str, name: str) -> Document:
    """The one object of that kind and name; a hash that kustomize appended does not count."""
    matches = [d for d in documents if d["kind"] == kind and re.fullmatch(rf"{name}(-[a-z0-9]{{10}})?", d["metadata"]["name"])]
    assert len(matches) == 1, f"{len(matches)} objects {kind}/{name}"
    return matches[0]


def env_file(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def settings_from(environment: dict[str, str]) -> Settings:
    """The settings a service would start with; an unknown ONSET_ name or a refused value raises. ${NAME:-default} is its default."""
    plain = {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in environment.items()}
    ours = {name.removeprefix("ONSET_").lower(): value for name, value in plain.items() if name.startswith("ONSET_")}
    return Settings(**ours)  # type: ignore[arg-type]
