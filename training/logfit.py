"""Trains a log detector: tables by counting, the network by gradient, the tail on sessions that the judging network never saw.

    sessions ─► folds, each judged by a detector of the other folds ─► nats of every line ─► calibration ─┐
             └► a detector of all sessions ───────────────────────────────────────────────────────────────┴─► LogStep

Templates that a fold's detector never saw are new patterns to it: so the rate of new patterns is measured, too. Folds with injected
faults say whether the network's chances of lines find more than the 2-gram table beneath them does (where not, the table judges
alone), what a line's surprise weighs beside the counts, and at which false-alarm rate most is found for it.
Shapes: T events (lines, then the session's end), B lanes, K classes, J signals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from training.autoencoder import Sizes
from training.calibrate import Observed, Rules, calibrate
from training.counting import BINS, count, counts_of, with_end
from training.data import Float32, Float64
from training.line_faults import FAULTS, with_fault
from training.logs import (
    GAP_LIMIT,
    LAGS,
    LEAST_SCALE,
    MARGIN,
    MOST_NATS,
    NEW_NATS,
    OVERDUE,
    RUN,
    Counts,
    Decoded,
    LogStep,
    Ranges,
    flat_calibration,
)
from training.rhythm import Rhythm, overdue_of, rhythm_of
from training.sessions import Session, Sessions
from training.tail import Calibration, Curve, Tail

LOG_SIZES = Sizes(hidden=32, layers=1, code=12, decoder_hidden=32)
ENOUGH_NUMBERS = 20
"""Numbers of a template from which on its next ones are judged."""
MAX_LANE, MAX_CELLS = 4096, 4_000_000
"""Events of a calibration lane, and events in all lanes with what pads them."""
COUNT_FOLDS = 20
ENOUGH_SESSIONS = 3
"""Sessions of a stream from which on streams are told apart, not only sessions."""
CODE_NOISE, CORRUPTED = 0.05, 0.02
FAULTY = 200
"""Sessions of a fold, at most, that each fault is injected into."""
LINE_WEIGHTS = (1.0, 0.5, 0.25)
"""Of the decades by which a line is rarer than the floor, beside those of the counts."""
WEIGHED_FROM = 300
"""Sessions held out from which on weights are learned and a rate is recommended: of fewer, both would rest on one or two odd ones."""
RATES, FEWEST = 12, 2
"""Rates of onsets at which faults are looked for: so many, from one in 100 lines to that of so many onsets in all lines held out."""
FAULTY_SHARE = 0.01
"""Sessions with a fault among all sessions, as they are assumed where a rate is recommended."""


@dataclass(frozen=True)
class LogPlan:
    """How long, how wide, how fast."""

    steps: int = 300
    lines: int = 1500  # in each step
    longest: int = 256  # lines of a session that gradients flow through
    folds: int = 4
    learning_rate: float = 8e-3
    seed: int = 0


SEEN = -1
"""In place of a fold's number: what was judged had been learned from."""
DEFAULT = LogPlan()


@dataclass(frozen=True)
class Batch:
    """Pieces of sessions side by side. What pads them is not `present`."""

    codes: Tensor  # [T, B] int64
    present: Tensor  # [T, B] bool
    rows: Tensor  # [T, B] int64 of the 2-gram table: the class before
    first: Tensor  # [T, B] bool: a session begins with this line
    gap: Tensor  # [T, B] seconds, NaN = none
    numbers: Tensor  # [T, B, 4]
    bins_before: Tensor  # [T, B, K]
    bins_after: Tensor  # [T, B, K]
    judged: Tensor  # [T, B] bool: what came before is known, or nothing did


