"""The log detector: judged by the state before each line, the same in PyTorch, in ONNX Runtime, in a sequence and line by line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from service.artifact import Feature, Lines, Manifest
from service.detector import Detector, StepOutput, session_of
from service.errors import ArtifactError, TableError
from service.events import Event
from service.policy import Policy
from service.rounds import advance
from service.state import ALERT_OPEN
from tests.readings import to_readings
from tests.training.logs import CACHE, CLOSE, END, OPEN, QUICK, READ, TEMPLATES, TINY, WRITE, normal, one_host, session, sessions
from training.autoencoder import Sizes, Variant
from training.counting import BINS, count, counts_of
from training.data import Float32
from training.export import manifest_of, publish, to_onnx, training_record
from training.line_faults import FAULTS
from training.logfit import LINE_WEIGHTS, Fitted, calibration_of, fit, found_of, observe_sessions, ranges_of, rates_of
from training.logs import BEFORE, LEAST_LIKELY, LIKELY, LogStep
from training.rhythm import rhythm_of
from training.sessions import Session, Sessions, read_sessions
from training.verify import Runner, verify_file, verify_same_answers

Answer = dict[str, Float32]
RNG = np.random.default_rng(7)
NORMAL = [OPEN, READ, READ, WRITE, WRITE, CLOSE]


@pytest.fixture(scope="module")
def data() -> Sessions:
    return sessions()


@pytest.fixture(scope="module")
def fitted(data: Sessions) -> Fitted:
    """Of another variant and more layers than what test_logpipeline publishes."""
    return fit(data, replace(TINY, cell="coupled", layers=2), QUICK, numbers=1)


@pytest.fixture(scope="module")
def step(fitted: Fitted) -> LogStep:
    return fitted.step.eval()


def untrained(data: Sessions, sizes: Sizes = TINY, numbers: int = 1) -> LogStep:
    torch.manual_seed(0)
    return LogStep(count(data.sessions, data.codes), ranges_of(data.sessions, data.codes, numbers), sizes, rhythm_of(data.sessions)).eval()


def shaken(step: LogStep) -> LogStep:
    """Its heads begin with zeros, which would hide what is behind them."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in step.lines.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return step


def events_of(one: Session, features: int) -> Float32:
    """[T + 1, F]: lines, then the end."""
    x = np.full((len(one) + one.ended, features), np.nan, np.float32)
    x[: len(one), 0], x[: len(one), 1], x[: len(one), 2:] = one.codes, one.gaps, one.numbers[:, : features - 2]
    x[len(one) :, 0] = END
    return x


@torch.no_grad()
def run(step: LogStep, x: Float32, state: Tensor | None = None, learn: float = 1.0, alpha: float = 1e-3) -> tuple[Answer, Tensor]:
    """Answers [T, ...] to x [T, F] of one stream, and its state."""
    state = torch.zeros(1, step.state_size) if state is None else state
    answers = []
    for row in x:
        out = step(state, torch.from_numpy(row)[None], torch.ones(1, 3), torch.full((1,), learn), torch.full((1,), alpha))
        state, answer = out[0], dict(zip(step.outputs[1:], (part[0].numpy() for part in out[1:]), strict=True))
        answers.append(answer)
    return {name: np.stack([answer[name] for answer in answers]) for name in step.outputs[1:]}, state


def lowest(step: LogStep, codes: list[int]) -> float:
    """Smallest p of an onset in a session of these lines."""
    answers, _ = run(step, events_of(session(codes, np.random.default_rng(0)), step.features))
    return float(answers["onset_p"].min())


def manifest(step: LogStep) -> Manifest:
    record = training_record(command="python -m training", seed=0, data="none", data_sha256="", streams=1, rows=1)
    features = [Feature(name=name) for name in ("template", "gap", "number_1")[: step.features]]
    lines = Lines(templates=TEMPLATES, session_seconds=60.0)
    return manifest_of(step, name="lines", version="1", features=features, training=record, lines=lines)


