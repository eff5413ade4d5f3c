"""A series has one name, whoever sends it; what it is scored as follows from its type, its name and the rules."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.events import MAX_NAME_LENGTH
from service.names import (
    MAX_LABEL_NAME,
    MAX_LABEL_VALUE,
    MAX_LABELS,
    OURS,
    REMEMBERED_BYTES,
    Names,
    Series,
    exported,
    is_counter,
    labels_of,
    resolve,
    stream_id_of,
)
from service.relabel import read_rules


def sent(**labels: str) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in labels.items()]


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ({"__name__": "up", "job": "node", "instance": "a:9100"}, 'up{instance="a:9100",job="node"}'),
        ({"__name__": "up"}, "up"),
        ({"job": "node"}, '{job="node"}'),
        ({"__name__": "job:errors:rate5m", "a": 'x"y\\z\n'}, 'job:errors:rate5m{a="x\\"y\\\\z\\n"}'),
        ({"__name__": "http.server.duration", "http.route": "/a"}, '{"http.server.duration","http.route"="/a"}'),
        ({"__name__": "up", "a": "tab\tü"}, 'up{a="tab\\x09ü"}'),
    ],
)
def test_a_name_is_what_promql_writes_with_its_labels_sorted(labels: dict[str, str], name: str) -> None:
    assert stream_id_of(labels) == name
    assert labels_of(name) == labels


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(labels=st.dictionaries(st.just("__name__") | st.from_regex(r"[a-z_]{1,8}", fullmatch=True) | texts, texts, min_size=1, max_size=6))
def test_a_name_is_given_once_and_read_back(labels: dict[str, str]) -> None:
    name = stream_id_of(labels)
    assert name == stream_id_of(dict(reversed(labels.items())))
    assert 0 < len(name) <= MAX_NAME_LENGTH
    assert not any(ord(character) < 32 or ord(character) == 127 for character in name)
    assert labels_of(name) == (labels if "~" not in name[-33:-32] or len(name) < MAX_NAME_LENGTH else None)


@given(name=st.text(max_size=40) | st.from_regex(r'[a-z]*\{("?[a-z]="[a-z"\\]*",?)*\}', fullmatch=True))
def test_what_is_no_name_of_a_series_is_not_taken_for_one(name: str) -> None:
    labels = labels_of(name)
    assert labels is None or stream_id_of(labels) == name


def test_a_long_name_is_shortened_to_its_first_characters_and_a_hash_of_all() -> None:
    labels = {"__name__": "container_memory_working_set_bytes", "id": "/kubepods/" + "x" * 300, "pod": "a"}
    name = stream_id_of(labels)
    assert len(name) == MAX_NAME_LENGTH
    assert name.startswith('container_memory_working_set_bytes{id="/kubepods/xxx')
    assert name[223] == "~"
    assert name != stream_id_of(labels | {"pod": "b"})
    assert name == stream_id_of(labels)
    assert name[224:] == "e934d1292d1e2b405e483a3ddc857868"  # for ever the same, or streams would start afresh
    assert labels_of(name) is None


def test_the_labels_of_a_hashed_name_are_remembered() -> None:
    names = Names((), most=2)
    series = names.name(b"key", sent(__name__="up", x="y" * 300), "")
    assert names.labels(series.stream_id) == {"__name__": "up", "x": "y" * 300}
    assert names.labels('up{a="b"}') == {"__name__": "up", "a": "b"}
    assert names.labels("pump-7/temperature") is None
    assert names.find(b"key") is series
    for i in range(100):  # sent in other orders of its labels
        names.name(b"again %d" % i, sent(__name__="up", x="y" * 300), "")
    assert names.labels(series.stream_id) is not None
    for i in range(2):
        names.name(b"%d" % i, sent(__name__="up", x=f"{i}" * 300), "")
    assert names.find(b"key") is None
    assert names.labels(series.stream_id) is None


def test_long_labels_take_no_more_memory_than_short_ones() -> None:
    names = Names((), most=100)
    for i in range(200):
        labels = sent(__name__="up", **{f"x{n}": f"{i:04}" * 1000 for n in range(50)})
        names.name(b"".join(name + value for name, value in labels), labels, "")
    kept = [len(key) for key in names._series.entries]
    assert sum(kept) <= 100 * REMEMBERED_BYTES
    assert len(names._hashed.entries) == len(kept) == 2  # the latest
    names.name(bytes(101 * REMEMBERED_BYTES), sent(__name__="up"), "")  # more than all may take
    assert not names._series.entries
    names.name(b"key", sent(__name__="up"), "")
    assert list(names._series.entries) == [b"key"]


def test_a_label_that_is_called_as_one_of_ours_takes_no_others_place() -> None:
    theirs = {"model": "a", "exported_model": "b", "job": "c"}
    assert exported(theirs, {"model"}) == {"exported_exported_model": "a", "exported_model": "b", "job": "c"}


def test_our_own_scores_are_never_scored() -> None:
    for name in OURS:
        assert resolve(sent(__name__=name, model="default", **{"for": "up"}), "", ())[0].skip == "own"
        assert resolve(sent(__name__=name, model="default", stream="pump-7", feature="value"), "", ())[0].skip == "own"
        assert resolve(sent(__name__=name, model="T-800"), "", ())[0].skip == "", "somebody else's"
    assert resolve(sent(__name__="y", axis="2"), "", ())[0].skip == ""  # somebody else's


@pytest.mark.parametrize(
    ("name", "metric_type", "counter"),
    [
        ("http_requests_total", "", True),
        ("request_seconds_bucket", "", True),
        ("request_seconds_count", "", True),
        ("request_seconds_sum", "", True),
        ("node_load1", "", False),
        ("http_requests", "counter", True),
        ("queue_count", "gauge", False),
        ("request_seconds_sum", "histogram", True),
        ("request_seconds_sum", "summary", True),
        ("request_seconds", "summary", False),  # a quantile
        ("build_total", "info", False),
    ],
)
def test_a_counter_is_known_by_its_type_or_by_its_name(name: str, metric_type: str, counter: bool) -> None:
    assert is_counter(name, metric_type) == counter
    assert resolve(sent(__name__=name, job="x"), metric_type, ())[0] == Series(f'{name}{{job="x"}}', counter)


def test_rules_see_the_type_and_decide_what_is_scored_as_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "relabel.yml"
    path.write_text("""relabel_configs:
