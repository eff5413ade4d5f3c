"""Log files become entries, and entries templates that every one of them matches."""

from __future__ import annotations

import gzip
import lzma
import math
import os
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from service import log_files
from service.artifact import NEW
from service.errors import TableError
from service.lines import DEFAULT_MASKS, Matcher, Splitter
from service.log_files import Counted, Entry, LogFormat, by_stream, read
from training.__main__ import app
from training.lines import MAX_TOKENS, Mining, grouping_accuracy, masks_of, mine, patterns

LOG = """2026-11-26 08:00:00,250 [req-1] Started GET /a for 10.0.0.7
2026-11-26 08:00:01,000 [req-2] java.io.IOException: broken
\tat a.b.C(C.java:7)

Caused by: x
2026-11-26 08:00:02,000 without a request
2026-11-26 08:00:03,500 [req-1] Completed 200 in 12 ms
"""
FORMAT = LogFormat(time="%Y-%m-%d %H:%M:%S,%f", stream=r"\[(req-\d+)\]")


def written(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["app.log", "app.log.gz"])
def test_entries_have_their_stream_their_time_and_the_lines_that_go_on_with_them(tmp_path: Path, name: str) -> None:
    counted = Counted()
    began = datetime(2026, 11, 26, 8, tzinfo=UTC).timestamp()
    first, broken, last = read([written(tmp_path / name, "rest of an older file\n" + LOG)], FORMAT, counted)
    assert first == Entry("req-1", began + 0.25, "2026-11-26 08:00:00,250 [req-1] Started GET /a for 10.0.0.7")
    assert broken.text == "2026-11-26 08:00:01,000 [req-2] java.io.IOException: broken\n\tat a.b.C(C.java:7)\n\nCaused by: x"
    assert last.seconds == began + 3.5
    assert counted == Counted(entries=3, lines=8, without_stream=1, headless=1, headless_one="rest of an older file")


def test_a_torn_line_or_one_that_only_looks_like_a_beginning_goes_on_with_the_entry_before(tmp_path: Path) -> None:
    """One such line of millions had ended training, backtest and replay: a disk was full, a machine was switched off, a regex is lax."""
    lax, counted = LogFormat(r"(\S+) \S+ ", stream="(web-[0-9])"), Counted()
    torn = "2026-11-26T08:00:022026-11-26T08:00:09Z web-1 b"
    said = ["6T07:59:59Z web-1 rest", "2026-11-26T08:00:01Z web-1 a", torn, "Traceback (most recent call last):"]
    said += ["2026-11-26T08:00:10Z web-2 c", "2026-11-26T08:00:11Z web-2 d"]
    entries = list(read([written(tmp_path / "a", "\n".join(said))], lax, counted))
    assert [entry.text for entry in entries] == ["\n".join(said[1:4]), *said[4:]]
    assert counted == Counted(entries=3, lines=6, headless=1, headless_one=said[0], torn=3, torn_one="6T07:59:59Z")
    assert counted.left_out.endswith("3 lines begin with what is no time ('6T07:59:59Z'), and go on with the entry before.")


def test_a_file_most_of_whose_times_are_none_is_refused_and_a_long_one_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lax, good = LogFormat(r"(\S+) "), "2026-11-26T08:00:01Z web-1 a\n"
    with pytest.raises(TableError, match="'INFO' is no time of ISO 8601"):
        list(read([written(tmp_path / "a", good + "INFO b\n" * 2)], lax))
    assert len(list(read([written(tmp_path / "a", good + "INFO b\n")], lax))) == 1
    monkeypatch.setattr(log_files, "SPARED", 2)
    counted = Counted()
    with pytest.raises(TableError, match="'INFO' is no time of ISO 8601"):
        list(read([written(tmp_path / "a", "INFO b\n" * 9)], lax, counted))
    assert counted.lines == 3


def test_without_a_format_lines_that_are_indented_go_on_and_a_file_is_a_stream(tmp_path: Path) -> None:
    written(tmp_path / "b.log", "two\r\n")
    written(tmp_path / "a.log", "one\n  more\n\nthree\n")
    counted = Counted()
    entries = list(read([tmp_path], LogFormat(), counted))
    assert [(entry.stream, entry.text) for entry in entries] == [("a.log", "one\n  more"), ("a.log", "three"), ("b.log", "two")]
    assert all(math.isnan(entry.seconds) for entry in entries)
    assert "3 have no time, so pauses are not known: give --time-format, or --timestamp-regex '(\\S+) ' for ISO 8601." in counted.left_out


def test_bytes_that_are_no_utf_8_are_read_as_what_they_are_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"caf\xe9 \xed\xa0\x80\n")
    assert [entry.text for entry in read([tmp_path / "a"], LogFormat())] == ["caf� ���"]