def test_a_log_detector_is_published_as_an_artifact_and_loads(step: LogStep, tmp_path: Path) -> None:
    told = manifest(step)
    path = publish(step, to_onnx(step), told, tmp_path)
    assert verify_file(path) == told
    assert told.kind == "log"
    assert told.warmup == 0
    detector = Detector.load(path)
    out = detector.step(*(np.zeros(shape, np.float32) for shape in ((5, step.state_size), (5, 3), (5, 3), (5,), (5,))))
    assert out.likely.shape == (5, 2 * LIKELY)
    assert out.before.shape == (5, BEFORE)


def test_what_is_made_of_a_lines_surprise_is_verified_by_one_measure(step: LogStep) -> None:
    """An onset's height is the logarithm of what its chance is made of: a fit was refused for the one, where the other had passed."""
    assert step.magnitude("onset_height") == step.magnitude("onset_p") == step.magnitude("p_value") > 0
    assert step.magnitude("age") == 0


def test_a_stream_that_never_ends_is_not_counted_and_a_new_pattern_in_it_is_found(host: LogStep) -> None:
    assert host.signals == ("line", "new pattern", "run", "overdue", "gap")
    assert "tally" not in {slot.name for slot in host.layout.slots}
    assert lowest(host, [OPEN, READ, READ, 0, WRITE, WRITE, CLOSE]) < 1e-3


def test_many_lines_in_a_row_that_may_each_come_now_and_then_are_found_where_one_is_not() -> None:
    """Hundreds of failed logins, or of a server's 500s, in a minute had opened no alert: each was as rare as one is."""
    rng, codes = np.random.default_rng(5), list[int]()
    while len(codes) < 6000:
        codes += [OPEN, *[READ] * int(rng.integers(2, 4)), *([CACHE] if rng.random() < 0.05 else []), WRITE, WRITE, CLOSE]
    one = fit(Sessions([session(codes, rng, "host", ended=False)], TEMPLATES, "0" * 64), TINY, QUICK).step.eval()
    around, p = [OPEN, READ, READ, WRITE, WRITE, CLOSE] * 5, {}
    for hits in (1, 12):
        said = [*around, OPEN, READ, READ, *[CACHE] * hits, WRITE, WRITE, CLOSE, *around]
        answers, state = run(one, events_of(session(said, np.random.default_rng(0), ended=False), one.features))
        p[hits] = answers["onset_p"].min()
    assert p[12] < 1e-6
    assert p[1] > 1e-3
    last = len(around) + 3 + 11
    assert answers["contribution"][last].argmax() == 0
    assert one.layout.split(state)["run"].item() < 2, "it is forgotten"
    often = np.tile(events_of(session([*around[:6], CACHE, CACHE], np.random.default_rng(0), ended=False), one.features), (120, 1))
    frozen, _ = run(one, often, learn=0.0)
    accepted, state = run(one, often)
    assert (frozen["p_value"][-100:] < 1e-3).mean() > 0.9
    assert (accepted["p_value"][-100:] < 1e-3).mean() < 0.5, "what is accepted becomes usual"
    assert one.layout.split(state)["own_usual"].item() > 0.2


def test_what_is_accepted_is_usual_for_the_stream_and_another_new_line_is_not(host: LogStep, host_graph: bytes, tmp_path: Path) -> None:
    """A release said two new lines, some twenty alerts a day, and as many after the first was accepted."""
    told = manifest(host)
    detector = Detector.load(publish(host, host_graph, told.model_copy(update={"features": told.features[: host.features]}), tmp_path))
    policy, rng = Policy(alpha=1e-4), np.random.default_rng(3)
    said = {OPEN: "open a", READ: "read b", WRITE: "write c in <NUM> ms", CACHE: "cache hit", CLOSE: "close"}
    rows, moment = detector.codec().fresh(1), 0.0

    def hear(*new: str, sessions: int = 1) -> bool:
        """Some normal lines, then new ones; whether an alert is open."""
        nonlocal moment
        messages = [said[code] for _ in range(sessions) for code in normal(rng)] + list(new)
        events = []
        for message in messages:
            moment += 10.0 if message == said[READ] else 1.0
            events.append(Event(stream_id="host", message=message, timestamp=moment))
        readings, errors = to_readings(events, detector.manifest, now=0.0, matcher=detector.matcher)
        assert not errors
        advance(detector, policy, rows, readings, np.zeros(len(events), np.intp))
        return bool(rows["flags"][0] & ALERT_OPEN)

    release, other = "cache warmed for region eu", "Out of memory: killed process 7"
    assert not hear(sessions=150)
    for _ in range(3):  # until it is accepted it is told of each time
        assert hear(release)
        assert not hear(sessions=40)
    assert hear(release)
    assert policy.accept(rows)
    assert not any(hear(release, sessions=40) for _ in range(8))
    assert hear(other, sessions=40)
    assert not hear(release, sessions=80)


