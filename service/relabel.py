"""Prometheus' relabel_config: rules that choose series and change their labels, in the syntax of its own files.

    relabel_configs:
      - source_labels: [__name__]
        regex: node_(load1|memory_MemAvailable_bytes)
        action: keep

Semantics are those of Prometheus 3 (model/relabel in its source): regular expressions are RE2's, anchored at both ends, `.` matches a
line end too; a label with an empty value is no label. Label names that rules write are of the classic form [a-zA-Z_][a-zA-Z0-9_]*.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from service.artifact import compiled
from service.errors import BadSetting

MAX_RULES = 1000

Action = Literal[
    "replace", "keep", "drop", "keepequal", "dropequal", "hashmod", "labelmap", "labeldrop", "labelkeep", "lowercase", "uppercase"
]
Labels = dict[str, str]

LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
"""Names of labels that every version of Prometheus and Alertmanager takes; newer ones take any."""
_TARGET = re.compile(r"(?:(?:[a-zA-Z_]|\$(?:\{\w+\}|\w+))+\w*)+", re.ASCII)
_REFERENCE = re.compile(r"\$(?:\$|(\w+)|\{(\w+)\})", re.ASCII)
_DEFAULTS = {"separator": ";", "regex": "(.*)", "modulus": 0, "replacement": "$1", "target_label": "", "source_labels": ()}
_TO_A_LABEL = ("replace", "hashmod", "lowercase", "uppercase", "keepequal", "dropequal")
# Fields that mean nothing to an action, and that Prometheus refuses with it.
_REFUSED: dict[str, tuple[str, ...]] = {
    "labeldrop": ("source_labels", "target_label", "modulus", "separator", "replacement"),
    "labelkeep": ("source_labels", "target_label", "modulus", "separator", "replacement"),
    "keepequal": ("regex", "modulus", "separator", "replacement"),
    "dropequal": ("regex", "modulus", "separator", "replacement"),
    "lowercase": ("replacement",),
    "uppercase": ("replacement",),
}


class Rule(BaseModel):
    """One relabel_config, checked as Prometheus checks it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source_labels: tuple[str, ...] = ()
    separator: str = ";"
    regex: str = "(.*)"
    modulus: int = Field(default=0, ge=0, lt=2**64)
    target_label: str = ""
    replacement: str = "$1"
    action: Action = "replace"

    _regexp: Any = PrivateAttr()

    @field_validator("action", mode="before")
    @classmethod
    def _in_lower_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str) -> str:
        compiled(value)
        return value

    @model_validator(mode="after")
    def _fits_the_action(self) -> Rule:
        action, target = self.action, self.target_label
        refused = [name for name in _REFUSED.get(action, ()) if getattr(self, name) != _DEFAULTS[name]]
        if refused:
            raise ValueError(f"action {action} takes no {refused[0]}")
        if action in _TO_A_LABEL and not target:
            raise ValueError(f"action {action} needs target_label")
        if action == "hashmod" and self.modulus == 0:
            raise ValueError("action hashmod needs a modulus above 0")
        form = _TARGET if action == "replace" and "$" in target else LABEL
        if action in _TO_A_LABEL and not form.fullmatch(target):
            raise ValueError(f"target_label {target[:64]!r} is no name of a label")
        if action == "labelmap" and not _TARGET.fullmatch(self.replacement):
            raise ValueError(f"replacement {self.replacement[:64]!r} is no name of a label")
        self._regexp = compiled(f"(?s){self.regex}")
        return self

    def apply(self, labels: Labels) -> bool:
        """Change the labels in place; whether the series is kept."""
        return _ACTIONS[self.action](self, labels)

    def matches(self, text: str) -> bool:
        return self._regexp.fullmatch(text) is not None

    def expanded(self, template: str, text: str) -> str | None:
        """`template` with the groups of the match in place of $1, ${1} and ${name}; None = no match."""
        match = self._regexp.fullmatch(text)
        return None if match is None else _REFERENCE.sub(lambda reference: _group(match, reference), template)