@pytest.mark.parametrize(
    ("format_", "line", "seconds"),
    [
        (LogFormat(r"- (\d+) \S+ "), "- 1117838570 R02 x", 1117838570.0),
        (LogFormat(r"<(?P<level>\d)> (?P<time>\S+) "), "<3> 1970-01-01T00:01:00.5+00:00 x", 60.5),
        (LogFormat(time="%s"), "1117838570.25 x", 1117838570.25),
        (LogFormat(r'\{"time":"(\d+)",', "us"), '{"time":"1794787305110528","MESSAGE":"x"}', 1794787305.110528),
        (LogFormat(time="ms"), "1794787305110 x", 1794787305.11),
        (LogFormat(time="ns"), "1794787305110528123 x", 1794787305.1105282),
        (LogFormat(time="[%d/%b/%Y:%T %z]"), "[01/Jan/1970:01:00:10 +0100] x", 10.0),
        (LogFormat(r"(\S+ \S+) "), "1970-01-01 00:00:01,500 x", 1.5),
        (LogFormat(time="%Y-%m-%dT%H:%M:%S.%fZ"), "1970-01-01T00:00:01.123456789Z x", 1.123456),
    ],
)
def test_times_are_read_as_they_are_written(tmp_path: Path, format_: LogFormat, line: str, seconds: float) -> None:
    [entry] = read([written(tmp_path / "a", line + "\n")], format_)
    assert entry.seconds == seconds


@pytest.mark.parametrize(
    ("format_", "said", "hint"),
    [
        (LogFormat(r"(\d+) ", "%s"), "1794787305110528", "of the form '%s'. It looks like --time-format us."),
        (LogFormat(r"(\d+) "), "1794787305110", "no time of ISO 8601, and no seconds since 1970. It looks like --time-format ms."),
        (LogFormat(time="us"), "1794787305110528123", "of the form 'us'. It looks like --time-format ns."),
    ],
)
def test_a_time_that_counts_in_another_unit_is_refused_with_the_format_to_give(
    tmp_path: Path, format_: LogFormat, said: str, hint: str
) -> None:
    with pytest.raises(TableError) as refused:
        list(read([written(tmp_path / "a", f"{said} x\n")], format_))
    assert str(refused.value).endswith(hint)


def test_a_year_that_is_not_written_is_the_files_and_goes_on_over_its_end(tmp_path: Path) -> None:
    path = written(tmp_path / "a", "Dec 31 23:59:59 web x\nJan  1 00:00:01 web y\n")
    os.utime(path, (1e9, datetime(2023, 6, 1, tzinfo=UTC).timestamp()))
    first, second = read([path], LogFormat(time="%b %e %H:%M:%S"))
    assert first.seconds == datetime(2022, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp(), "nothing was written after the file was"
    assert second.seconds - first.seconds == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"timestamp": "("}, r"'\(' is no expression of RE2: missing \)"),
        ({"stream": "(?=a)"}, "no expression of RE2"),
        ({"time": "%Q"}, "%Q of the time format"),
    ],
)
def test_a_format_that_cannot_be_used_is_refused(arguments: dict[str, str], says: str) -> None:
    with pytest.raises(TableError, match=says):
        LogFormat(**arguments)


@pytest.mark.parametrize(
    ("content", "format_", "says"),
    [
        ("12:00 a\n12:01 b\n", LogFormat(time="%Y-%m-%d"), "None of 2 lines begins as --timestamp-regex or --time-format says"),
        ("a\nb\n", LogFormat(stream="(req-[0-9]+)"), "In none of 2 entries --stream-regex finds a stream"),
        ("\n", LogFormat(), "They are empty"),
    ],
)
def test_files_without_a_single_entry_are_refused_with_the_reason(tmp_path: Path, content: str, format_: LogFormat, says: str) -> None:
    path = written(tmp_path / "a", content)
    with pytest.raises(TableError, match=says):
        list(read([path], format_))
    with pytest.raises(TableError, match=says):
        by_stream([path], format_, None)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["app.log", "app.log.1"])
