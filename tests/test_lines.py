"""A line becomes the same code everywhere: by its template, whatever numbers, addresses and times it holds."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import re2
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from service import lines
from service.artifact import NEW_KINDS, Lines, Mask
from service.lines import DEFAULT_MASKS, Matcher, Splitter


def matcher(*templates: str, **more: object) -> Matcher:
    return Matcher(Lines.model_validate({"masks": DEFAULT_MASKS, "templates": list(templates)} | more))


def codes(matcher: Matcher, *messages: str) -> list[int]:
    return [int(code) for code in matcher.codes(messages)[0].tolist()]


def numbers(matcher: Matcher, message: str) -> list[float]:
    _, found = matcher.codes([message])
    return [number for number in found[0].tolist() if not np.isnan(number)]


@pytest.mark.parametrize(
    ("word", "masked"),
    [
        ("12.5", "<NUM>"),
        ("-3", "<NUM>"),
        ("1e-7,", "<NUM>,"),
        ("size=67108864", "size=<NUM>"),
        ("12ms", "<NUM>ms"),
        ("(3/5)", "(<NUM>/<NUM>)"),
        ("eth0", "eth<ID>"),
        ("blk_-1608999687919862906", "blk_<ID>"),
        ("/10.250.19.102:54106", "/<IP>"),
        ("0xdeadBEEF", "<HEX>"),
        ("9f86d081884c7d65", "<HEX>"),
        ("deadbeef", "<HEX>"),
        ("[req-effcb2c9]", "[req-<HEX>]"),
        ("81744e12", "<HEX>"),
        ("43642324", "<NUM>"),
        ("facade", "facade"),
        ("123e4567-e89b-12d3-a456-426614174000", "<UUID>"),
        ("00:1a:2b:3c:4d:5e", "<MAC>"),
        ("fe80::1ff:fe23:4567:890a", "<IP>"),
        ("15:42:50,123", "<TIME>"),
        ("2026-11-26T08:00:00.5+01:00", "<TIME>"),
        ("2005-06-03-15.42.50.363779", "<TIME>"),
        ("2005.06.03", "<TIME>"),
        ("dfs.DataNode$DataXceiver:", "dfs.DataNode$DataXceiver:"),
    ],
)
def test_what_tells_lines_of_one_pattern_apart_is_masked(word: str, masked: str) -> None:
    assert Splitter("", DEFAULT_MASKS, "").masked_word[word] == masked


@given(st.text(st.sampled_from("0123456789abcdefxXEz.:-_+/,=TZ "), max_size=40))
def test_the_default_masks_mean_the_same_to_both_engines(text: str) -> None:
    for mask in DEFAULT_MASKS:
        assert [found.span() for found in re.finditer(mask.pattern, text, re.ASCII)] == [
            found.span() for found in re2.finditer(mask.pattern, text)
        ]


@given(st.text(st.sampled_from("0123456789abefxXEz.:-_+/,=TZ"), min_size=1, max_size=40))
def test_words_of_one_shape_are_masked_as_each_by_itself(word: str) -> None:
    splitter = Splitter("", DEFAULT_MASKS, "")
    other = word.translate(str.maketrans("123456789", "987654321"))
    splitter.masked_word[other]  # its shape is known by now
    expected = re.sub("|".join(f"({mask.pattern})" for mask in DEFAULT_MASKS), _replaced, word, flags=re.ASCII)
    assert splitter.masked_word[word] == expected


def _replaced(found: re.Match[str]) -> str:
    return DEFAULT_MASKS[(found.lastindex or 0) - 1].replacement


def test_the_default_masks_take_linear_time() -> None:
    splitter = Splitter("", DEFAULT_MASKS, "")
    for part in ("1", "a1", "1:", "1.", "0a", "1-", "ab:", "-1", "1e", "_1"):
        splitter.masked_word[part * 300_000]  # in quadratic time minutes each, longer than a test may take


def test_the_template_with_the_fewest_wildcards_is_taken() -> None:
    found = matcher("user <*> <*>", "user root <*>", "user <*> out", "user root out")
    assert codes(found, "user anna in", "user root in", "user anna out", "user root out", "user root", "users") == [1, 2, 3, 4, 0, 0]


def test_a_line_that_matches_no_template_is_a_new_pattern_and_gives_no_numbers() -> None:
    found = matcher("Took <NUM> ms")
    assert codes(found, "Took 3 ms", "Took 3 s", "Gave 3 ms", "") == [1, 0, 0, 0]
    assert numbers(found, "Took 3 s") == []


def test_new_patterns_of_as_many_words_that_begin_alike_are_of_one_kind() -> None:
    said = ["cache: warmed region eu with 7 entries", "cache: warmed region us with 812 entries", "cache: cold region us with 812 entries"]
    codes, _ = Matcher(Lines(templates=["close"])).codes([*said, "cache: warmed region us", "close"])
    assert (codes * 2 * NEW_KINDS).tolist() == [15, 15, 2, 6, 2 * NEW_KINDS]  # on every replica, after every restart
    assert codes[:4].max() < 0.5


def test_numbers_are_those_that_the_template_knows_in_order() -> None:
    found = matcher("a <NUM> of size=<NUM>, <*> (<NUM>/<NUM>) <NUM>")
    assert numbers(found, "a 1 of size=2.5, x (3/4) 5") == [1, 2.5, 3, 4]
    assert numbers(matcher("<IP>:t=<NUM> [<NUM>]"), "10.0.0.7:t=9 [8]") == [9, 8]
    assert numbers(matcher("[<NUM>]", "at-<NUM>-<ID>"), "[8]") == [8]
    assert numbers(found, "a 1 of size=2.5, 77 (3/4) 5") == [1, 2.5, 3, 4]


def test_an_id_without_a_letter_is_an_id_where_nothing_else_matches() -> None:
    found = matcher("took <NUM> ms", "at <HEX> of <HEX>:<NUM> in <NUM> s", "at <*> of <HEX> in <NUM> s", "code <HEX>", "code <NUM>")
    said = [
        "at 12ab34cd of 12ab34cd:5 in 7 s",
        "at 12345678 of 12ab34cd:5 in 7 s",
        "at 12345678 of 87654321:5 in 7 s",
        "at x of 87654321 in 7 s",
    ]
    assert codes(found, *said) == [2, 2, 2, 3]
    assert [numbers(found, line) for line in said] == [[5, 7], [5, 7], [5, 7], [7]]
    assert codes(found, "took 0x1f ms", "code 12", "code 0x1f", "at 12345678 of 87654321:x in 7 s") == [0, 5, 4, 0]


def test_numbers_beyond_float32_or_that_are_none_are_missing() -> None:
    masks = [{"name": "any", "pattern": "#.*", "replacement": "<NUM>"}]
    assert numbers(matcher("at <NUM>", masks=masks), "at #x") == []
    assert numbers(matcher("at <NUM>"), "at 1e300") == []
    assert numbers(matcher("at <NUM>", "at x=<NUM>"), "at <NUM>") == []
    assert numbers(matcher("at <NUM>", "at x=<NUM>"), "at x=<NUM>") == []


def test_only_the_first_line_of_a_message_is_matched_and_its_header_is_cut_off() -> None:
    found = matcher("java.io.IOException: broken", "<TIME> boot", header=r"\d{4}-\d\d-\d\d \S+ \[\w+\] ")
    trace = "\n2026-11-26 08:00:00,123 [main] java.io.IOException: broken\n\tat a.b.C(C.java:7)\n"
    assert codes(found, trace, "java.io.IOException: broken", "2026-11-26 boot") == [1, 1, 2]


HEADERS = (r"\S+ (\d{10}) \S+ ", r"\d{4}-\d\d-\d\d[T ](\S+)?\s*", r"(?i)[é-ü]+: ", r".*?\] ", r"(?:<\d+>)?\w{3} +\d+ ", r"")


@given(st.sampled_from(HEADERS), st.text(st.sampled_from("019 é-ü:T<>]aZ\u2028\u00a0\U0001f600\t"), max_size=40))
def test_a_header_is_cut_off_where_its_expression_ends_whatever_the_line_holds(header: str, message: str) -> None:
    found = re2.match(header, message)
    assert Splitter(header, (), "").words(message) == (message[found.end() :] if found else message).split()


def test_delimiters_separate_tokens_after_masking() -> None:
    found = matcher("state <*> at <IP> n <NUM>", delimiters="=;")
    assert codes(found, "state=up at 10.0.0.7:80;n=4", "state = up at 10.0.0.7:80; n=4") == [1, 1]
    assert numbers(found, "state = up at 10.0.0.7:80; n=4") == [4]


def test_masks_of_others_run_in_an_engine_that_no_line_stops() -> None:
    slow = Mask(name="slow", pattern="(a|aa)+$", replacement="<A>")
    splitter = Splitter("", [slow], "")
    assert splitter.masked_word["a" * 5000 + "b"] == "a" * 5000 + "b"
    assert splitter.masked_word["xaaa"] == "x<A>"


USERS = Mask(name="user", pattern=r"u(\d+|x)", replacement="<USER>")
MAILS = Mask(name="mail", pattern=r"\w+@\w+$", replacement="<MAIL>")
TIMED = Mask(name="timed", pattern=r"^e\d|\dZ", replacement="<E>")
NAMES = Mask(name="name", pattern=r"\b12\d+\b|e=", replacement="")


@given(st.text(st.sampled_from("0123456789abefxuXEz.:-_+/,=@TZ"), max_size=40))
@example("1u1u12-0x1@ab")
@example("1234:56-12e=7")
def test_masks_of_others_and_the_default_ones_mean_what_they_mean_as_one_expression(word: str) -> None:
    masks = [USERS, MAILS, NAMES, *DEFAULT_MASKS, TIMED]
    groups = np.cumsum([1, *(re2.compile(mask.pattern).groups + 1 for mask in masks)]).tolist()
    found = [
        (match.span(), next(mask for group, mask in zip(groups, masks, strict=False) if match.start(group) >= 0))
        for match in re2.finditer("|".join(f"({mask.pattern})" for mask in masks), word)
    ]
    expected, end = "", 0
    for (start, after), mask in found:
        expected, end = expected + word[end:start] + (mask.replacement or word[start:after]), after
    splitter = Splitter("", masks, "")
    assert splitter.masked_word[word] == expected + word[end:]
    assert splitter.numbers(word) == [word[slice(*span)] for span, mask in found if mask.replacement == "<NUM>"]


@pytest.mark.parametrize("part", ["0x", "1-", "1.", "a:"])
def test_a_long_word_does_not_take_seconds_with_masks_of_others(part: str) -> None:
    splitter, word = Splitter("", [USERS, MAILS, *DEFAULT_MASKS], ""), "u1=" + part * (65_000 // len(part))
    before = time.process_time()
    splitter.masked_word[word]
    assert time.process_time() - before < 2


def test_a_mask_that_takes_in_nothing_changes_nothing() -> None:
    assert Splitter("", [Mask(name="edge", pattern=r"\b", replacement="<X>"), *DEFAULT_MASKS], "").masked_word["a-b1"] == "a-b<ID>"


def test_a_new_pattern_is_shown_as_far_as_there_is_room() -> None:
    splitter = Splitter("", DEFAULT_MASKS, "=")
    line = "  a=1 " + "word17 " * 3000
    for length in (1, 2, 7, 12, 13, 1000):
        assert splitter.pattern(line, length) == " ".join(splitter.tokens(line))[:length]
    assert splitter.pattern("a=1  b", 1000) == "a <NUM> b"


def test_masks_with_groups_of_their_own_keep_their_replacements() -> None:
    masks = [Mask(name="user", pattern="user-(a|b)+", replacement="<USER>"), Mask(name="n", pattern="([0-9])+", replacement="<NUM>")]
    splitter = Splitter("", masks, "")
    assert splitter.masked_word["user-ab:12"] == "<USER>:<NUM>"
    assert splitter.numbers("user-ab:12") == ["12"]


def test_memories_are_bounded_and_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "WORDS", 50)
    monkeypatch.setattr(lines, "KNOWN", 10)
    found, rng = matcher("a <*> <NUM>", "b <NUM>"), np.random.default_rng(0)
    said = [f"a w{'xyz'[i % 3] * (i % 40)} {rng.integers(10**6)}" if i % 3 else f"b {i}" for i in range(3000)]
    once, values = found.codes(said)
    again = [matcher("a <*> <NUM>", "b <NUM>").codes([message]) for message in said[:200]]
    assert once[:200].tolist() == [code[0] for code, _ in again]
    assert np.array_equal(values[:200], np.concatenate([value for _, value in again]), equal_nan=True)
    assert len(found.splitter.masked_word) <= 50
    assert len(found._known) <= 10


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"templates": []}, "at least 1"),
        ({"templates": ["a", "a"]}, "not unique"),
        ({"templates": ["a  b"]}, "tokens joined by one blank"),
        ({"masks": [{"name": "x", "pattern": "(?<=a)b", "replacement": "<X>"}]}, "no expression of RE2"),
        ({"masks": [{"name": "x", "pattern": "a*", "replacement": "<X>"}]}, "match everywhere"),
        ({"masks": [{"name": "x", "pattern": "a", "replacement": "<a b>"}]}, "replacement"),
        ({"header": "("}, "no expression of RE2"),
    ],
)
def test_lines_that_cannot_be_used_are_refused_by_field(bad: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Lines.model_validate({"templates": ["a"]} | bad)