def test_a_graph_that_accepts_nothing_or_knows_no_kinds_of_new_patterns_is_refused(host: LogStep, host_graph: bytes) -> None:
    run = Runner(session_of(host_graph))

    def accepts_nothing(state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        return run(state, x, t, np.minimum(learn, 1), alpha)

    def knows_no_kinds(state: Float32, x: Float32, t: Float32, learn: Float32, alpha: Float32) -> StepOutput:
        without = np.concatenate([np.floor(x[:, :1]), x[:, 1:]], axis=1)
        return run(state, without, t, learn, alpha)

    for other in (accepts_nothing, knows_no_kinds):
        with pytest.raises(ArtifactError, match="'own_lines' of step"):
            verify_same_answers(host, other)


@pytest.mark.parametrize("cell", ["standard", "bidirectional", "memoryless"])
@pytest.mark.parametrize("ended", [True, False])
def test_the_nats_of_the_calibration_are_those_of_the_step(data: Sessions, cell: Variant, ended: bool) -> None:
    data = data if ended else one_host()
    step = shaken(untrained(data, Sizes(hidden=8, layers=1, code=3, decoder_hidden=5, cell=cell)))
    some = [*(one.cut(0, 40) for one in data.sessions[:5]), session([OPEN, 0, READ, CACHE, CACHE, OPEN, WRITE], RNG, ended=ended)]
    some.append(session([READ] * 12, RNG, ended=False))
    for one, nats in zip(some, observe_sessions(step, some).nats, strict=True):
        parts = step.layout.split(torch.zeros(1, step.state_size))
        for i, row in enumerate(events_of(one, step.features)):
            line = step.line_of(torch.from_numpy(row)[None])
            with torch.no_grad():
                judged = step.judge(line, parts)
                state = step(step.layout.join(parts, parts, torch.ones(1, 1, dtype=torch.bool)), torch.from_numpy(row)[None], *_rest())[0]
            np.testing.assert_allclose(nats[i], judged.nats[0].numpy(), rtol=1e-4, atol=1e-4)
            parts = step.layout.split(state)


def _rest() -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones(1, 3), torch.ones(1), torch.full((1,), 1e-3)


def test_before_it_has_learned_anything_the_network_gives_the_chances_of_the_2_gram_table(data: Sessions) -> None:
    answers, _ = run(untrained(data), events_of(session(NORMAL, RNG), 3))
    table = np.zeros((END + 1, END + 1))
    for one in data.sessions:
        met = [0, *one.codes.tolist(), END]  # here 0 is the beginning
        np.add.at(table, (met[:-1], met[1:]), 1)
    for i, before in enumerate([0, *NORMAL]):
        seen, total = table[before], table[before].sum()
        once = (seen == 1).sum()
        expected = (1 - (once + 0.5) / (total + 1)) * seen / total
        named = answers["likely"][i, :LIKELY]
        chances = answers["likely"][i, LIKELY:]
        for code, chance in zip(named[np.isfinite(named)].astype(int), chances[np.isfinite(chances)], strict=True):
            if seen[code] > 0:
                assert chance == pytest.approx(expected[code], abs=1e-5)
        assert named[0] == seen.argmax()


def test_likely_lines_are_named_best_first_and_none_that_is_hardly_possible(step: LogStep) -> None:
    answers, _ = run(step, events_of(session(NORMAL, RNG), 3))
    named, chances = answers["likely"][:, :LIKELY], answers["likely"][:, LIKELY:]
    assert named[0, 0] == OPEN
    assert named[-1, 0] == END
    assert (np.isfinite(named) == np.isfinite(chances)).all()
    assert np.nanmin(chances) >= LEAST_LIKELY
    filled = np.nan_to_num(chances)
    assert (np.diff(filled, axis=1) <= 0).all()
    assert (filled.sum(axis=1) <= 1.0001).all()


def test_the_lines_before_are_told_newest_first_and_none_of_another_session(step: LogStep) -> None:
    x = np.concatenate([events_of(session(NORMAL, RNG), 3), events_of(session([OPEN, READ], RNG), 3)])
    before = run(step, x)[0]["before"]
    assert np.isnan(before[0]).all()
    assert before[4].tolist() == [WRITE, READ, READ, OPEN, pytest.approx(np.nan, nan_ok=True)]
    assert before[6, :2].tolist() == [CLOSE, WRITE]
    assert np.isnan(before[7]).all()
    assert before[8, 0] == OPEN


def test_after_its_end_a_session_begins_anew_and_what_is_learned_of_the_stream_stays(step: LogStep) -> None:
    x = events_of(session(NORMAL, RNG), 3)
    first, state = run(step, x)
    parts = step.layout.split(state)
    for slot in step.layout.slots:
        if slot.name in ("age", "counts", "audit"):
            continue
        assert (parts[slot.name] == 0).all(), slot.name
    assert parts["age"].item() == len(x)
    again, _ = run(step, x, state)
    np.testing.assert_array_equal(again["likely"], first["likely"])
    np.testing.assert_allclose(again["p_value"], first["p_value"], rtol=1e-3)


def test_frozen_learning_keeps_the_tail_and_still_follows_the_session(step: LogStep) -> None:
    x = events_of(session(NORMAL, RNG), 3)[:-1]
    answers, state = run(step, x, learn=0.0)
    parts = step.layout.split(state)
    assert parts["age"].item() == 0
    assert (parts["counts"] == 0).all()
    np.testing.assert_array_equal(answers["before"], run(step, x)[0]["before"])


ODD = {
    "a line that never came": [OPEN, READ, 0, READ, WRITE, WRITE, CLOSE],
    "an end too early": [OPEN, READ, READ],
    "a line too few": [OPEN, READ, READ, WRITE, CLOSE],
    "a line too many": [OPEN, READ, READ, WRITE, WRITE, WRITE, CLOSE],
    "lines in another order": [CLOSE, WRITE, WRITE, READ, READ, OPEN],
}


@pytest.mark.parametrize("codes", ODD.values(), ids=ODD.keys())
def test_what_is_odd_in_a_session_is_found_and_what_is_normal_is_not(step: LogStep, codes: list[int]) -> None:
    assert lowest(step, codes) < 1e-3
    for usual in (NORMAL, [OPEN, READ, READ, READ, WRITE, WRITE, CLOSE], [OPEN, READ, READ, CACHE, WRITE, WRITE, CLOSE]):
        assert lowest(step, usual) > 1e-2


def test_a_line_too_many_is_found_when_it_comes_and_not_only_at_the_end(step: LogStep) -> None:
    answers, _ = run(step, events_of(session([OPEN, READ, READ, WRITE, WRITE, WRITE, CLOSE], np.random.default_rng(0)), 3))
    assert answers["onset_p"][5] < 1e-3


def test_one_that_keeps_being_odd_for_the_same_reason_begins_to_be_odd_once(step: LogStep) -> None:
    answers, _ = run(step, events_of(session([OPEN, READ, READ, WRITE, WRITE, WRITE, CLOSE], np.random.default_rng(0)), 3))
    assert (answers["p_value"][5:] < 1e-3).all()
    assert (answers["onset_p"] < 1e-3).sum() == 1


def test_gaps_and_numbers_have_what_was_expected_and_far_off_ones_are_the_reason(step: LogStep) -> None:
    x = events_of(session(NORMAL, np.random.default_rng(0)), 3)
    answers, _ = run(step, x)
    inside = (answers["lower"] <= x) & (x <= answers["upper"])
    assert np.isnan(answers["expected"][:, 0]).all()
    assert np.isnan(answers["expected"][0, 1])
    assert inside[1:-1, 1].mean() > 0.7
    assert answers["expected"][2, 1] == pytest.approx(10, rel=0.6)
    assert answers["expected"][3, 2] == pytest.approx(50, rel=0.2)
    np.testing.assert_allclose(answers["contribution"].sum(axis=1), 1, atol=1e-5)
    late, slow = x.copy(), x.copy()
    late[2, 1] *= 1e4
    slow[3, 2] *= 1e3
    for changed, place, feature in ((late, 2, 1), (slow, 3, 2)):
        odd, _ = run(step, changed)
        assert odd["onset_p"][place] < 1e-3
        assert odd["contribution"][place].argmax() == feature


def test_onsets_in_unseen_sessions_come_about_as_often_as_asked(step: LogStep) -> None:
    events = onsets = 0
    for one in sessions(60, seed=9).sessions:
        answers, _ = run(step, events_of(one, 3), alpha=0.01)
        events, onsets = events + len(answers["onset_p"]), onsets + int((answers["onset_p"] < 0.01).sum())
    assert 0.01 * events / 4 <= onsets <= 3 * 0.01 * events


def test_the_state_is_small_even_with_many_templates_and_four_numbers() -> None:
    rng = np.random.default_rng(0)
    many = Sessions(
        [session([int(c) for c in rng.integers(1, 200, 20)], rng, str(i)) for i in range(50)], [f"t{i}" for i in range(200)], ""
    )
    for cell in ("standard", "peephole", "coupled", "bidirectional"):
        assert 4 * untrained(many, Sizes(32, 1, 12, 32, cell), numbers=4).state_size <= 2048


def test_what_normal_sessions_have_or_do_not_have_weighs_little_and_what_all_have_much(data: Sessions) -> None:
    counting = count(data.sessions, data.codes)
    weight = dict(enumerate(counting.weights))
    assert max(weight[CACHE], weight[READ]) < 1 < min(weight[WRITE], weight[OPEN], weight[CLOSE])


def test_the_distance_of_counts_is_what_the_prototypes_say(data: Sessions) -> None:
    counting = count(data.sessions, data.codes)
    step = untrained(data)
    for codes in (NORMAL, [OPEN, WRITE], [READ] * 7, [0, OPEN]):
        bins = BINS[counts_of(session(codes, RNG), counting.classes, counting.width)][-1]
        for ended in (0.0, 1.0):
            differs = bins != counting.prototypes if ended else bins > counting.prototypes
            least = (differs * counting.weights).sum(axis=1).min()
            got = step.counts.distance(torch.from_numpy(bins)[None].float(), torch.tensor([[ended]]))
            assert got.item() == pytest.approx(least + counting.base * (least > 0), rel=1e-5)


def test_rare_templates_share_a_class_and_every_code_has_a_chance() -> None:
    rng = np.random.default_rng(0)
    many = [session([int(c) for c in rng.zipf(1.3, 30) % 300 + 1], rng) for _ in range(100)]
    counting = count(many, 302)
    assert counting.width == 64
    assert np.exp(counting.transitions[:, counting.classes] + counting.within).sum(axis=1) == pytest.approx(1, abs=1e-6)


def test_files_of_key_sequences_are_read_with_and_without_ids(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("5 22 5\n\nblk_1,22 5 10\n")
    read = read_sessions([tmp_path / "keys.txt"])
    assert read.templates == ["5", "10", "22"]
    assert [one.codes.tolist() for one in read.sessions] == [[1, 3, 1], [3, 1, 2]]
    assert [one.stream for one in read.sessions] == ["keys-1", "blk_1"]


@pytest.mark.parametrize(
    ("content", "said"), [("", "there is no session"), ("a b,c d\n", "line 1: keys are separated by blanks"), (b"\xff", "not UTF-8 text")]
)
def test_a_file_that_holds_no_key_sequences_is_refused_with_the_reason(tmp_path: Path, content: str | bytes, said: str) -> None:
    (tmp_path / "keys.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(TableError, match=said):
        read_sessions([tmp_path / "keys.txt"])


def test_a_silenced_network_leaves_the_chances_to_the_2_gram_table(data: Sessions) -> None:
    step = shaken(untrained(data))
    line = step.line_of(torch.tensor([[float(OPEN), torch.nan, torch.nan]]))
    parts = step.layout.split(torch.zeros(1, step.state_size))
    table = step.counts.log_chances[-1:]
    with torch.no_grad():
        assert not torch.allclose(torch.log(step.judge(line, parts).chances), table, atol=0.1)
        step.lines.silence()
        torch.testing.assert_close(torch.log(step.judge(line, parts).chances), table, rtol=1e-4, atol=1e-4)


def test_a_network_that_finds_no_more_injected_faults_than_the_table_is_silenced_unless_it_is_to_be_kept(data: Sessions) -> None:
    no_steps = replace(QUICK, steps=0)  # its head begins at zero, which is the table
    fitted = fit(data, TINY, no_steps, numbers=1)
    assert not fitted.with_network
    assert fitted.found.shares(1e-2) == fitted.found_without.shares(1e-2)
    assert fit(data, TINY, no_steps, numbers=1, keep_network=True).with_network


def test_a_network_that_is_not_published_is_silent(fitted: Fitted) -> None:
    assert bool(fitted.step.lines.line.weight.any()) == fitted.with_network
    plain = all(np.array_equal(nats[:, 0], own[:, 0]) for nats, own in zip(fitted.held.nats, fitted.held.plain, strict=True))
    assert plain != fitted.with_network


def test_what_is_chosen_finds_the_most_injected_faults_and_an_alpha_is_recommended_at_which_it_does(fitted: Fitted) -> None:
    step, held = fitted.step, fitted.held
    assert set(fitted.found.smallest) == set(FAULTS)
    chosen = (fitted.found if fitted.with_network else fitted.found_without).share
    rates = rates_of(held)
    worth = np.mean([chosen(rate) for rate in rates])
    for weight in LINE_WEIGHTS:
        other = found_of(step, calibration_of(step, held, weight), held)
        assert np.mean([other.share(rate) for rate in rates]) <= worth + 1e-9
    assert fitted.alpha is not None
    assert np.isclose(rates, fitted.alpha, rtol=0.06).any()
    assert chosen(fitted.alpha) > 0.5


def test_of_each_stream_the_same_part_is_left_out_and_its_lines_stay_in_order() -> None:
    """Whole hosts had been left out: the only one of its kind was unheard of, and what a burst is worth drowned in that."""
    one = one_host().sessions[0]
    data = Sessions([one.cut(0, 900), replace(one.cut(1000, 2500), stream="other")], TEMPLATES, "0" * 64)
    held = fit(data, TINY, replace(QUICK, folds=3)).held
    for k in range(3):
        parts = {
            name: sum(len(s) for s, fold in zip(held.sessions, held.fold, strict=True) if s.stream == name and fold == k)
            for name in ("host", "other")
        }
        assert 200 <= parts["host"] <= 400
        assert 400 <= parts["other"] <= 600
    for whole in data.sessions:
        said = np.concatenate([piece.codes for piece in held.sessions if piece.stream == whole.stream])
        np.testing.assert_array_equal(said, whole.codes)


def test_of_few_sessions_and_of_streams_that_never_end_no_alpha_is_recommended_and_no_weight_learned() -> None:
    for data in (one_host(600), sessions(100)):
        fitted = fit(data, TINY, replace(QUICK, steps=1))
        assert fitted.alpha is None
        assert set(fitted.step.calibration.weights or ()) == {1.0}
