"""The log detector as one pure step: lines as codes, judged by the state BEFORE them. Every operation is row-wise.

    code, gap, numbers ─┬► chance of the line ◄── decoder's last answer, 2-gram table, counts of the session ─► likely
                        ├► gap ◄── its location and scale, of this code after that past                          ─► expected, lower, upper
                        ├► numbers ◄── tables of each template
                        └► counts ◄── combinations that normal sessions have
                             or run: many lines in a row that are rather rare; overdue: a periodic line that does not come
                             (streams that never end; see training.rhythm)
                                 └─► nats of each signal ─► tail ─► p_value, onset_p
    embedding, gap ─► encoder LSTM ─► code = tanh(W·h) ─► decoder LSTM ─► the next line, and the last ones again

Where streams never end, the rare lines that led to an accepted alert have a chance of their own in that stream from then on.
A signal is in nats, the negative logarithm of a chance; what nats are worth is for the tail to say, from sessions held out.
After the end of a session all of this is as at its beginning, but what is learned of the stream's tail stays.
Shapes: T lines, B streams, V templates, C = V + 2 codes, K classes, M prototypes, N numbers, I inputs, H hidden, J signals.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from service.artifact import NEW, NEW_KINDS
from training.autoencoder import Sizes, decoder_of, encoder_of, parts_of, prefixed
from training.counting import BINS, MOST, Counting
from training.detector import OUTPUTS, ArtifactStep
from training.layout import Keeps, Layout, Parts, Slot, row_sum
from training.rhythm import Clocks, Rhythm
from training.sessions import Ints
from training.tail import HOLD, Calibration, Curve, Onsets, Tail

EMBEDDED, COUNTED = 12, 32
"""Numbers that a line's code becomes, and that the counts of its session become."""
LAGS = (0, 1, 2, 3)
"""Lines back that the decoder gives again."""
LEVELS = (1, 2, 3, 4, 6, 9)
"""Bins of a count that the network is told it has reached."""
LIKELY, BEFORE = 3, 5
LEAST_LIKELY = 1e-3
"""Smallest chance of a line that is named as likely."""
MOST_NATS = 40.0
RUN, OVERDUE = 2, 3
"""Which signals the run, in place of the counts, and what is overdue are, where streams never end."""
ENDLESS = ("run", "overdue")
CERTAIN = 1e12
"""Events that the pooled scale of evidence weighs: evidence is in nats for every stream."""
MARGIN = 0.01
"""Nats, and decades, by which an onset exceeds the last: templates come again with the same nats."""
RUN_DRIFT, RUN_STEP, RUN_MOST = 0.5, 2.0, 20.0
"""Of a run, in spreads of nats: what a line has to exceed the usual by, the most that one adds, and the most there is: a single line is
none, and a long run is forgotten within some twenty ordinary lines."""
OWN_FIRST, OWN_LAST = 200.0, 1000.0
"""Lines that a stream's own usual nats are the mean of: at first, of the pooled ones, and at most. So what is accepted becomes usual."""
ACCEPTS = 1.5
"""What `learn` exceeds while an alert of the stream has just been accepted."""
OWN_LINES, ACCEPTED = 5000.0, 100.0
"""Lines that a stream's shares of accepted lines are of; and as how many of them a line counts at least once it is accepted."""
HEARD, RECENT = 0.9, 0.3
"""What is noted of a rare line that is not accepted, and what is left of it after some hundred others: accepted is what was heard since."""
NEW_NATS = 0.1
"""Evidence of a new pattern: all are the same, and how rare they are is for the tail to say."""
GAP_LIMIT = 25.0
LEAST_LOG_SCALE, LEAST_SCALE = -2.5, 0.05
"""Narrowest scales of gaps (as logarithm) and of numbers, in measures: 8 and 5 of 100. Narrower ones would magnify float32's rounding."""


