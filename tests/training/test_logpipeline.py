"""Log files become sessions, and sessions a published model with its report."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.artifact import Lines
from service.errors import TableError
from service.log_files import Counted, LogFormat
from tests.training.logs import QUICK, TEMPLATES, TINY, normal, session
from training.__main__ import app
from training.line_faults import FAULTS
from training.lines import Mining, masks_of
from training.logfit import Held, fit
from training.logpipeline import LogJob, keys_of, most_surprising, onsets_held_out, produce, sessions_of
from training.sessions import Sessions
from training.verify import verify_file

FORMAT = LogFormat(time="%Y-%m-%d %H:%M:%S", stream="req-[0-9]+")


def line(second: int, request: int, text: str) -> str:
    return f"2026-01-01 00:{second // 60:02d}:{second % 60:02d} [req-{request}] {text}"


def log(folder: Path) -> Path:
    """Two requests at once; the first comes back after five minutes; a third one is still going on at the end."""
    lines = [
        line(0, 1, "open"),
        line(1, 2, "open"),
        line(2, 1, "took 17 ms"),
        line(3, 2, "took 20 ms"),
        line(3, 1, "close"),
        line(300, 1, "open"),
        line(301, 1, "took 30 ms"),
        line(560, 3, "open"),
    ]
    path = folder / "app.log"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_lines_become_sessions_of_their_streams_that_end_by_silence(tmp_path: Path) -> None:
    data, lines = sessions_of([log(tmp_path)], FORMAT, Mining(), 60.0)
    of_stream = [(one.stream, len(one), one.ended) for one in data.sessions]
    assert of_stream == [("req-1", 3, True), ("req-1", 2, True), ("req-2", 2, True), ("req-3", 1, False)]
    first = data.sessions[0]
    assert np.isnan(first.gaps[0])
    assert first.gaps[1:].tolist() == [2, 1]
    assert 17 in first.numbers[1]
    assert [text.rpartition(" ")[2] for text in first.lines] == ["open", "ms", "close"]
    assert data.sessions[1].first
    assert np.isnan(data.sessions[1].gaps[0])
    assert lines.session_seconds == 60


def test_without_a_silence_streams_never_end(tmp_path: Path) -> None:
    data, _ = sessions_of([log(tmp_path)], FORMAT, Mining(), None)
    assert [(one.stream, len(one), one.ended) for one in data.sessions] == [("req-1", 5, False), ("req-2", 2, False), ("req-3", 1, False)]


def test_lines_of_an_export_of_new_patterns_are_known_although_no_log_has_them(tmp_path: Path) -> None:
    said: list[str] = []
    data, lines = sessions_of(
        [log(tmp_path)], FORMAT, Mining(), 60.0, ["disk is full", "2026-01-01 00:00:09 [req-7] took 19 ms"], notify=said.append
    )
    assert "disk is full" in lines.templates
    assert data.templates == lines.templates
    [sentence] = said  # a release's lines, trained by their export alone, had opened as many alerts as before
    assert sentence.startswith("1 of the patterns that are given come in no line of these files, such as 'disk is full': ")


def test_a_log_of_few_sessions_is_trained_on_wherever_its_ended_ones_lie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for ended in ([True, False], [True, True, True, False]):
        some = [session(normal(rng) * 12, rng, f"s{i}", ends) for i, ends in enumerate(ended)]
        step, held, *_ = fit(Sessions(some, TEMPLATES, "0" * 64), TINY, replace(QUICK, steps=2), 1)
        assert {nats.shape[1] for nats in held.nats} == {len(step.signals)}


def test_the_most_surprising_line_is_found_in_a_stream_longer_than_a_lane() -> None:
    rng = np.random.default_rng(0)
    pieces = [session([1] * 50, rng, "host", ended=False) for _ in range(4)]
    nothing = [np.zeros(50, np.float32)] * 4
    held = Held(pieces, [np.zeros((50, 3), np.float32)] * 4, nothing, nothing, [0] * 4)
    onset_p = np.ones((80, 3))  # 200 lines in lanes of 80
    onset_p[10, 1] = 1e-9  # line 90: of the second piece, which begins in the first lane and ends in the second
    [odd] = most_surprising(held, [(0, 0, 0), (1, 0, 50), (2, 1, 20), (3, 1, 70)], onset_p, Lines(templates=TEMPLATES))
    assert (odd.onset_p, odd.stream) == (1e-9, "host")


def test_each_fold_is_judged_by_a_tail_that_did_not_see_it() -> None:
    rng = np.random.default_rng(0)
    some = [session(normal(rng), rng, f"s{i}") for i in range(60)]
    fitted = fit(Sessions(some, TEMPLATES, "0" * 64), TINY, replace(QUICK, steps=2), 1)
    found = onsets_held_out(fitted)[1e-2]
    assert len(found.smallest) == 60
    assert len(found.onset_p) == sum(map(len, some)) + 60
    held = fitted.held
    odd = [nats.copy() for nats in held.nats]
    for nats, fold in zip(odd, held.fold, strict=True):
        nats[:, 0] += 20.0 * (fold == 0)  # as odd as nothing that the other fold has, and as usual where its own tail knows them
    changed = onsets_held_out(fitted._replace(held=replace(held, nats=odd)))[1e-2]
    assert (changed.smallest[:30] < 1e-2).all()
    single = onsets_held_out(fitted._replace(held=replace(held, fold=[0] * 60)))[1e-2]
    assert len(single.smallest) == len(single.onset_p) == 0


def test_each_rate_is_measured_as_it_would_be_asked_for() -> None:
    """What quiet gives a stream depends on the rate that is asked for: after a thousand lines at 1e-2 a decade, at 1e-4 nearly nothing."""
    rng = np.random.default_rng(0)
    some = [session(normal(rng), rng, "host") for _ in range(60)]
    fitted = fit(Sessions(some, TEMPLATES, "0" * 64), TINY, replace(QUICK, steps=2), 1)
    nats = [np.zeros_like(one) for one in fitted.held.nats]
    nats[29][-1], nats[59][-1] = 20.0, 20.0  # the last line of each fold
    found = onsets_held_out(fitted._replace(held=replace(fitted.held, nats=nats)))
    assert found[1e-2].smallest[59] < 0.9 * found[1e-4].smallest[59]


def test_what_fits_no_stream_is_counted(tmp_path: Path) -> None:
    counted = Counted()
    sessions_of([log(tmp_path)], replace(FORMAT, stream="req-[12]"), Mining(), 60.0, (), counted)
    assert counted.without_stream == 1
    assert "Left out: 1 that name no stream" in counted.left_out


def test_a_mask_that_no_line_needs_is_told_by_a_fit_as_by_the_preview(tmp_path: Path) -> None:
    said: list[str] = []
    masks = masks_of([r"<TOOK>=in \d+ ms", r"<REQ>=req-\d"])
    sessions_of([log(tmp_path)], FORMAT, Mining(masks=masks), 60.0, notify=said.append)
    assert said == [r"No word holds what --mask '<TOOK>=in \d+ ms' masks: it sees each word by itself."]


def test_too_many_lines_are_refused_as_soon_as_they_are_read_and_how_far_a_fit_is_is_told(tmp_path: Path) -> None:
    """All of them were mined first, which takes hours of a large file, and refused in the pass after that."""
    said: list[str] = []
    sessions_of([log(tmp_path)], FORMAT, Mining(), 60.0, doing=said.append)
    assert said == ["Finding templates: 8 lines", "Matching lines: 8"]
    with pytest.raises(TableError, match=r"More than 7 lines, which are kept in memory .* reached in the stream 'req-3'"):
        sessions_of([log(tmp_path)], FORMAT, Mining(), 60.0, doing=said.append, most=7)
    assert len(said) == 2


def test_key_sequences_are_published_with_a_report(tmp_path: Path) -> None:
    """Of a convolutional network; the next test's is the standard one, test_logs has a coupled one of two layers."""
    keys = tmp_path / "keys.txt"
    rng = np.random.default_rng(0)
    keys.write_text("\n".join("a b " + "c " * int(rng.integers(1, 3)) + "d" for _ in range(120)) + "\na b\n")
    data, lines = keys_of([keys], None)
    job = LogJob("keys", "1", data, lines, replace(TINY, cell="convolutional"), QUICK, "python -m training fit", "keys.txt")
    model = produce(job, tmp_path / "out")
    manifest = verify_file(model)
    assert manifest.lines == lines
    assert manifest.cell.variant == "convolutional"
    assert manifest.quality["onsets_on_lines_held_out"]["0.001"]["lines"] == data.lines + 121
    assert set(manifest.quality["injected_faults_found"]) == set(FAULTS)
    assert manifest.quality["published"].endswith("the network's chances of lines")
    assert "network, 0.001" in manifest.quality["injected_faults_found"]["missing"]
    assert "recommended_alpha" not in manifest.quality  # of 121 sessions
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written >= {"keys-1.onnx", "report.md", "report.html", "report.png", "report.json"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "(end of session)" in page  # of the one that stopped too early


def test_sessions_too_few_to_be_validated_and_too_short_for_faults_are_published_with_their_network(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("a b\n")
    data, lines = keys_of([keys], None)
    told = io.StringIO()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keys-1.onnx").touch()
    produce(LogJob("keys", "1", data, lines, TINY, QUICK, "", "keys.txt"), tmp_path / "out", console=Console(file=told, width=500))
    assert "It replaces a file of the same name" in told.getvalue()
    assert f"Next:\n  python -m service serve --model {tmp_path / 'out'}\n" in told.getvalue()
    manifest = verify_file(tmp_path / "out" / "keys-1.onnx")
    assert manifest.quality["onsets_on_lines_held_out"] == {}
    assert manifest.quality["published"].startswith("with the network")
    assert manifest.quality["warning"].startswith("Calibrated on 3 events held out")
    assert (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "Give one of --data"), (["--logs", "x", "--sessions", "y"], "Give one of --data"), (["--sessions", "no-such"], "cannot be read")],
)
def test_what_cannot_be_trained_on_is_refused_with_the_reason(tmp_path: Path, options: list[str], said: str) -> None:
    answer = CliRunner().invoke(app, ["fit", "--out", str(tmp_path), *options])
    assert answer.exit_code == 1
    assert said in answer.output
