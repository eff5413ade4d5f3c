"""Templates such as `{plant}/{line}/{sensor}` and patterns of topics such as `plant/{line}/{sensor}/value`. Pure text."""

from __future__ import annotations

import re
from collections.abc import Mapping

_BRACES = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ONE, _REST = ("+", "*"), ("#", ">")


class Template:
    """A text with references in braces; without braces the whole text is one reference. Raises ValueError."""

    def __init__(self, text: str) -> None:
        self.text = text
        parts = _BRACES.split(text)
        self.literals, self.references = tuple(parts[::2]), tuple(parts[1::2])
        if any("{" in literal or "}" in literal for literal in self.literals):
            raise ValueError(f"'{text}' has a brace without its partner")
        if not self.references:
            self.literals, self.references = ("", ""), (text,)
        if not all(reference.strip() == reference != "" for reference in self.references):
            raise ValueError(f"'{text}' has braces without a name, or with spaces around it")

    def filled(self, values: tuple[str, ...]) -> str:
        """With one value for each reference, in order."""
        if len(values) == 1:
            return self.literals[0] + values[0] + self.literals[1]
        parts = [part for literal, value in zip(self.literals, values, strict=False) for part in (literal, value)]
        return "".join([*parts, self.literals[-1]])


class Pattern:
    """A topic with names for some of its levels, `/` or `.` between them; `+` or `*` is any level, `#` or `>` all that follow.

    Raises ValueError.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        separator = "/" if "/" in text else "."
        levels = text.split(separator)
        names = _BRACES.findall(text)
        if len(set(names)) < len(names):
            raise ValueError(f"'{text}' has a name twice")
        self.names = frozenset(names)
        before = re.escape(separator).join(self._level(level, separator) for level in levels[:-1])
        self._regex = re.compile(before + self._last(levels, separator))

    def match(self, topic: str) -> Mapping[str, str] | None:
        """The named levels; None = it is another topic."""
        found = self._regex.fullmatch(topic)
        return None if found is None else found.groupdict()

    def _last(self, levels: list[str], separator: str) -> str:
        before = re.escape(separator) if len(levels) > 1 else ""
        return before + ".+" if levels[-1] in _REST else before + self._level(levels[-1], separator)

    def _level(self, level: str, separator: str) -> str:
        """Regular expression of one level, which may be partly named: line-{line}."""
        any_ = f"[^{re.escape(separator)}]"
        if level in _ONE:
            return f"{any_}+"
        parts = _BRACES.split(level)
        for literal in parts[::2]:
            if not level or any(mark in literal for mark in "{}+*#>"):
                raise ValueError(f"'{self.text}' has a level '{level}' that is neither text nor {{name}} nor a wildcard by itself")
        for name in parts[1::2]:
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{self.text}' has {{{name}}}: a name has letters, digits and _")
        return "".join(re.escape(part) if i % 2 == 0 else f"(?P<{part}>{any_}+)" for i, part in enumerate(parts))