@dataclass(frozen=True)
class Held:
    """Sessions as a detector judged them that was not trained on them."""

    sessions: list[Session]
    nats: list[Float32]  # [T, J] each
    gap_ratio: list[Float32]  # [T] each, NaN = none
    plain: list[Float32]  # [T, 1] each: nats of the line by the 2-gram table alone; [T, 2] with those of the run, where there is one
    fold: list[int]  # of each; judged by a detector of the others, or SEEN: there were none to learn from without it
    faulty: dict[str, Held] = field(default_factory=dict)
    """The same sessions, or some of them, with a fault of each kind."""

    @property
    def streams(self) -> int:
        return len({session.stream for session in self.sessions})

    @property
    def ended(self) -> int:
        """Sessions that have ended."""
        return sum(session.ended for session in self.sessions)

    def part(self, which: Sequence[int]) -> Held:
        columns = ([column[i] for i in which] for column in (self.sessions, self.nats, self.gap_ratio, self.plain, self.fold))
        return Held(*columns)  # type: ignore[arg-type]

    def folds(self) -> list[tuple[Held, Held]]:
        """Each fold, and all others. None where there is but one."""
        numbers = sorted(set(self.fold) - {SEEN}) if len(set(self.fold)) > 1 else []
        split = [([i for i, own in enumerate(self.fold) if own == k], [i for i, own in enumerate(self.fold) if own != k]) for k in numbers]
        return [(self.part(own), self.part(others)) for own, others in split]

    def without_network(self) -> Held:
        """As the 2-gram table would have judged the lines."""
        nats = [of_session.copy() for of_session in self.nats]
        for own, plain in zip(nats, self.plain, strict=True):
            own[:, [0, RUN][: plain.shape[1]]] = plain
        return replace(self, nats=nats, faulty={kind: held.without_network() for kind, held in self.faulty.items()})


@dataclass(frozen=True)
class Found:
    """What a calibrated tail makes of sessions with injected faults: fault → the smallest p of the onsets of each session [N]."""

    smallest: dict[str, Float64]

    def shares(self, asked: float) -> dict[str, float]:
        """Of the sessions with each fault those in which an anomaly begins, at this rate."""
        return {kind: float((smallest < asked).mean()) for kind, smallest in self.smallest.items()}

    def share(self, asked: float) -> float:
        """The mean over all kinds of faults."""
        return float(np.mean(list(self.shares(asked).values()))) if self.smallest else 0.0


@dataclass(frozen=True)
class Choice:
    """How lines are judged, and what is found so."""

    held: Held
    calibration: Calibration
    found: Found
    worth: float
    """Mean share of the faults found, over all rates."""


class Fitted(NamedTuple):
    """A calibrated detector, and what it was calibrated on."""

    step: LogStep
    held: Held
    found: Found
    """Of injected faults, by the network over the 2-gram table."""
    found_without: Found
    """By the table alone."""
    with_network: bool
    """Else it was silenced, since it finds no more, and `held` is as the table judged."""
    alpha: float | None
    """Onsets a line to be asked for: the F1 of finding the faults is best, were FAULTY_SHARE of the sessions faulty. None = too few."""


OnStep = Callable[[float], None]


def _silent(loss: float) -> None:
    """Nobody watches the loss."""


def fit(
    data: Sessions,
    sizes: Sizes = LOG_SIZES,
    plan: LogPlan = DEFAULT,
    numbers: int = 0,
    on_step: OnStep = _silent,
    keep_network: bool = False,
) -> Fitted:
    """A calibrated detector of `numbers` numbers a line. `keep_network`: also where it finds no more.

    It is kept, too, where no fault can be injected: nothing speaks against it. `on_step` is called with the loss of each of
    (folds + 1) · steps steps.
    """
    pieces = _pieces(data.sessions)
    held = hold_out(pieces, data, sizes, plan, numbers, on_step)
    step = _trained(pieces, data.codes, sizes, plan, numbers, on_step)
    network, table = choice_of(step, held), choice_of(step, held.without_network())
    chosen = network if network.worth > table.worth or keep_network or not held.faulty else table
    if chosen is table:
        step.lines.silence()
    step.calibrate(chosen.calibration)
    return Fitted(step, chosen.held, network.found, table.found, chosen is network, recommended(chosen))


def choice_of(step: LogStep, held: Held) -> Choice:
    """Of sessions that are counted: what weight of the lines, beside the counts, finds most of the injected faults at all rates."""
    weighed = step.counts.counted and held.ended >= WEIGHED_FROM
    choices = [_choice(step, held, weight) for weight in (LINE_WEIGHTS if weighed else LINE_WEIGHTS[:1])]
    return max(choices, key=lambda choice: choice.worth)