- {source_labels: [__onset_type__], regex: info|stateset, action: drop}
- {source_labels: [__name__], regex: queue_count, target_label: __onset_rate__, replacement: ''}
- {source_labels: [__name__], regex: bytes_sent, target_label: __onset_rate__, replacement: 'true'}
- {regex: replica, action: labeldrop}
""")
    rules = read_rules(path)
    assert resolve(sent(__name__="build", x="1"), "info", rules)[0].skip == "rule"
    assert resolve(sent(__name__="queue_count"), "", rules)[0] == Series("queue_count", rate=False)
    assert resolve(sent(__name__="bytes_sent", replica="a"), "", rules)[0] == Series("bytes_sent", rate=True)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([(b"a", b"1"), (b"a", b"2")], "the label 'a' twice"),
        ([(b"", b"1")], "a label without a name"),
        ([(b"\xff", b"1")], "is not UTF-8"),
        ([(b"a", b"\xc3")], "is not UTF-8"),
        ([(b"l%d" % i, b"1") for i in range(MAX_LABELS + 1)], f"{MAX_LABELS + 1} labels; at most {MAX_LABELS}"),
        ([(b"a" * (MAX_LABEL_NAME + 1), b"1")], f"{MAX_LABEL_NAME + 1} bytes in its name"),
        ([(b"a", b"1" * (MAX_LABEL_VALUE + 1))], f"{MAX_LABEL_VALUE + 1} in its value"),
        ([], "no labels left"),
        ([(b"a", b"")], "no labels left"),
        ([(b"__meta", b"x")], "no labels left"),
    ],
)
def test_a_series_that_cannot_be_named_is_refused(labels: list[tuple[bytes, bytes]], says: str) -> None:
    series, _ = resolve(labels, "", ())
    assert series.error is not None
    assert says in series.error.detail


def test_labels_at_their_limits_are_taken_and_empty_ones_are_none() -> None:
    many = [(b"l%02d" % i, b"1") for i in range(MAX_LABELS)]
    assert resolve(many, "", ())[0].error is None
    assert resolve([(b"a" * MAX_LABEL_NAME, b"1" * MAX_LABEL_VALUE)], "", ())[0].error is None
    assert resolve([*sent(__name__="up"), (b"empty", b"")], "", ())[0].stream_id == "up"
