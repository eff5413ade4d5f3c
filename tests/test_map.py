"""The map of the service, for who comes new to it, has all of it."""

from __future__ import annotations

import re
from pathlib import Path

import service


def test_each_module_is_on_the_map_and_nothing_that_there_is_not() -> None:
    folder = Path(service.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    assert service.__doc__
    words = set(re.findall(r"[a-z_]+/?", service.__doc__))
    assert modules <= words, "a module that is not on the map"
    assert {f"{name}/" for name in packages} == {word for word in words if word.endswith("/")}