def _choice(step: LogStep, held: Held, weight: float) -> Choice:
    calibration = calibration_of(step, held, weight)
    found = found_of(step, calibration, held)
    return Choice(held, calibration, found, float(np.mean([found.share(rate) for rate in rates_of(held)])))


def rates_of(held: Held) -> Float64:
    """[RATES] of onsets, that the lines held out can tell apart."""
    lines = sum(map(len, held.nats))
    return np.geomspace(1e-2, min(1e-2, FEWEST / max(lines, 1)), RATES)


def found_of(step: LogStep, calibration: Calibration, held: Held) -> Found:
    """What of the injected faults is found."""
    tail, smallest = step.tail_of(calibration), {}
    for kind, faulty in held.faulty.items():
        observed, places = side_by_side(faulty, len(step.signals))
        smallest[kind] = smallest_of(onset_p_of(tail, observed), faulty, places)
    return Found(smallest)


def recommended(choice: Choice) -> float | None:
    """See `Fitted.alpha`."""
    if choice.held.ended < WEIGHED_FROM or not choice.found.smallest:
        return None
    rates = rates_of(choice.held)
    lengths = [len(nats) for nats, session in zip(choice.held.nats, choice.held.sessions, strict=True) if session.ended]
    false = rates * np.mean(lengths) / FAULTY_SHARE  # alarms for each faulty session
    found = np.array([choice.found.share(rate) for rate in rates])
    return float(f"{rates[np.argmax(2 * found / (found + 1 + false))]:.2g}")  # as it is told: more digits say nothing


@torch.no_grad()
def onset_p_of(tail: Tail, observed: Observed, rate: float = 1e-3) -> Float64:
    """What a calibrated tail that is asked for this rate makes of it: p of each onset [T, B], 1 where none begins."""
    T, B, _ = observed.strengths.shape
    parts = {slot.name: torch.zeros(slot.size, B) for slot in tail.slots}
    answers, asked = np.ones((T, B)), torch.full((B,), rate)
    for i in range(T):
        valid = torch.from_numpy(observed.valid[i])[None]
        answer, after = tail(torch.from_numpy(observed.strengths[i]).t(), valid, torch.from_numpy(observed.age[i])[None], asked, parts)
        if observed.ended is not None:
            going_on = 1.0 - torch.from_numpy(observed.ended[i])[None].float()
            after |= {name: after[name] * going_on for name in ("onset_height", "onset_hold")}
        parts = {name: torch.where(valid, part, parts[name]) for name, part in after.items()}
        answers[i] = np.nan_to_num(answer.onset_p.numpy(), nan=1.0)
    return answers


def by_session(onset_p: Float64, held: Held, places: Sequence[Place]) -> Iterator[tuple[int, Float64]]:
    """Of each session its number and its lines' p."""
    behind = onset_p.T.ravel()  # a stream longer than a lane goes on in the next one
    for i, lane, start in places:
        yield i, behind[lane * len(onset_p) + start :][: len(held.nats[i])]


def smallest_of(onset_p: Float64, held: Held, places: Sequence[Place]) -> Float64:
    """[N] the smallest p of each session."""
    smallest = np.ones(len(held.sessions))
    for i, p in by_session(onset_p, held, places):
        smallest[i] = p.min(initial=1.0)
    return smallest