def test_a_mark_of_the_encoding_belongs_to_no_line_and_gzip_is_known_by_its_bytes(tmp_path: Path, encoding: str, name: str) -> None:
    text = LOG.replace("\n", "\r\n").encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("1") else text)
    counted = Counted()
    first, *_ = read([tmp_path / name], FORMAT, counted)
    assert first.text.startswith("2026-11-26 08:00:00,250 [req-1]")
    assert (counted.entries, counted.headless) == (3, 0)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.log.1").write_bytes(lzma.compress(b"x\n"))
    with pytest.raises(TableError, match=r"a\.log\.1 is packed by xz, which is not read here"):
        list(read([tmp_path / "a.log.1"], LogFormat()))
    with pytest.raises(TableError, match="does not exist"):
        list(read([tmp_path / "absent"], LogFormat()))
    with pytest.raises(TableError, match=r"a\.gz cannot be read"):
        list(read([(tmp_path / "a.gz")] if (tmp_path / "a.gz").write_bytes(b"no gzip") else [], LogFormat()))
    with pytest.raises(TableError, match=r"'x' is no time of ISO 8601, and no seconds since 1970\. Give --time-format\.$"):
        list(read([written(tmp_path / "b", "x y\n")], LogFormat(r"(\S+) ")))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            np.random.default_rng(0).bytes(10_000),
            r"a\.log is no text: of its first 4,096 bytes \d+ are control characters. Leave it out\.$",
        ),
        (LOG.encode("utf-16-le"), r"Is it UTF-16 without its mark\? Turn it into UTF-8 \(iconv\)\.$"),
        (
            b"__CURSOR=s=1\n__REALTIME_TIMESTAMP=1767225601000000\nMESSAGE=hello\n\n",
            "is journald's export, a field a line: give .* or `-o json`",
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_log_of_lines_is_refused_where_it_had_become_a_stream_of_rubbish(
    tmp_path: Path, content: bytes, says: str, packed: bool
) -> None:
    (tmp_path / "a.log").write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(TableError, match=says):
        list(read([tmp_path / "a.log"], LogFormat()))


def test_a_log_that_was_truncated_while_it_was_written_or_has_odd_separators_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"\0" * 9000 + b" left\n" + LOG.encode())
    assert next(entry.text[:19] for entry in read([tmp_path / "a.log"], FORMAT)) == "2026-11-26 08:00:00"
    assert len(list(read([written(tmp_path / "b", "8=FIX.4.2\x0135=D\x0149=A\n" * 200)], LogFormat()))) == 200


def test_a_line_without_end_is_held_no_longer_than_a_message_is(tmp_path: Path) -> None:
    """A file of one line of gigabytes had been read into memory as a whole."""
    with (tmp_path / "a.log").open("wb") as file:
        file.write(b"begins " + b"x" * 1_000_000 + b"\n")
        file.seek(40_000_000)
        file.write(b"\nlast\n")
    tracemalloc.start()
    try:
        first, hole, last = read([tmp_path / "a.log"], LogFormat())
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert (first.text[:8], len(first.text), len(hole.text), last.text) == ("begins x", 65_536, 65_536, "last")


def test_lines_that_begin_with_a_colour_are_told_to_do_so(tmp_path: Path) -> None:
    coloured = written(tmp_path / "a", "\x1b[32m2026-11-26 08:00:00,250\x1b[0m ok\n")
    with pytest.raises(TableError, match=r"such as '\\x1b\[32m2026-11-26 .*It begins with a colour: take colours out first"):
        list(read([coloured], FORMAT))


def test_a_wildcard_that_takes_a_few_words_becomes_a_template_for_each() -> None:
    said = [f"VM {what} (Lifecycle Event) on node {i}" for i in range(10) for what in ("Started", "Stopped", "Paused")]
    mined = mine(said)
    assert mined.templates == [
        "VM Started (Lifecycle Event) on node <NUM>",
        "VM Stopped (Lifecycle Event) on node <NUM>",
        "VM Paused (Lifecycle Event) on node <NUM>",
    ]
    assert Matcher(mined).codes(["VM Resumed (Lifecycle Event) on node 7"])[0].astype(int).tolist() == [NEW]


def test_what_one_word_tells_apart_may_have_further_words_that_tell() -> None:
    said = [line for i in range(10) for line in (f"payment authorised in {i} ms", f"http 201 in {i} ms", f"user {i}x found in {i} ms")]
    mined = mine(said)
    assert "payment authorised in <NUM> ms" in mined.templates
    assert Matcher(mined).codes(["payment declined in 7 ms"])[0].astype(int).tolist() == [NEW]


def test_an_id_that_happens_to_have_no_letter_makes_no_template_of_its_own() -> None:
    ids = range(0x123456F0, 0x1234571A)
    said = [f"INFO {what} in {i % 7} ms [req-{i:x}]" for i in ids for what in ("db select took", "card was charged")]
    assert mine(said).templates == ["INFO db select took in <NUM> ms <*>", "INFO card was charged in <NUM> ms <*>"]


def test_numbers_are_no_ids_because_one_of_them_is_hexadecimal() -> None:
    said = [f"took {i} ms" for i in range(20)] + ["took 0x1f ms"]
    assert mine(said, Mining(similarity=1.0)).templates == ["took <NUM> ms", "took <HEX> ms"]


@pytest.mark.parametrize("odd", ["-", "long"])
def test_a_number_that_is_missing_now_and_then_is_a_number_still(odd: str) -> None:
    said = [f"answered in {odd if i % 10 == 0 else i} ms" for i in range(100)]
    mined = mine(said)
    assert mined.templates == ["answered in <NUM> ms", f"answered in {odd} ms"]
    assert Matcher(mined).codes(["answered in 7 ms"])[1][0, 0] == 7


