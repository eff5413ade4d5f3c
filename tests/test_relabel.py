"""Relabel rules do what Prometheus' own do: its examples and its tests' cases, written as the YAML that an operator writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from service.errors import BadSetting
from service.relabel import MAX_RULES, Rule, read_rules, relabel

Labels = dict[str, str]


def rules(text: str, tmp_path: Path) -> tuple[Rule, ...]:
    path = tmp_path / "relabel.yml"
    path.write_text("relabel_configs:\n" + text)
    return read_rules(path)


ABC = {"a": "foo", "b": "bar", "c": "baz"}

# name, labels before, rules, labels after (None = dropped)
CASES: list[tuple[str, Labels, str, Labels | None]] = [
    (
        "a replacement with groups sets another label",
        ABC,
        "- {source_labels: [a], regex: f(.*), target_label: d, replacement: 'ch${1}-ch${1}'}",
        ABC | {"d": "choo-choo"},
    ),
    (
        "rules see what rules before them wrote",
        ABC,
        """
        - {source_labels: [a, b], regex: f(.*);(.*)r, target_label: a, replacement: 'b${1}${2}m'}
        - {source_labels: [c, a], regex: (b).*b(.*)ba(.*), target_label: d, replacement: $1$2$2$3}
        """,
        ABC | {"a": "boobam", "d": "boooom"},
    ),
    ("drop ends it all", {"a": "foo"}, "- {source_labels: [a], regex: .*o.*, action: drop}\n- {target_label: d, replacement: x}", None),
    ("a regex is anchored at both ends", {"a": "foo"}, "- {source_labels: [a], regex: f|o, action: drop}", {"a": "foo"}),
    (
        "a match in the middle needs dots around it",
        {"a": "abc"},
        "- {source_labels: [a], regex: .*(b).*, target_label: d}",
        {"a": "abc", "d": "b"},
    ),
    ("keep keeps what matches", {"a": "foo"}, "- {source_labels: [a], regex: f.*, action: keep}", {"a": "foo"}),
    ("keep drops what does not", {"a": "foo"}, "- {source_labels: [a], regex: no-match, action: keep}", None),
    (
        "without a match nothing is replaced",
        {"a": "boo"},
        "- {source_labels: [a], regex: f, target_label: b, replacement: bar}",
        {"a": "boo"},
    ),
    ("hashmod is Prometheus' own hash", ABC, "- {source_labels: [c], target_label: d, action: hashmod, modulus: 1000}", ABC | {"d": "976"}),
    (
        "hashmod takes line ends",
        {"a": "foo\nbar"},
        "- {source_labels: [a], target_label: b, action: hashmod, modulus: 1000}",
        {"a": "foo\nbar", "b": "734"},
    ),
    (
        "labelmap copies to mapped names",
        {"a": "foo", "__meta_my_bar": "aaa", "__meta_other": "ccc"},
        "- {regex: __meta_(my.*), replacement: '${1}', action: labelmap}",
        {"a": "foo", "__meta_my_bar": "aaa", "__meta_other": "ccc", "my_bar": "aaa"},
    ),
    (
        "labelmap with a prefix",
        {"a": "foo", "b1": "bar", "b2": "baz"},
        "- {regex: (b.*), replacement: 'bar_${1}', action: labelmap}",
        {"a": "foo", "b1": "bar", "b2": "baz", "bar_b1": "bar", "bar_b2": "baz"},
    ),
    (
        "the name of the target may come from the match",
        {"a": "some-name-value"},
        "- {source_labels: [a], regex: 'some-([^-]+)-([^,]+)', replacement: '${2}', target_label: '${1}'}",
        {"a": "some-name-value", "name": "value"},
    ),
    (
        "a group that is not there is empty, and an empty value removes the label",
        {"a": "some-name-value", "name": "old"},
        "- {source_labels: [a], regex: 'some-([^-]+)-([^,]+)', replacement: '${3}', target_label: '${1}'}",
        {"a": "some-name-value"},
    ),
    (
        "a target that is no label name is left alone",
        {"a": "some-name-0"},
        "- {source_labels: [a], regex: 'some-([^-]+)-([^,]+)', replacement: '${1}', target_label: '${2}'}",
        {"a": "some-name-0"},
    ),
    (
        "tags in one label become labels",
        {"__meta_sd_tags": "path:/secret,job:some-job,label:foo=bar"},
        """
        - {source_labels: [__meta_sd_tags], regex: '(?:.+,|^)path:(/[^,]+).*', target_label: __metrics_path__}
        - {source_labels: [__meta_sd_tags], regex: '(?:.+,|^)job:([^,]+).*', target_label: job}
        - {source_labels: [__meta_sd_tags], regex: '(?:.+,|^)label:([^=]+)=([^,]+).*', target_label: '${1}', replacement: '${2}'}
        """,
        {"__meta_sd_tags": "path:/secret,job:some-job,label:foo=bar", "__metrics_path__": "/secret", "job": "some-job", "foo": "bar"},
    ),
    ("labelkeep", {"a": "foo", "b1": "bar", "b2": "baz"}, "- {regex: (b.*), action: labelkeep}", {"b1": "bar", "b2": "baz"}),
    ("labeldrop", {"a": "foo", "b1": "bar", "b2": "baz"}, "- {regex: (b.*), action: labeldrop}", {"a": "foo"}),
    (
        "upper and lower case",
        {"foo": "bAr123Foo"},
        "- {source_labels: [foo], action: Uppercase, target_label: up}\n- {source_labels: [foo], action: lowercase, target_label: low}",
        {"foo": "bAr123Foo", "low": "bar123foo", "up": "BAR123FOO"},
    ),
    (
        "keepequal keeps equal ones",
        {"a": "1", "b": "1"},
        "- {source_labels: [a], action: keepequal, target_label: b}",
        {"a": "1", "b": "1"},
    ),
    ("keepequal drops others", {"a": "1", "b": "2"}, "- {source_labels: [a], action: keepequal, target_label: b}", None),
    ("dropequal drops equal ones", {"a": "1", "b": "1"}, "- {source_labels: [a], action: dropequal, target_label: b}", None),
    ("dropequal keeps others", {"a": "1", "b": "2"}, "- {source_labels: [a], action: dropequal, target_label: b}", {"a": "1", "b": "2"}),
    (
        "labels that are not there are empty",
        {"a": "1"},
        "- {source_labels: [x, y], regex: ;, target_label: b, replacement: none}",
        {"a": "1", "b": "none"},
    ),
    ("a fixed label", {"a": "1"}, "- {target_label: cluster, replacement: eu-1}", {"a": "1", "cluster": "eu-1"}),
    ("an empty replacement removes a label", {"a": "1", "b": "2"}, "- {target_label: b, replacement: ''}", {"a": "1"}),
    ("a number in YAML is text", {"a": "1"}, "- {source_labels: [a], regex: 1, target_label: b, replacement: 007}", {"a": "1", "b": "007"}),
    (
        "another separator",
        {"a": "x", "b": "y"},
        "- {source_labels: [a, b], separator: '@', target_label: c}",
        {"a": "x", "b": "y", "c": "x@y"},
    ),
    (
        "a named group, and a dollar",
        {"a": "x7"},
        r"- {source_labels: [a], regex: 'x(?P<n>\d)', target_label: b, replacement: '$$${n}'}",
        {"a": "x7", "b": "$7"},
    ),
    ("$1x is the group 1x", {"a": "x"}, "- {source_labels: [a], target_label: b, replacement: 'v$1x'}", {"a": "x", "b": "v"}),
    ("a dot matches a line end", {"a": "x\ny"}, "- {source_labels: [a], regex: x.y, action: keep}", {"a": "x\ny"}),
    ("RE2's classes", {"a": "é7"}, r"- {source_labels: [a], regex: '\pL[[:digit:]]', action: keep}", {"a": "é7"}),
    ("no rules", {"a": "1"}, "[]", {"a": "1"}),
]


@pytest.mark.parametrize(("before", "text", "after"), [case[1:] for case in CASES], ids=[case[0].replace(" ", "_") for case in CASES])
def test_rules_do_what_prometheus_does(before: Labels, text: str, after: Labels | None, tmp_path: Path) -> None:
    labels = dict(before)
    path = tmp_path / "relabel.yml"
    path.write_text(yaml.safe_dump({"relabel_configs": yaml.load(text, yaml.BaseLoader)}))
    assert (labels if relabel(labels, read_rules(path)) else None) == after


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {action: explode}", "relabel_configs[0].action: Input should be 'replace'"),
        ("- {source_labels: [a], regex: (, action: keep}", "'(' is no expression of RE2: missing )"),
        ("- {source_labels: [a], regex: '(?=x)', action: keep}", "is no expression of RE2"),
        ("- {source_labels: [a]}", "action replace needs target_label"),
        ("- {source_labels: [a], action: hashmod, target_label: b}", "hashmod needs a modulus above 0"),
        ("- {target_label: '0${3}'}", "target_label '0${3}' is no name of a label"),
        ("- {target_label: '-${3}'}", "is no name of a label"),
        ("- {action: lowercase, target_label: '${3}'}", "is no name of a label"),
        ("- {action: labelmap, replacement: '-$1'}", "replacement '-$1' is no name of a label"),
        ("- {action: labeldrop, regex: a, source_labels: [a]}", "action labeldrop takes no source_labels"),
        ("- {action: keepequal, source_labels: [a], target_label: b, regex: c}", "action keepequal takes no regex"),
        ("- {action: uppercase, source_labels: [a], target_label: b, replacement: c}", "action uppercase takes no replacement"),
        ("- {action: keep, source_label: [a]}", "relabel_configs[0].source_label: Extra inputs are not permitted"),
        (
            "- {action: keep}\n- {action: hashmod, target_label: a, modulus: many}",
            "relabel_configs[1].modulus: Input should be a valid integer",
        ),
        ("- {}\n" * (MAX_RULES + 1), f"at most {MAX_RULES}"),
        ("- [}", "cannot be read"),
        ("  a: b", "must have one key, relabel_configs, with a list of rules"),
    ],
)
def test_a_rule_that_prometheus_would_refuse_is_refused_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadSetting) as refused:
        rules(text, tmp_path)
    assert says in refused.value.detail
    assert str(tmp_path / "relabel.yml") in refused.value.detail


def test_a_file_that_is_not_there_or_holds_another_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="cannot be read"):
        read_rules(tmp_path / "none.yml")
    (tmp_path / "other.yml").write_text("write_relabel_configs: []")
    with pytest.raises(BadSetting, match="must have one key, relabel_configs"):
        read_rules(tmp_path / "other.yml")