def _pieces(sessions: Sequence[Session]) -> list[Session]:
    """Few streams that never end are cut, so that there is something to leave out.

    In order of when they come in their streams: of each stream the same part is left out. Without the lines of a whole host, which may be
    the only one of its kind, what is ordinary there is unheard of, and nothing would be as rare as it has to be for an alert.
    """
    longest = max(64, sum(map(len, sessions)) // 40)
    of_stream: dict[str, list[Session]] = {}
    for session in sessions:
        starts = range(0, len(session), longest) if not session.ended else (0,)
        pieces = [session.cut(start, start + longest if not session.ended else len(session)) for start in starts]
        of_stream.setdefault(session.stream, []).extend(pieces)
    placed = [(i / len(pieces), piece) for pieces in of_stream.values() for i, piece in enumerate(pieces)]
    return [piece for _, piece in sorted(placed, key=lambda one: one[0])]


def hold_out(pieces: list[Session], data: Sessions, sizes: Sizes, plan: LogPlan, numbers: int, on_step: OnStep) -> Held:
    """Blocks of sessions, of each stream consecutive ones, each judged by a detector of the others; and some of them with faults."""
    folds = np.array_split(np.arange(len(pieces)), min(plan.folds, len(pieces)))
    rng = np.random.default_rng([plan.seed, len(pieces)])
    judged, faulty = list[Held](), {kind: list[Held]() for kind in FAULTS}
    rhythms = list[Rhythm]()
    for number, fold in enumerate(folds):
        others = _others(pieces, fold)
        own = SEEN if others is pieces else number
        known = np.zeros(data.codes, bool)
        known[np.concatenate([piece.codes for piece in others])] = True
        step = _trained(others, data.codes, sizes, replace(plan, seed=plan.seed + 1 + number), numbers, on_step)
        judged.append(observe_sessions(step, [pieces[i].knowing(known) for i in fold], own))
        rhythms.append(step.clocks.rhythm)
        some = rng.choice(fold, min(FAULTY, len(fold)), replace=False)
        for kind, of_kind in faulty.items():
            changed = [with_fault(kind, rng, replace(pieces[i], stream=str(i)), len(data.templates)) for i in some]
            of_kind.append(observe_sessions(step, [session.knowing(known) for session in changed if session], own))
    held = _together(judged)
    whole = _counted_again(held, data.codes) if "counts" in step.signals else _overdue_again(held, rhythms)
    return replace(whole, faulty={kind: every for kind, parts in faulty.items() if (every := _together(parts)).sessions})


def _together(parts: Sequence[Held]) -> Held:
    names = ("sessions", "nats", "gap_ratio", "plain", "fold")
    return Held(*([one for part in parts for one in getattr(part, name)] for name in names))  # type: ignore[arg-type]


def _others(pieces: list[Session], fold: NDArray[np.int64]) -> list[Session]:
    """Those outside of the fold; all, where that leaves none, or no whole session though there are some."""
    others = [piece for i, piece in enumerate(pieces) if not fold[0] <= i <= fold[-1]]
    whole = [any(piece.first and piece.ended for piece in some) for some in (others, pieces)]
    return others if others and whole[0] == whole[1] else pieces


@torch.no_grad()
def _counted_again(held: Held, codes: int) -> Held:
    """The counts' nats by COUNT_FOLDS folds instead of few: counting is cheap, and new combinations are rarer the more were seen."""
    nats = list(held.nats)
    for fold in np.array_split(np.arange(len(held.sessions)), min(COUNT_FOLDS, len(held.sessions))):
        others = _others(held.sessions, fold)
        counting = count(others, codes)
        counts = Counts(counting)
        for i in fold:
            session = held.sessions[i]
            bins = BINS[counts_of(session, counting.classes, counting.width)]
            after = torch.from_numpy(np.concatenate([bins[1:], bins[-1:]] if session.ended else [bins[1:]])).float()
            ended = torch.zeros(len(after), 1)
            ended[-1] = float(session.ended)
            nats[i] = nats[i].copy()
            nats[i][:, 2] = counts.distance(after, ended).squeeze(1).numpy()
    return replace(held, nats=nats)


def _trained(sessions: Sequence[Session], codes: int, sizes: Sizes, plan: LogPlan, numbers: int, on_step: OnStep) -> LogStep:
    torch.manual_seed(plan.seed)
    step = LogStep(count(sessions, codes), ranges_of(sessions, codes, numbers), sizes, rhythm_of(sessions))
    _begin_gaps(step, sessions)
    train(step, sessions, plan, on_step)
    return step.eval()


def ranges_of(sessions: Sequence[Session], codes: int, numbers: int) -> Ranges:
    """Medians of each template's numbers, and scales such that three of them hold 95 of 100."""
    gaps = np.concatenate([session.gaps for session in sessions]).astype(np.float64)
    gaps = gaps[np.isfinite(gaps)]
    unit = float(np.quantile(gaps[gaps > 0], 0.1)) if (gaps > 0).any() else 1.0
    spread = max(float(np.log1p(np.maximum(gaps, 0) / unit).std()), 0.1) if len(gaps) else 1.0
    all_codes = np.concatenate([session.codes for session in sessions])
    values = np.arcsinh(np.concatenate([session.numbers for session in sessions])[:, :numbers].astype(np.float64))
    location, scale = np.zeros((codes, numbers)), np.full((codes, numbers), np.inf)
    order = np.argsort(all_codes, kind="stable")
    for code, rows in zip(*_groups(all_codes[order], order), strict=True):
        for n in range(numbers):
            of_code = values[rows, n][np.isfinite(values[rows, n])]
            if len(of_code) >= ENOUGH_NUMBERS:
                location[code, n] = np.median(of_code)
                scale[code, n] = max(float(np.quantile(np.abs(of_code - location[code, n]), 0.95)) / 3, LEAST_SCALE)
    return Ranges(unit, spread, torch.from_numpy(location).float(), torch.from_numpy(scale).float())


def _groups(ordered: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[list[int], list[NDArray[np.int64]]]:
    codes, starts = np.unique(ordered, return_index=True)
    return codes.tolist(), np.split(rows, starts[1:])[: len(codes)]


@torch.no_grad()
def _begin_gaps(step: LogStep, sessions: Sequence[Session]) -> None:
    """The gap's head begins at each template's median."""
    codes, gaps = np.concatenate([session.codes for session in sessions]), np.concatenate([session.gaps for session in sessions])
    measured = np.log1p(np.maximum(gaps, 0) / step.ranges.gap_unit)
    codes, measured = codes[np.isfinite(measured)], measured[np.isfinite(measured)]
    order = np.argsort(codes, kind="stable")
    for code, rows in zip(*_groups(codes[order], order), strict=True):
        middle = float(np.median(measured[rows]))
        off = float(np.abs(measured[rows] - middle).mean())
        step.lines.gap_of.weight[code] = torch.tensor([middle, math.log(max(off, 0.05))])


def batch_of(step: LogStep, pieces: Sequence[tuple[Session, int, int]]) -> Batch:
    """Events start to stop of each session; its end, where it has one, is the event behind its lines."""
    classes, K = step.counts.classes.numpy(), step.counts.width
    T, B = max(stop - start for _, start, stop in pieces), len(pieces)
    codes, rows = np.zeros((T, B), np.int64), np.full((T, B), K)
    present, first, judged = (np.zeros((T, B), bool) for _ in range(3))
    gap, numbers = np.full((T, B), np.nan, np.float32), np.full((T, B, 4), np.nan, np.float32)
    before, after = (np.zeros((T, B, K), np.float32) for _ in range(2))
    for b, (session, start, stop) in enumerate(pieces):
        events, n = with_end(session, step.codes)[start:stop], stop - start
        codes[:n, b], present[:n, b], judged[:n, b] = events, True, True
        rows[1:n, b] = classes[events[:-1]]
        first[0, b] = session.first and start == 0
        if start > 0:
            rows[0, b] = classes[session.codes[start - 1]]
        judged[0, b] = first[0, b]
        lines = min(n, len(session) - start)
        gap[:lines, b], numbers[:lines, b] = session.gaps[start:stop], session.numbers[start:stop]
        if step.counts.counted:
            bins = BINS[counts_of(session.cut(0, stop), classes, K)][start:]
            before[:n, b] = bins[:n]
            after[:n, b] = np.concatenate([bins[1:], bins[-1:]])[:n]
    gap[0, first[0]] = np.nan
    parts = (codes, present, rows, first, gap, numbers, before, after, judged)
    return Batch(*(torch.from_numpy(part) for part in parts))


def _length(session: Session) -> int:
    return len(session) + session.ended


def train(step: LogStep, sessions: Sequence[Session], plan: LogPlan, on_step: OnStep = _silent) -> None:
    """Adam, one cycle, on pieces of about the same length. Inputs are corrupted, targets are clean."""
    network, rng = step.lines, np.random.default_rng(plan.seed)
    noise = torch.Generator().manual_seed(plan.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.learning_rate, weight_decay=1e-3)
    pieces = [(s, i, min(i + plan.longest, _length(s))) for s in sessions for i in range(0, _length(s), plan.longest)]
    pieces.sort(key=lambda piece: piece[2] - piece[1])
    for number in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(plan, number)
        batch = batch_of(step, _drawn(pieces, plan, rng))
        loss = _loss(step, batch, rng, noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        on_step(float(loss.detach()))


def _drawn(pieces: list[tuple[Session, int, int]], plan: LogPlan, rng: np.random.Generator) -> list[tuple[Session, int, int]]:
    """About plan.lines lines in pieces that are neighbours by length, around a random one."""
    middle = int(rng.integers(len(pieces)))
    lanes = max(1, min(plan.lines // max(1, pieces[middle][2] - pieces[middle][1]), 128, len(pieces)))
    start = max(0, min(middle - lanes // 2, len(pieces) - lanes))
    return pieces[start : start + lanes]


def _learning_rate(plan: LogPlan, number: int) -> float:
    rise = min(1.0, (number + 1) / max(1.0, 0.1 * plan.steps))
    return plan.learning_rate * max(1e-3, rise * 0.5 * (1 + math.cos(math.pi * number / plan.steps)))


def _answers(step: LogStep, batch: Batch, codes: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Decoded]:
    """The decoder's answers before each event [T, B, H], and after it. `codes` are what the network is given."""
    gap = torch.log1p(batch.gap.clamp(0.0, 1e12) / step.ranges.gap_unit) / step.ranges.gap_spread
    inputs = step.lines.read(codes, gap, batch.first)
    decoded = step.lines.sequence(inputs, step.lines.fresh(codes.shape[1]), noise)
    return torch.cat([torch.zeros_like(decoded.answers[:1]), decoded.answers[:-1]]), decoded


def _loss(step: LogStep, batch: Batch, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
    """Cross-entropy of the next line + 0.1 of the last ones again + 0.3 × Laplace likelihood of the gap."""
    T, B = batch.codes.shape
    wrong = torch.from_numpy(rng.random((T, B)) < CORRUPTED)
    codes = torch.where(wrong, torch.from_numpy(rng.integers(0, step.codes - 1, (T, B))), batch.codes)
    code_noise = CODE_NOISE * torch.randn(T, B, step.sizes.code, generator=noise)
    before, decoded = _answers(step, batch, codes, code_noise)
    logits = step.counts.log_chances[batch.rows] + step.lines.logits(before, batch.bins_before if step.counts.counted else None)
    loss = _mean(functional.cross_entropy(logits.flatten(0, 1), batch.codes.flatten(), reduction="none").view(T, B), batch.judged)
    again = step.lines.again(decoded.answers)
    for j, lag in enumerate(LAGS):
        if lag < T:
            error = functional.cross_entropy(again[lag:, :, j].flatten(0, 1), batch.codes[: T - lag].flatten(), reduction="none")
            loss = loss + 0.1 / len(LAGS) * _mean(error.view(T - lag, B), batch.present[lag:])
    location, scale, measured, known = _gaps(step, batch, before)
    return loss + 0.3 * _mean((measured - location).abs() / scale + torch.log(scale), known)


def _gaps(step: LogStep, batch: Batch, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Location, scale and measure of the gaps, and which are known, [T, B] each."""
    location, scale = (part.squeeze(-1) for part in step.lines.gaps(before, batch.codes))
    measured = torch.log1p(batch.gap.clamp(0.0, 1e12) / step.ranges.gap_unit)
    known = torch.isfinite(measured) & batch.judged
    return location.clamp(0.0, GAP_LIMIT), scale, torch.where(known, measured, 0.0), known


def _mean(error: Tensor, counted: Tensor) -> Tensor:
    return (error * counted).sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def observe_sessions(step: LogStep, sessions: Sequence[Session], fold: int = 0) -> Held:
    """Each session's events as the graph computes them."""
    nothing = np.zeros(0, np.float32)
    nats, ratios, plain = ([nothing] * len(sessions) for _ in range(3))
    order = sorted(range(len(sessions)), key=lambda i: len(sessions[i]))
    at = 0
    while at < len(order):
        lanes = max(1, min(len(order) - at, 4096 // (_length(sessions[order[min(at + 64, len(order) - 1)]]) + 1)))
        chosen = order[at : at + lanes]
        observed = _observed(step, batch_of(step, [(sessions[i], 0, _length(sessions[i])) for i in chosen]))
        for b, i in enumerate(chosen):
            nats[i], ratios[i], plain[i] = (part[: _length(sessions[i]), b] for part in observed)
        at += lanes
    return Held(list(sessions), nats, ratios, plain, [fold] * len(sessions))


def _observed(step: LogStep, batch: Batch) -> tuple[Float32, Float32, Float32]:
    """Nats [T, B, J], the gap's ratio [T, B], and by the 2-gram table alone [T, B, 1 or 2], as `Held.plain`."""
    before, _ = _answers(step, batch, batch.codes)
    table = step.counts.log_chances[batch.rows]
    logits = table + step.lines.logits(before, batch.bins_before if step.counts.counted else None)
    judged = batch.judged.float()
    surprise, plain = (step.counts.surprise(_chances(one, batch.codes), batch.codes) * judged for one in (logits, table))
    signals = [surprise, (batch.codes == 0).float() * NEW_NATS]
    if step.counts.counted:
        ended = (batch.codes == step.codes - 1).float()
        signals.append(torch.cat([step.counts.distance(b, e.unsqueeze(1)).t() for b, e in zip(batch.bins_after, ended, strict=True)]))
        by_table = [plain]
    else:
        signals += [_runs(step, surprise), _overdue(step.clocks.rhythm, batch)]
        by_table = [plain, _runs(step, plain)]
    location, scale, measured, known = _gaps(step, batch, before)
    ratio = (measured - location).abs() / scale
    signals.append(torch.where(known, ratio, 0.0))
    if step.ranges.numbers:
        signals.append(_numbers(step, batch))
    return (torch.stack(signals, dim=-1).numpy(), torch.where(known, ratio, torch.nan).numpy(), torch.stack(by_table, dim=-1).numpy())


def _runs(step: LogStep, nats: Tensor) -> Tensor:
    """The run after each line [T, B] of these nats [T, B]."""
    run, own, runs = torch.zeros_like(nats[0]), torch.zeros_like(nats[0]), []
    for age, of_lines in enumerate(nats):
        runs.append(run := step.counts.run(run, of_lines, own))
        own = step.counts.own(own, of_lines, torch.tensor(float(age)))
    return torch.stack(runs)


def _overdue(rhythm: Rhythm, batch: Batch) -> Tensor:
    """Nats of what is overdue [T, B], from fresh streams."""
    lanes = zip(batch.codes.t().numpy(), batch.gap.t().numpy(), strict=True)
    return torch.from_numpy(np.stack([overdue_of(rhythm, *lane) for lane in lanes], axis=1)).float()


def _overdue_again(held: Held, rhythms: Sequence[Rhythm]) -> Held:
    """The nats of what is overdue by what came in the stream before the piece, too; of each fold by the rhythm of the others."""
    nats, streams = [one.copy() for one in held.nats], dict[str, list[int]]()
    for i in sorted(range(len(held.sessions)), key=lambda i: held.sessions[i].start):
        streams.setdefault(held.sessions[i].stream, []).append(i)
    for which in streams.values():
        codes, gaps = (np.concatenate([getattr(held.sessions[i], name) for i in which]) for name in ("codes", "gaps"))
        overdue = [overdue_of(rhythm, codes, gaps) for rhythm in rhythms]
        stops = np.cumsum([len(held.sessions[i]) for i in which]).tolist()
        for i, start, stop in zip(which, [0, *stops], stops, strict=False):
            nats[i][: stop - start, OVERDUE] = overdue[max(held.fold[i], 0)][start:stop]
    return replace(held, nats=nats)


def _chances(logits: Tensor, codes: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)


def _numbers(step: LogStep, batch: Batch) -> Tensor:
    location, scale = step.number_location[batch.codes], step.number_scale[batch.codes]
    numbers = batch.numbers[..., : step.ranges.numbers]
    judged = torch.isfinite(numbers) & torch.isfinite(scale)
    return torch.where(judged, (torch.asinh(numbers) - location).abs() / torch.where(judged, scale, 1.0), 0.0).amax(dim=-1)


def calibration_of(step: LogStep, held: Held, line_weight: float) -> Calibration:
    """The tail's constants, from sessions held out."""
    observed, _ = side_by_side(held, len(step.signals))
    events = int(observed.valid.sum())
    weights = (line_weight, *[1.0] * (len(step.signals) - 1))
    floor = float(np.clip(np.log10(events) - 1.5, 0.5, 3.2))
    draft = replace(flat_calibration(len(step.signals)), floor=floor, band=_gap_band(held), weights=weights)
    alike = len(held.sessions) < ENOUGH_SESSIONS * held.streams and step.counts.counted
    rules = Rules(ageing=False, settled=0.0, alike=alike, draft=draft, finest=5, steepest=1 / math.log(10), steepest_sum=1.0)
    return calibrate(observed, 0, held.streams, rules)


Place = tuple[int, int, int]
"""Which session, in which lane, from which of its events on."""


def side_by_side(held: Held, signals: int) -> tuple[Observed, list[Place]]:
    """A lane for each stream, its sessions one after the other; what is too long is cut into several. And where each session is."""
    streams: dict[str, list[int]] = {}
    for i, session in enumerate(held.sessions):
        streams.setdefault(session.stream, []).append(i)
    longest = int(max(64, min(MAX_LANE, MAX_CELLS // len(streams))))
    lanes: list[tuple[Float32, NDArray[np.bool_]]] = []
    places: list[Place] = []
    for which in streams.values():
        starts = np.cumsum([0, *(len(held.nats[i]) for i in which)])
        places += [(i, len(lanes) + int(start) // longest, int(start) % longest) for i, start in zip(which, starts[:-1], strict=True)]
        nats, ends = np.concatenate([held.nats[i] for i in which]), np.zeros(starts[-1], bool)
        ends[starts[1:][[held.sessions[i].ended for i in which]] - 1] = True
        lanes += [(nats[i : i + longest], ends[i : i + longest]) for i in range(0, len(nats), longest)]
    T, B = max(len(nats) for nats, _ in lanes), len(lanes)
    strengths, valid, ended = np.zeros((T, B, signals), np.float32), np.zeros((T, B), bool), np.zeros((T, B), bool)
    for b, (nats, ends) in enumerate(lanes):
        strengths[: len(nats), b] = np.exp(np.clip(nats, 0.0, MOST_NATS)) - 1.0
        valid[: len(nats), b], ended[: len(nats), b] = True, ends
    age = (np.cumsum(valid, axis=0) - valid).astype(np.float32)
    return Observed(strengths, np.zeros((T, B, 1), np.float32), valid, age, ended, MARGIN), places


def _gap_band(held: Held) -> Curve:
    """Decades of |gap - expected| ÷ scale, in measures."""
    ratio: Float64 = np.concatenate(held.gap_ratio).astype(np.float64)
    ratio = ratio[np.isfinite(ratio)]
    decades = np.array([0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    decades = decades[decades <= np.log10(max(len(ratio), 1) / 10)] if len(ratio) else decades[:0]
    if len(decades) < 2:
        return Curve((1.0, 3.0), (0.5, 2.0), 0.5)
    ratios = np.maximum.accumulate(np.quantile(ratio, 1 - 10.0**-decades))
    slope = float((decades[-1] - decades[-2]) / max(ratios[-1] - ratios[-2], 1e-3))
    return Curve(tuple(map(float, ratios)), tuple(map(float, decades)), min(slope, 0.43))