def test_words_that_are_many_stay_a_wildcard() -> None:
    said = [f"user {chr(97 + i % 26)}{chr(97 + i // 26)} logged in" for i in range(100)]
    assert mine(said).templates == ["user <*> logged in"]


def test_templates_come_most_frequent_first_with_their_counts_and_examples() -> None:
    said = ["a b"] * 2 + ["Took 7 ms"] + ["Took 8 ms"] * 4 + ["x " * (MAX_TOKENS + 1)]
    mined = mine(said, session_seconds=30)
    assert mined.session_seconds == 30
    none, took, ab = patterns(mined, said)
    assert (took.template, took.count, took.example) == ("Took <NUM> ms", 5, "Took 7 ms")
    assert (ab.code, ab.count) == (2, 2)
    assert (none.code, none.count) == (0, 1)  # too long to be a template


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab1 =\n"), max_size=20), min_size=1, max_size=30))
def test_every_mined_line_that_says_something_matches_and_mining_again_gives_the_same(said: list[str]) -> None:
    mining, splitter = Mining(delimiters="="), Splitter("", DEFAULT_MASKS, "=")
    speaking = [bool(splitter.tokens(message)) for message in said]
    if not any(speaking):
        with pytest.raises(TableError, match="no line to mine"):
            mine(said, mining)
        return
    mined = mine(said, mining)
    assert mine(said, mining) == mined
    assert (Matcher(mined).codes(said)[0] >= 1).tolist() == speaking


def test_own_masks_come_first_and_bad_ones_are_refused() -> None:
    mined = mine(["login of user-anna", "login of user-bob7"], Mining(masks=masks_of(["<USER>=user-[a-z0-9]+"])))
    assert mined.templates == ["login of <USER>"]
    with pytest.raises(TableError, match="It is REPLACEMENT=REGEX"):
        masks_of(["user-[a-z]+"])


def test_numbers_that_are_names_stay_as_they_are_and_have_templates_of_their_own() -> None:
    said = [f"EventID: {event}, user {i} at 10.0.0.{i}" for i in range(20) for event in range(4624, 4636)]
    assert mine(said).templates == ["EventID: <NUM>, user <NUM> at <IP>"]
    mined = mine(said, Mining(masks=masks_of([r"=^46\d\d\b"])))
    assert mined.templates == [f"EventID: {event}, user <NUM> at <IP>" for event in range(4624, 4636)]
    codes, numbers = Matcher(mined).codes(["EventID: 4625, user 7 at 10.0.0.7", "EventID: 4699, user 7 at 10.0.0.7"])
    assert codes.astype(int).tolist() == [2, NEW]
    assert numbers[0, :2].tolist() == [7, pytest.approx(math.nan, nan_ok=True)]


def test_grouping_accuracy_counts_lines_of_groups_that_are_exactly_the_truths() -> None:
    assert grouping_accuracy([1, 1, 2, 3, 3], ["a", "a", "b", "c", "d"]) == 0.6


def test_the_preview_brings_no_control_characters_to_the_terminal(tmp_path: Path) -> None:
    path = written(tmp_path / "app.log", "\x1b[2J\x1b[31mdisk\x1b[0m gone \x07\n" * 3)
    shown = CliRunner().invoke(app, ["lines", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "disk gone \ufffd" in shown.output
    assert "\x07" not in shown.output
    assert "[2J" not in shown.output


def test_the_preview_shows_templates_before_anything_is_trained(tmp_path: Path) -> None:
    path = written(tmp_path / "app.log", LOG)
    out = tmp_path / "patterns.json"
    options = ["--time-format", "%Y-%m-%d %H:%M:%S,%f", "--stream-regex", r"\[(req-\d+)\]", "--json", str(out)]
    shown = CliRunner().invoke(app, ["lines", str(path), *options])
    assert shown.exit_code == 0, shown.output
    assert "[req-<NUM>] Completed <NUM> in <NUM> ms" in shown.output
    assert "3 entries of 7 lines in 2 streams" in " ".join(shown.output.split())
    assert "1 that name no stream" in " ".join(shown.output.split())
    assert out.read_text().count('"template"') == 3
    masks = ["--mask", r"<METHOD>=GET", "--mask", r"<TOOK>=in \d+ ms"]
    said = " ".join(CliRunner().invoke(app, ["lines", str(path), *options, *masks]).output.split())
    assert r"No word holds what --mask '<TOOK>=in \d+ ms' masks: it sees each word by itself." in said
    assert "<METHOD>=GET" not in said
    bad = CliRunner().invoke(app, ["lines", str(path), "--stream-regex", "("])
    assert bad.exit_code == 1
