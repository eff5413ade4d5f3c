"""Replies that are made as JSON say, to the last byte, what those made as objects say."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from service.bodies import Format, encode
from service.detector import Detector
from service.errors import BadEvent, ItemError
from service.events import Event
from service.metrics import Metrics
from service.policy import Policy
from service.results import TOGETHER, TOP, Answers, Replies
from service.rounds import Kind, advance
from service.scorer import Limits, Scorer
from service.state import ACCEPTED, EXPIRED, FROZEN, LASTING
from service.stores.memory import MemoryStore
from tests.readings import to_readings
from tests.tiny import build_tiny

FEATURES = (("value",), ('50 % "x"', "%b", "c,\u00e9"), tuple(f"f{i:02}" for i in range(TOP + 2)))


@pytest.fixture(scope="module", params=FEATURES, ids=("one", "odd names", "more than are told"))
def detector(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Detector:
    folder = tmp_path_factory.mktemp("ordinary")
    return Detector.load(build_tiny(folder, request.param, name="na-me", version="1.2"))


def events(detector: Detector, count: int, streams: int, *, seed: int = 0) -> list[Event]:
    """The streams in turn; most are ordinary, some jump or miss a value, and all say who and when they are in one way or another."""
    rng = np.random.default_rng(seed)
    names = detector.manifest.feature_names
    made = []
    for i in range(count):
        values: dict[str, float | None] = dict(zip(names, rng.normal(20.0, 1.0, len(names)).tolist(), strict=True))
        if rng.random() < 0.01:
            values[names[-1]] = 90.0
        if rng.random() < 0.01:
            values[names[0]] = None
        stream, seconds = i % streams, 1_767_225_600 + 60 * (i // streams)
        text = np.datetime64(seconds, "s").astype(str) + "Z"
        event_id = f'e"{i},' if stream % 3 == 0 else None
        made.append(Event(f'%s "{stream}"\u2028, \u00fc', values, None, text if stream % 2 else float(seconds), event_id))
    return made


def scored(detector: Detector, sent: Sequence[Event], streams: int) -> Answers:
    rows = detector.codec().fresh(streams)
    readings, errors = to_readings(sent, detector.manifest, now=1.8e9)
    assert not errors
    outcomes = advance(detector, Policy(), rows, readings, np.arange(len(sent)) % streams)
    return Replies(detector.manifest, Policy()).judged(outcomes)


def in_objects(detector: Detector, sent: Sequence[Event], answers: Answers, top: int = TOP) -> list[bytes]:
    results = Replies(detector.manifest, Policy()).results(sent, answers, top_contributors=top)
    return [msgspec.json.encode(result) for result in results]


def in_json(detector: Detector, sent: Sequence[Event], answers: Answers, top: int = TOP) -> list[bytes]:
    return [bytes(raw) for raw in Replies(detector.manifest, Policy()).as_json(sent, answers, top_contributors=top)]


@pytest.mark.parametrize("top", [TOP, 1, 0])
def test_replies_in_json_are_those_of_objects_whatever_became_of_the_events(detector: Detector, top: int) -> None:
    sent = events(detector, 3 * TOGETHER, 7)
    answers = scored(detector, sent, 7)
    answers.batch.outcomes.kinds[5::40] = Kind.DUPLICATE
    answers.batch.outcomes.kinds[6::40] = Kind.LATE
    answers.batch.outcomes.kinds[7::40] = Kind.REPEATED
    assert in_json(detector, sent, answers, top) == in_objects(detector, sent, answers, top)
    ordinary = sum(end is not None for end in answers.batch.ends)
    assert len(sent) / 4 < ordinary < len(sent)


def test_whatever_is_out_of_the_ordinary_is_told(detector: Detector) -> None:
    sent = events(detector, 300, 1, seed=1)
    answers = scored(detector, sent, 1)
    records = answers.batch.outcomes.records
    ordinary = [i for i, end in enumerate(answers.batch.ends) if end is not None]
    for place, flags in zip(ordinary, (FROZEN, ACCEPTED, ACCEPTED | EXPIRED, FROZEN | LASTING), strict=False):
        records["flags"][place] = flags
    records["started_at"][ordinary[10]] = 1e9
    records["version"][ordinary[11]] = 1
    records["p_value"][ordinary[12]] = np.nan
    records["onset_p"][ordinary[13]] = 0.5
    records["x"][ordinary[14]] = -0.0
    records["contribution"][ordinary[15:20]] = 1 / detector.features  # as large as each other: the first come first
    records["alpha"][ordinary[20]] = 0.01
    answers = Replies(detector.manifest, Policy()).judged(answers.batch.outcomes)
    assert in_json(detector, sent, answers) == in_objects(detector, sent, answers)


def test_a_part_of_a_batch_has_its_own_replies(detector: Detector) -> None:
    sent = events(detector, 4 * TOGETHER, 5)
    answers = scored(detector, sent, 5)
    whole = in_objects(detector, sent, answers)
    for start, stop in ((0, 1), (700, 701), (90, 90 + TOGETHER), (3, 3 + 2 * TOGETHER + 1)):
        assert in_json(detector, sent[start:stop], answers.part(start, stop)) == whole[start:stop]


def test_a_batch_of_ordinary_events_alone_and_one_without_any_have_their_replies(detector: Detector) -> None:
    sent = [event for event in events(detector, 300, 1) if event.values and event.values[detector.manifest.feature_names[0]] is not None]
    answers = scored(detector, sent, 1)
    ordinary = [end is not None for end in answers.batch.ends]
    whole = in_objects(detector, sent, answers)
    for wanted in (True, False):
        at = [i for i, is_ordinary in enumerate(ordinary) if is_ordinary is wanted]
        alone = Answers(answers.batch.of(at), 0, len(at), [answers.kinds[i] for i in at], 0, 0, 0.0)
        assert in_json(detector, [sent[i] for i in at], alone) == [whole[i] for i in at]


async def test_the_scorer_answers_in_json_what_it_answers_in_objects(tiny_detector: Detector) -> None:
    plain, quick = (
        Scorer(tiny_detector, Policy(), MemoryStore(state_ttl=3600, result_ttl=600), Metrics(), Limits(), lambda: 1.8e9) for _ in range(2)
    )
    sent: list[Event | ItemError] = list(events(tiny_detector, 600, 4))
    sent[17] = BadEvent("A line that is none.")
    sent[30] = Event(stream_id="s", values={"no feature": 1.0})
    sent += sent[-8:]  # again
    for scorer in (plain, quick):
        scorer.start()
    results, (answers, kinds) = await plain.score(sent), await quick.score_as_json(sent)
    for scorer in (plain, quick):
        await scorer.drain(5)
    assert len(kinds) == len(sent) - 2
    for form in (Format.NDJSON, Format.JSON):
        assert encode(answers, form, bare=False) == encode(results, form, bare=False)


async def test_log_lines_are_answered_in_json_as_in_objects(log_detector: Detector) -> None:
    sent = [Event(stream_id="s", message=f"line {i}", timestamp=1e9 + i) for i in range(50)]
    answers: list[bytes] = []
    for _ in range(2):
        scorer = Scorer(log_detector, Policy(), MemoryStore(state_ttl=3600, result_ttl=600), Metrics(), Limits(), lambda: 1.8e9)
        scorer.start()
        in_json = (await scorer.score_as_json(sent))[0] if answers else await scorer.score(sent)
        answers.append(encode(in_json, Format.NDJSON, bare=False))
        await scorer.drain(5)
    assert answers[0] == answers[1]