@dataclass(frozen=True)
class Ranges:
    """Where the gaps and the numbers of normal lines lie. Both as tensors of float32."""

    gap_unit: float  # seconds; a gap is u = log1p(gap ÷ unit)
    gap_spread: float  # of u, for the network's input
    location: Tensor  # [C, N] of asinh(number)
    scale: Tensor  # [C, N]; infinite where a template has too few

    @property
    def numbers(self) -> int:
        return self.location.shape[1]


@dataclass(frozen=True)
class Decoded:
    """Of T lines."""

    answers: Tensor  # [T, B, H] the decoder's, after each line
    state: Parts  # after the last


class LineNetwork(nn.Module):
    """The autoencoder and its heads. What it knows of a session is `answers` of the last line and the counts so far."""

    def __init__(self, counting: Counting, sizes: Sizes) -> None:
        super().__init__()
        codes = len(counting.classes)
        self.sizes, self.inputs, self.hidden = sizes, EMBEDDED + 3, sizes.decoder_hidden
        self.counted = len(counting.prototypes) > 0
        self.embedding = nn.Embedding(codes, EMBEDDED)
        self.encoder = encoder_of(self.inputs, sizes)
        self.bottleneck = nn.Linear(self.encoder.output_size, sizes.code)
        self.decoder = decoder_of(sizes)
        self.counter = nn.Linear(counting.width * len(LEVELS), COUNTED) if self.counted else None
        self.line = nn.Linear(self.hidden + COUNTED * self.counted, codes)
        self.lags = nn.Linear(self.hidden, len(LAGS) * EMBEDDED)
        self.gap = nn.Linear(self.hidden, 2)
        self.gap_of = nn.Embedding(codes, 2)
        for head in (self.line.weight, self.line.bias, self.gap_of.weight):
            nn.init.zeros_(head)  # at first the next line is what the 2-gram table says
        self.register_buffer("levels", torch.tensor(LEVELS, dtype=torch.float32), persistent=False)

    levels: Tensor

    @property
    def slots(self) -> tuple[Slot, ...]:
        networks = (("encoder", self.encoder), ("decoder", self.decoder))
        parts = [Slot(f"{prefix}_{name}", size, Keeps.ROWS) for prefix, network in networks for name, size in network.sizes.items()]
        return (*parts, Slot("answer", self.hidden, Keeps.ROWS))

    def fresh(self, rows: int) -> Parts:
        parameter = next(self.parameters())
        return {slot.name: parameter.new_zeros(rows, slot.size) for slot in self.slots}

    def read(self, codes: Tensor, gap: Tensor, first: Tensor) -> Tensor:
        """What the network sees of lines: codes [..], gap [..] in spreads (NaN = none), whether first [..] → [.., I]."""
        known = torch.isfinite(gap)
        numbers = torch.stack([torch.where(known, gap, 0.0), known.to(gap.dtype), first.to(gap.dtype)], dim=-1)
        return torch.cat([self.embedding(codes), numbers], dim=-1)

    def step(self, inputs: Tensor, parts: Parts) -> tuple[Tensor, Parts]:
        """One line [B, I] → answer [B, H], and the state's parts after it."""
        hidden, encoder = self.encoder.step(inputs, parts_of("encoder", parts))
        answer, decoder = self.decoder.step(torch.tanh(self.bottleneck(hidden)), parts_of("decoder", parts))
        return answer, prefixed(encoder, decoder) | {"answer": answer}

    def sequence(self, inputs: Tensor, parts: Parts, code_noise: Tensor | None = None) -> Decoded:
        """T lines [T, B, I]; `code_noise` [T, B, code] is added to the code (training only)."""
        hidden, encoder = self.encoder.sequence(inputs, parts_of("encoder", parts))
        code = torch.tanh(self.bottleneck(hidden))
        if code_noise is not None:
            code = code + code_noise
        answers, decoder = self.decoder.sequence(code, parts_of("decoder", parts))
        return Decoded(answers, prefixed(encoder, decoder) | {"answer": answers[-1]})

    def logits(self, answer: Tensor, bins: Tensor | None) -> Tensor:
        """Of the next line's code [.., C], added to the 2-gram table's; from bins of counts [.., K], where lines are counted."""
        if self.counter is None or bins is None:
            return self.line(answer)  # type: ignore[no-any-return]
        reached = (bins.unsqueeze(-1) >= self.levels).to(answer.dtype).flatten(-2)
        return self.line(torch.cat([answer, torch.tanh(self.counter(reached))], dim=-1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def silence(self) -> None:
        """Leave the chances of lines to the 2-gram table."""
        self.line.weight.zero_()
        self.line.bias.zero_()

    def gaps(self, answer: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale [.., 1] of u, the gap's measure, of a line of these codes [..] after that past."""
        location, log_scale = torch.split(self.gap(answer) + self.gap_of(codes), 1, dim=-1)
        return location, torch.exp(log_scale.clamp(LEAST_LOG_SCALE, 3.0))

    def again(self, answers: Tensor) -> Tensor:
        """Logits [.., lags, C] of the lines LAGS back, the newest first."""
        embedded: Tensor = self.lags(answers).unflatten(-1, (len(LAGS), EMBEDDED))
        return embedded @ self.embedding.weight.t()


class Counts(nn.Module):
    """The tables of `training.counting`, and how far a session's counts are from normal ones."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self.width, self.counted = counting.width, len(counting.prototypes) > 0
        for name, table in (("classes", counting.classes), ("bins", BINS)):
            self.register_buffer(name, torch.from_numpy(table), persistent=False)
        log_chances = counting.transitions[:, counting.classes] + counting.within
        self._keep("log_chances", torch.from_numpy(log_chances))  # [K + 1, C]
        pairs, place = np.unique(_with_class(counting.prototypes), axis=0, return_inverse=True)
        weights = np.zeros((len(pairs), len(counting.prototypes)))
        weights[place.reshape(-1), np.repeat(np.arange(len(counting.prototypes)), self.width)] = np.tile(
            counting.weights, len(counting.prototypes)
        )
        self._keep("within", torch.from_numpy(counting.within))
        self.register_buffer("own_class", torch.from_numpy(pairs[:, 0]), persistent=False)
        self._keep("own_bin", torch.from_numpy(pairs[:, 1]))
        self._keep("weights", torch.from_numpy(weights))
        self._keep("worth", torch.from_numpy(counting.worth))
        self.base, self.usual, self.spread = counting.base, counting.usual, counting.spread

    def _keep(self, name: str, table: Tensor) -> None:
        self.register_buffer(name, table.float(), persistent=False)

    classes: Tensor
    bins: Tensor
    within: Tensor  # [C] log-chances of codes in their classes
    log_chances: Tensor
    own_class: Tensor  # [P] of each bin that a prototype has in a class
    own_bin: Tensor  # [P]
    weights: Tensor  # [P, M] nats, where the prototype has that bin
    worth: Tensor

    def surprise(self, chances: Tensor, codes: Tensor) -> Tensor:
        """Nats of lines of these codes [..] whose chances these are [..]."""
        return -torch.log(chances.clamp(min=1e-17)) * self.worth[self.classes[codes]]

    def binned(self, counts: Tensor) -> Tensor:
        """Bins of counts [B, K]."""
        return self.bins[counts.clamp(0, MOST).to(torch.int64)].to(torch.float32)

    def distance(self, bins: Tensor, ended: Tensor) -> Tensor:
        """Nats [B, 1] of bins [B, K]; `ended` [B, 1] is 1 at the end of the session, else 0."""
        difference = torch.index_select(bins, 1, self.own_class) - self.own_bin  # [B, P], each compared once, not once a prototype
        above, below = ((difference > 0).to(bins.dtype), (difference < 0).to(bins.dtype) * ended)
        least = ((above + below) @ self.weights).amin(dim=1, keepdim=True)
        return (least + self.base) * (least > 0).to(bins.dtype)

    def run(self, before: Tensor, nats: Tensor, own: Tensor) -> Tensor:
        """A run [..] after a line of these nats [..]: a cumulative sum (Page, 1954) of what exceeds the stream's usual, which is `own` off.

        What is more than the pooled usual counts twice: it comes of rare lines, and so varies more, too.
        """
        exceeding = (nats - self.usual - own - own.clamp(min=0.0)) / self.spread - RUN_DRIFT
        return (before + exceeding.clamp(max=RUN_STEP)).clamp(0.0, RUN_MOST)

    def own(self, before: Tensor, nats: Tensor, age: Tensor) -> Tensor:
        """Nats [..] by which the stream's usual is off the pooled one, after a line of these nats, the `age`-th that is learned."""
        off = (nats - self.usual).clamp(max=RUN_STEP * self.spread)
        return before + (off - before) / (OWN_FIRST + age).clamp(max=OWN_LAST)

    def rare(self, nats: Tensor) -> Tensor:
        """Whether lines [..] are as rare as a run makes of one at most."""
        return nats > self.usual + RUN_STEP * self.spread

    def place(self, codes: Tensor, kinds: Tensor) -> Tensor:
        """[B] where in `own` lines of these codes are noted: new patterns by their kinds [B], others by their class."""
        return torch.where(codes == NEW, kinds, self.classes[codes] + (NEW_KINDS - 1))

    def accepted(self, own: Tensor, place: Tensor, codes: Tensor) -> Tensor:
        """The chance [B, 1] of a line of these codes wherever it comes, in a stream in which it was accepted; else 0."""
        of_place = own.gather(1, place.unsqueeze(1))
        return torch.where(of_place < 1, 0.0, of_place / OWN_LINES) * torch.exp(self.within[codes].unsqueeze(1))

    def own_after(self, own: Tensor, place: Tensor, rare: Tensor, accepts: Tensor) -> Tensor:
        """What a stream has noted of its lines [B, W] after one more, there; rare, accepts [B, 1] bool.

        From 1 on a line is accepted: so many of the last OWN_LINES, and never fewer than at first: what someone has accepted may come once
        a month. Below, how recently it was heard.
        """
        here = (place.unsqueeze(1) == torch.arange(own.shape[1])).to(own.dtype)
        faded, kept = own * (1 - 1 / HOLD), (own * (1 - 1 / OWN_LINES)).clamp(min=ACCEPTED)
        noted = torch.where(own < 1, torch.maximum(faded, HEARD * here * rare.to(own.dtype)), kept + here)
        return torch.where(accepts & (noted > RECENT), noted.clamp(min=ACCEPTED), noted)


def _with_class(prototypes: Ints) -> Ints:
    """Bins [M, K] → pairs of class and bin [M·K, 2]."""
    M, K = prototypes.shape
    return np.stack([np.tile(np.arange(K), M), prototypes.reshape(-1)], axis=1)


@dataclass(frozen=True)
class Line:
    """One event of each of B streams, as the graph reads it."""

    present: Tensor  # [B, 1] bool
    code: Tensor  # [B] int64
    kind: Tensor  # [B] int64 of a new pattern, else 0
    gap: Tensor  # [B, 1] seconds, NaN = none
    numbers: Tensor  # [B, N] NaN = none
    ended: Tensor  # [B, 1] 1 where it is the end of a session


@dataclass(frozen=True)
class Judged:
    """One line by what was known before it."""

    nats: Tensor  # [B, J] of the signals
    chances: Tensor  # [B, C] of every code
    expected: Tensor  # [B, F] NaN where nothing is
    ratio: Tensor  # [B, F] |actual - expected| ÷ scale, in measures
    location: Tensor  # [B, F - 1] in measures
    scale: Tensor  # [B, F - 1]
    due: Tensor | None = None  # [B, P] nats of each clock, where streams never end
    clocks: Parts = field(default_factory=dict)  # as the line found them


def flat_calibration(signals: int) -> Calibration:
    """Constants before calibration: a nat is worth a nat."""
    line = Curve((0.0, 23.0), (0.0, 10.0), 0.43)
    onsets = Onsets(line, tau=0.0, shape=10.0, weight=10.0)
    ones = (1.0,) * signals
    return Calibration(ones, ones, (onsets,) * signals, line, onsets, line, floor=0.0, prior_events=CERTAIN, margin=MARGIN)


class LogStep(ArtifactStep):
    """One line of each of B streams. `forward` has the signature of the artifact's step function, with the two outputs of logs."""

    outputs = (*OUTPUTS, "likely", "before")
    warmup = 0

    def __init__(self, counting: Counting, ranges: Ranges, sizes: Sizes, rhythm: Rhythm) -> None:
        super().__init__()
        self.codes, self.sizes, self.ranges = len(counting.classes), sizes, ranges
        self.features = 2 + ranges.numbers
        self.lines = LineNetwork(counting, sizes)
        self.counts = Counts(counting)
        self.clocks = Clocks(rhythm)
        numbers = ("numbers",) * (ranges.numbers > 0)
        self.signals = ("line", "new pattern", *(("counts",) if self.counts.counted else ENDLESS), "gap", *numbers)
        self.register_buffer("number_location", ranges.location, persistent=False)
        self.register_buffer("number_scale", ranges.scale, persistent=False)
        self.register_buffer("tie", (1e-6 * torch.arange(self.codes, dtype=torch.float32)).clamp(max=LEAST_LIKELY / 2), persistent=False)
        due = torch.arange(self.codes) == self.clocks.codes.t()
        self.register_buffer("due", due.float(), persistent=False)  # [P, C]
        self.calibrate(flat_calibration(len(self.signals)))

    due: Tensor
    number_location: Tensor
    number_scale: Tensor
    tie: Tensor

    def calibrate(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.tail = self.tail_of(calibration)
        own = [Slot("before", BEFORE, Keeps.ROWS), Slot("place", 1, Keeps.ROWS)]
        counted = [Slot("tally", self.counts.width, Keeps.ROWS)]
        learned = [Slot("own_usual", 1, Keeps.STREAM), Slot("own_lines", NEW_KINDS - 1 + self.counts.width, Keeps.STREAM)]
        endless = [Slot("run", 1, Keeps.ROWS), *learned, *self.clocks.slots]
        own += counted if self.counts.counted else endless
        self.layout = Layout([*self.lines.slots, *own, Slot("age", 1, Keeps.STREAM), *self.tail.slots])

    def tail_of(self, calibration: Calibration) -> Tail:
        return Tail(len(self.signals), 0, calibration)

    @property
    def network(self) -> LineNetwork:
        return self.lines

    @property
    def signal_names(self) -> tuple[str, ...]:
        return self.signals

    def magnitude(self, slot: str) -> float:
        """Chances, shares and heights are of distances from what was expected, in scales: small differences of measures up to GAP_LIMIT."""
        return 10.0 if slot in ("p_value", "onset_p", "contribution", "onset_height") else 0.0

    def forward(self, state: Tensor, x: Tensor, t: Tensor, learn: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
        """The step function: see the service's contract for shapes and meaning of inputs and outputs. The gap is in x, `t` is not used."""
        parts = self.layout.split(state)
        line = self.line_of(x)
        judged = self.judge(line, parts)
        strengths = (torch.exp(judged.nats.clamp(0.0, MOST_NATS)) - 1.0) * line.present.to(x.dtype)
        present = line.present.t()
        answer, tail_after = self.tail(strengths.t(), present, parts["age"], alpha, parts)
        going_on = 1.0 - line.ended
        for emitted in ("onset_height", "onset_hold"):
            tail_after[emitted] = tail_after[emitted] * going_on.t()
        read = self._read(line, judged, parts, learn)
        after = {name: torch.where(line.present, part * going_on, parts[name]) for name, part in read.items()}
        after |= {**tail_after, "age": parts["age"] + 1}
        if not self.counts.counted:
            after["own_usual"] = self.counts.own(parts["own_usual"], judged.nats[:, :1].t(), parts["age"])
            place, accepts = self.counts.place(line.code, line.kind), learn.unsqueeze(1) > ACCEPTS
            after["own_lines"] = self.counts.own_after(parts["own_lines"].t(), place, self.counts.rare(judged.nats[:, :1]), accepts).t()
        state_out = self.layout.join(parts, after, present & (learn > 0.5).unsqueeze(0))
        lower, upper = self._band(judged, answer.factor.t())
        before = torch.where(parts["before"] > 0, parts["before"] - 1, torch.nan)
        p_value, onset_p = answer.p_value, answer.onset_p
        return state_out, p_value, onset_p, judged.expected, lower, upper, self._shares(judged, line), self._likely(judged), before

    def line_of(self, x: Tensor) -> Line:
        """Of x [B, F]. What is no code is a new pattern."""
        present = torch.isfinite(x[:, :1])
        told = torch.where(present, x[:, :1], 0.0).clamp(0.0, self.codes - 1.0)
        code = told.round()
        kind = torch.where(code == NEW, told * (2 * NEW_KINDS), 0.0).round().clamp(max=NEW_KINDS - 1.0)
        ended = (code == self.codes - 1).to(x.dtype) * present.to(x.dtype)
        codes, kinds = (part.squeeze(1).to(torch.int64) for part in (code, kind))
        return Line(present, codes, kinds, x[:, 1:2], x[:, 2:], ended)

    def judge(self, line: Line, parts: Parts) -> Judged:
        """Everything before the tail."""
        first = parts["place"] < 0.5
        last = torch.where(first, torch.zeros_like(parts["place"]), parts["before"][:, :1] - 1).squeeze(1).to(torch.int64)
        row = torch.where(first.squeeze(1), self.counts.width, self.counts.classes[last])
        bins = self.counts.binned(parts["tally"]) if self.counts.counted else None
        logits = self.counts.log_chances[row] + self.lines.logits(parts["answer"], bins)
        chances = torch.exp(logits - logits.amax(dim=1, keepdim=True))
        chances = chances / row_sum(chances)
        code = line.code.unsqueeze(1)
        chance, new = chances.gather(1, code), (code == NEW).to(chances.dtype)
        if not self.counts.counted:
            accepted = self.counts.accepted(parts["own_lines"].t(), self.counts.place(line.code, line.kind), line.code)
            chance, new = (chance + accepted).clamp(max=1.0), new * (accepted == 0).to(new.dtype)
        nats = [self.counts.surprise(chance, code), new * NEW_NATS]
        if self.counts.counted:
            nats.append(self.counts.distance(self.counts.binned(self._counted(line, parts)), line.ended))
            return self._ranged(line, parts, nats, chances)
        due, clocks = self.clocks.overdue(line.gap, parts)
        nats += [self.counts.run(parts["run"], nats[0], parts["own_usual"].t()), due.amax(dim=1, keepdim=True)]
        return replace(self._ranged(line, parts, nats, chances), due=due, clocks=clocks)

    def _counted(self, line: Line, parts: Parts) -> Tensor:
        """Lines of each class [B, K] with this one; the end is no line."""
        classes = self.counts.classes[line.code].unsqueeze(1)
        one = (classes == torch.arange(self.counts.width)).to(torch.float32) * (1.0 - line.ended)
        return (parts["tally"] + one).clamp(max=float(MOST))

    def _ranged(self, line: Line, parts: Parts, nats: list[Tensor], chances: Tensor) -> Judged:
        """Gap and numbers by their locations and scales."""
        location, scale = self.lines.gaps(parts["answer"], line.code)
        measured = torch.log1p(line.gap.clamp(0.0, 1e12) / self.ranges.gap_unit)
        judged = torch.isfinite(line.gap) & (line.ended < 0.5) & (parts["place"] > 0.5)
        location = location.clamp(0.0, GAP_LIMIT)
        ratio, known = [torch.where(judged, (measured - location).abs() / scale, 0.0)], [judged]
        locations, scales = [location], [scale]
        nats.append(ratio[0])
        if self.ranges.numbers:
            of_template, spread = self.number_location[line.code], self.number_scale[line.code]
            numbers = torch.isfinite(line.numbers) & torch.isfinite(spread)
            spread = torch.where(numbers, spread, 1.0)
            off = torch.where(numbers, (torch.asinh(line.numbers.clamp(-1e30, 1e30)) - of_template).abs() / spread, 0.0)
            nats.append(off.amax(dim=1, keepdim=True))
            ratio, known = [*ratio, off], [*known, numbers]
            locations, scales = [*locations, of_template], [*scales, spread]
        raw = self._raw(torch.cat(locations, dim=1))
        nothing = torch.full_like(chances[:, :1], torch.nan)
        expected = torch.cat([nothing, torch.where(torch.cat(known, dim=1), raw, torch.nan)], dim=1)
        ratios = torch.cat([torch.zeros_like(nothing), *ratio], dim=1)
        return Judged(torch.cat(nats, dim=1), chances, expected, ratios, torch.cat(locations, dim=1), torch.cat(scales, dim=1))

    def _raw(self, measures: Tensor) -> Tensor:
        """Measures [B, F - 1] as seconds and numbers."""
        gap = (torch.exp(measures[:, :1].clamp(0.0, GAP_LIMIT)) - 1.0) * self.ranges.gap_unit
        return torch.cat([gap, torch.sinh(measures[:, 1:].clamp(-60.0, 60.0))], dim=1)

    def _band(self, judged: Judged, factor: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F] each, NaN where nothing is expected."""
        margin = factor * judged.scale
        known = torch.isfinite(judged.expected)
        ends = []
        for measures in (judged.location - margin, judged.location + margin):
            raw = torch.cat([judged.expected[:, :1], self._raw(measures)], dim=1)
            ends.append(torch.where(known, raw, torch.nan))
        return ends[0], ends[1]

    def _shares(self, judged: Judged, line: Line) -> Tensor:
        """Attribution [B, F]: each feature's nats as shares of 1; the template has those of all signals before the gap's."""
        own = judged.nats[:, : self.signals.index("gap")]
        template = own @ torch.ones(own.shape[1], 1) + 1e-6
        weights = torch.cat([template, judged.ratio[:, 1:].clamp(max=MOST_NATS)], dim=1) * line.present.to(own.dtype)
        return weights / row_sum(weights).clamp(min=1e-12)

    def _likely(self, judged: Judged) -> Tensor:
        """Codes [B, LIKELY] of the likeliest lines, then their chances; of equal ones the smaller code. NaN below LEAST_LIKELY."""
        every = judged.chances if judged.due is None else self._with_overdue(judged.chances, judged.due)
        _, codes = torch.topk(every - self.tie, LIKELY, dim=1)
        chances = every.gather(1, codes)
        told = chances >= LEAST_LIKELY
        return torch.cat([torch.where(told, codes.to(chances.dtype), torch.nan), torch.where(told, chances, torch.nan)], dim=1)

    def _with_overdue(self, chances: Tensor, nats: Tensor) -> Tensor:
        """Chances [B, C] if what is overdue, by nats [B, P], comes as surely as it should have come."""
        due = 1 - torch.exp(-nats)
        surest = due.amax(dim=1, keepdim=True)
        shares = due / row_sum(due).clamp(min=1e-6) * surest
        return chances * (1 - surest) + shares @ self.due

    def _read(self, line: Line, judged: Judged, parts: Parts, learn: Tensor) -> Parts:
        """The session's parts after this line, not yet those of the next session."""
        first = parts["place"] < 0.5
        gap = torch.log1p(line.gap.clamp(0.0, 1e12) / self.ranges.gap_unit) / self.ranges.gap_spread
        gap = torch.where(first, torch.nan, gap)
        inputs = self.lines.read(line.code, gap.squeeze(1), first.squeeze(1))
        _, after = self.lines.step(inputs, parts)
        after |= {
            "before": torch.cat([line.code.to(torch.float32).unsqueeze(1) + 1, parts["before"][:, :-1]], dim=1),
            "place": (parts["place"] + 1).clamp(max=1e6),
        }
        if self.counts.counted:
            after["tally"] = self._counted(line, parts)
        if judged.due is not None:
            after["run"] = judged.nats[:, RUN : RUN + 1]
            after |= self.clocks.after(judged.clocks, judged.due, line.code, learn.unsqueeze(1) > 0.5)
        return after