def relabel(labels: Labels, rules: Sequence[Rule]) -> bool:
    """Apply the rules in order, in place; whether the series is kept."""
    return all(rule.apply(labels) for rule in rules)


def read_rules(path: Path) -> tuple[Rule, ...]:
    """The `relabel_configs` of a YAML file. Raises BadSetting that names file, rule and field."""
    try:
        # Every scalar is text, as for Prometheus: `replacement: 1` and `regex: true` are no numbers.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506  makes text, lists and maps only
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadSetting(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or content.keys() != {"relabel_configs"} or not isinstance(content["relabel_configs"], list):
        raise BadSetting(f"{path} must have one key, relabel_configs, with a list of rules.")
    found = content["relabel_configs"]
    if len(found) > MAX_RULES:
        raise BadSetting(f"{path} has {len(found)} rules; at most {MAX_RULES}.")
    return tuple(_rule(path, i, rule) for i, rule in enumerate(found))


def _rule(path: Path, i: int, content: Any) -> Rule:
    try:
        return Rule.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (f"relabel_configs[{i}]", *first["loc"])))
        raise BadSetting(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}.") from error


def _group(match: Any, reference: re.Match[str]) -> str:
    """What a reference in a template stands for; a group that is not there is empty."""
    name = reference[1] or reference[2]
    if name is None:
        return "$"
    try:
        return match.group(int(name) if name.isdigit() else name) or ""
    except (IndexError, KeyError):
        return ""


def _text(rule: Rule, labels: Labels) -> str:
    return rule.separator.join([labels.get(name, "") for name in rule.source_labels])


def _set(labels: Labels, name: str, value: str) -> None:
    if value:
        labels[name] = value
    else:
        labels.pop(name, None)


def _replace(rule: Rule, labels: Labels) -> bool:
    text = _text(rule, labels)
    target = rule.expanded(rule.target_label, text)
    if target is not None and LABEL.fullmatch(target):
        _set(labels, target, rule.expanded(rule.replacement, text) or "")
    return True


def _hashmod(rule: Rule, labels: Labels) -> bool:
    digest = hashlib.md5(_text(rule, labels).encode(), usedforsecurity=False).digest()
    labels[rule.target_label] = str(int.from_bytes(digest[8:], "big") % rule.modulus)
    return True


def _labelmap(rule: Rule, labels: Labels) -> bool:
    for name, value in list(labels.items()):
        mapped = rule.expanded(rule.replacement, name)
        if mapped is not None:
            _set(labels, mapped, value)
    return True


def _without(labels: Labels, names: Sequence[str]) -> bool:
    for name in names:
        del labels[name]
    return True


def _in_case(change: Callable[[str], str]) -> Callable[[Rule, Labels], bool]:
    def apply(rule: Rule, labels: Labels) -> bool:
        _set(labels, rule.target_label, change(_text(rule, labels)))
        return True

    return apply


_ACTIONS: Mapping[str, Callable[[Rule, Labels], bool]] = {
    "replace": _replace,
    "keep": lambda rule, labels: rule.matches(_text(rule, labels)),
    "drop": lambda rule, labels: not rule.matches(_text(rule, labels)),
    "keepequal": lambda rule, labels: labels.get(rule.target_label, "") == _text(rule, labels),
    "dropequal": lambda rule, labels: labels.get(rule.target_label, "") != _text(rule, labels),
    "hashmod": _hashmod,
    "labelmap": _labelmap,
    "labeldrop": lambda rule, labels: _without(labels, [name for name in labels if rule.matches(name)]),
    "labelkeep": lambda rule, labels: _without(labels, [name for name in labels if not rule.matches(name)]),
    "lowercase": _in_case(str.lower),
    "uppercase": _in_case(str.upper),
}
