"""How well odd sessions of log lines are found: trained on normal sessions alone, the threshold fixed by the asked false-alarm rate.

    python -m bench.logs [--sets hdfs,openstack,bgl,thunderbird | hosts] [--seeds 3] [--steps 300] [--part 1]
                         [--data ../shared/data] [--json FILE]

A session is reported when one of its events, its end included, begins an anomaly. The asked rate of a set is one false alarm in 1,000
sessions, then in 2,000, or in as many as it was trained on where these are fewer, and of ours the one that training recommends; ours is
given it divided by the mean length of a training session. No label and no test session takes part. HDFS's real test set has 553,366
normal and 16,838 abnormal sessions: its F1 is re-weighted to these. Intervals are of 95 %, by bootstrap over the test sessions.
`--part n` takes every n-th abnormal session. BGL and Thunderbird are samples of raw lines, through the published model: raw_logs.py;
`hosts` are made logs of streams that never end, with incidents: host_logs.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.table import Table
from torch import nn
from torch.nn import functional

from bench.host_logs import HOSTS_SET, HostRow, QuietRow, host_rows, host_tables
from bench.raw_logs import RAW_SETS, RawRow, raw_rows, raw_table
from bench.report import Goal, JsonFile, Machine, report, table
from service.artifact import NEW
from service.detector import session_of
from training.data import Float64
from training.export import to_onnx
from training.logfit import LOG_SIZES, LogPlan, fit
from training.logs import LogStep
from training.sessions import Session, Sessions, keyed, read_sessions
from training.verify import Runner

GOAL, FLOOR = 98.8, 95.1
RATES = (1e-3, 5e-4)
"""False alarms of a session that are asked for; the first one is what the goals are about."""
REAL = {"hdfs": (553_366, 16_838)}
"""Normal and abnormal sessions of the real test set, where the files hold a part of it."""
TRAIN = {"hdfs": "train_normal.txt"}
WINDOW, TOP = 10, 9
"""DeepLog's: the lines before, and how many of the likeliest next ones are normal (Du et al., CCS 2017)."""
ROWS = 1024
NEVER = 1 << 30

Found = NDArray[np.int64]
"""Of each session the event at which it is reported, NEVER if it is not; its end is the event behind its lines."""
Method = Callable[["Case", int], tuple[Found, Found]]


@dataclass(frozen=True)
class Case:
    """A set: codes of keys that training has are 1 to V, all others are NEW."""

    name: str
    train: Sessions
    normal: list[Session]
    abnormal: list[Session]
    steps: int
    rate: float = 1e-3
    fitted: dict[tuple[str, int], tuple[LogStep, Runner, float]] = field(default_factory=dict)
    """By cell and seed: the same whatever is asked. And the false alarms of a session that its training recommends, 0 = none."""

    @property
    def asked(self) -> float:
        """False alarms of a session."""
        return max(self.rate, 1 / len(self.train.sessions))

    @property
    def alpha(self) -> float:
        """False alarms of an event."""
        return self.asked / (self.train.lines / len(self.train.sessions) + 1)


@dataclass(frozen=True)
class Row:
    """One method on one set. Shares are 0 to 1."""

    set: str
    asked: float
    method: str
    seed: int
    tpr: float
    fpr: float
    f1: float
    f1_low: float
    f1_high: float
    events: float | None
    """Into an abnormal session when it is reported: median."""
    events_p90: float | None
    before_end: float
    """Share of the reported abnormal sessions that are reported before they end."""
    recommended: bool = False
    """The rate is the one that training recommends."""


def load(name: str, data: Path, steps: int, part: int) -> Case:
    """Raises TableError where `data` lacks the set."""
    folder = data / name
    train = read_sessions([folder / TRAIN.get(name, "train.txt")])
    codes = {key: code for code, key in enumerate(train.templates, start=1)}

    def read(file: str) -> list[Session]:
        found = read_sessions([folder / file])
        own = [NEW, *(codes.get(key, NEW) for key in found.templates)]
        return [keyed(session.stream, [own[code] for code in session.codes]) for session in found.sessions]

    return Case(name, train, read("test_normal.txt"), read("test_abnormal.txt")[::part], steps)


def row(case: Case, method: str, seed: int, found: tuple[Found, Found]) -> Row:
    normal, abnormal = found
    weights = REAL.get(case.name, (len(normal), len(abnormal)))
    hits, alarms = abnormal < NEVER, normal < NEVER
    rng = np.random.default_rng(0)
    drawn = [
        _f1(hits[rng.integers(len(hits), size=len(hits))].mean(), alarms[rng.integers(len(alarms), size=len(alarms))].mean(), *weights)
        for _ in range(1000)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    when = abnormal[hits] + 1
    ends = np.array([len(session) for session in case.abnormal])[hits]
    return Row(
        set=case.name,
        asked=case.asked,
        method=method,
        seed=seed,
        tpr=float(hits.mean()),
        fpr=float(alarms.mean()),
        f1=_f1(float(hits.mean()), float(alarms.mean()), *weights),
        f1_low=float(low),
        f1_high=float(high),
        events=float(np.median(when)) if len(when) else None,
        events_p90=float(np.quantile(when, 0.9)) if len(when) else None,
        before_end=float((abnormal[hits] < ends).mean()) if len(when) else 0.0,
    )


def _f1(tpr: float, fpr: float, normal: int, abnormal: int) -> float:
    tp, fp = tpr * abnormal, fpr * normal
    return 200 * tp / max(tp + fp + abnormal, 1e-9)


def at_random(case: Case, seed: int) -> tuple[Found, Found]:
    """Reports as many as were asked for."""
    rng = np.random.default_rng(seed)
    return tuple(np.where(rng.random(len(part)) < case.asked, 0, NEVER) for part in (case.normal, case.abnormal))  # type: ignore[return-value]


def always(case: Case, seed: int) -> tuple[Found, Found]:
    return np.zeros(len(case.normal), np.int64), np.zeros(len(case.abnormal), np.int64)


def two_grams(case: Case, seed: int) -> tuple[Found, Found]:
    """A pair of lines, the beginning and the end among them, that training does not have."""
    end = case.train.codes - 1
    seen = {pair for session in case.train.sessions for pair in _pairs(session, end)}
    return _each(case, lambda session: _first(session, end, seen))


def _first(session: Session, end: int, seen: set[tuple[int, int]]) -> int:
    return next((i for i, pair in enumerate(_pairs(session, end)) if pair not in seen or NEW in pair), NEVER)


def _pairs(session: Session, end: int) -> list[tuple[int, int]]:
    codes = session.codes.tolist()
    return list(zip([-1, *codes], [*codes, end], strict=True))


def event_and_length(case: Case, seed: int) -> tuple[Found, Found]:
    """A new line, or a length outside of what training has."""
    lengths = {len(session) for session in case.train.sessions}
    return _each(case, lambda session: _new_or_length(session, min(lengths), max(lengths)))


def _new_or_length(session: Session, shortest: int, longest: int) -> int:
    new = np.flatnonzero(session.codes == NEW)
    if len(new):
        return int(new[0])
    if len(session) > longest:
        return longest
    return len(session) if len(session) < shortest else NEVER


def two_grams_and_length(case: Case, seed: int) -> tuple[Found, Found]:
    pairs, lengths = two_grams(case, seed), event_and_length(case, seed)
    return np.minimum(pairs[0], lengths[0]), np.minimum(pairs[1], lengths[1])


def event_length_counts(case: Case, seed: int) -> tuple[Found, Found]:
    """The same, or counts of lines farther from all of training's than the asked share of training's own are from the others'.

    Distances are L1 over the larger sum (Landauer et al. 2024); training's are of a fifth at a time from the other four.
    """
    vectors = _counts(case.train.sessions, case.train.codes)
    own: list[Float64] = []
    for fold in np.array_split(np.arange(len(vectors)), 5):
        others = np.delete(vectors, fold, axis=0)
        own.append(_distances(vectors[fold], others))
    threshold = float(np.quantile(np.concatenate(own), 1 - case.asked, method="higher"))
    simple = event_and_length(case, seed)
    parts = []
    for sessions, found in zip((case.normal, case.abnormal), simple, strict=True):
        far = _distances(_counts(sessions, case.train.codes), vectors) > threshold
        parts.append(np.where((found == NEVER) & far, [len(session) for session in sessions], found))
    return parts[0], parts[1]


def _counts(sessions: Sequence[Session], codes: int) -> Float64:
    return np.stack([np.bincount(session.codes, minlength=codes) for session in sessions]).astype(np.float64)


def _distances(vectors: Float64, others: Float64) -> Float64:
    others = np.unique(others, axis=0)
    distinct, which = np.unique(vectors, axis=0, return_inverse=True)
    sums = np.maximum(distinct.sum(axis=1)[:, None], others.sum(axis=1)[None])
    return np.asarray((np.abs(distinct[:, None] - others[None]).sum(axis=2) / sums).min(axis=1)[which.ravel()])


def _each(case: Case, find: Callable[[Session], int]) -> tuple[Found, Found]:
    return np.array([find(s) for s in case.normal], np.int64), np.array([find(s) for s in case.abnormal], np.int64)


class NextLine(nn.Module):
    """DeepLog's network: two LSTM layers over the last WINDOW lines."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.embedding, self.lstm, self.line = nn.Embedding(codes + 1, 16), nn.LSTM(16, 64, 2), nn.Linear(64, codes)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows [N, WINDOW] of codes → logits [N, codes]."""
        logits: torch.Tensor = self.line(self.lstm(self.embedding(windows.t()))[0][-1])
        return logits


def deeplog(case: Case, seed: int) -> tuple[Found, Found]:
    """A line that is not among the TOP likeliest ones after the WINDOW before it. It has no threshold and knows no end."""
    torch.manual_seed(seed)
    codes = case.train.codes
    network, rng = NextLine(codes), np.random.default_rng(seed)
    windows, targets = (np.concatenate(parts) for parts in zip(*(_windows(s, codes) for s in case.train.sessions), strict=True))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(case.steps):
        rows = rng.integers(len(windows), size=ROWS)
        loss = functional.cross_entropy(network(torch.from_numpy(windows[rows])), torch.from_numpy(targets[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return _deeplog_found(network, case.normal, codes), _deeplog_found(network, case.abnormal, codes)


@torch.no_grad()
def _deeplog_found(network: NextLine, sessions: Sequence[Session], codes: int) -> Found:
    known: dict[bytes, set[int]] = {}
    pairs = [_windows(session, codes) for session in sessions]
    distinct = np.unique(np.concatenate([windows for windows, _ in pairs]), axis=0)
    for start in range(0, len(distinct), ROWS):
        part = distinct[start : start + ROWS]
        top = network(torch.from_numpy(part)).topk(min(TOP, codes), dim=1).indices.numpy()
        known.update(zip(map(bytes, part), map(set, top.tolist()), strict=True))
    found = np.full(len(sessions), NEVER, np.int64)
    for i, (windows, targets) in enumerate(pairs):
        odd = [target == NEW or target not in known[bytes(window)] for window, target in zip(windows, targets.tolist(), strict=True)]
        found[i] = odd.index(True) if True in odd else NEVER
    return found


def _windows(session: Session, codes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[T, WINDOW] before each line, filled up with `codes`, and the lines [T]."""
    padded = np.concatenate([np.full(WINDOW, codes), session.codes])
    return np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:-1].copy(), session.codes


def ours(case: Case, seed: int) -> tuple[Found, Found]:
    return _fitted(case, replace(LogPlan(seed=seed), steps=case.steps), "standard")


def without_lstm(case: Case, seed: int) -> tuple[Found, Found]:
    """A perceptron of the last line in the LSTMs' places where that pays, else the 2-gram table alone; weights are learned for each."""
    return _fitted(case, replace(LogPlan(seed=seed), steps=case.steps), "memoryless")


def _fitted(case: Case, plan: LogPlan, cell: str) -> tuple[Found, Found]:
    key = (cell, plan.seed)
    if key not in case.fitted:
        fitted = fit(case.train, replace(LOG_SIZES, cell=cell), plan)  # type: ignore[arg-type]
        step = fitted.step.eval()
        case.fitted[key] = step, Runner(session_of(to_onnx(step))), (fitted.alpha or 0.0) * case.asked / case.alpha
    step, runner, _ = case.fitted[key]
    return reported(step, runner, case.normal, case.alpha), reported(step, runner, case.abnormal, case.alpha)


def reported(step: LogStep, run: Runner, sessions: Sequence[Session], alpha: float) -> Found:
    """Each session from a fresh state, as it would be served; sessions of the same lines are run once."""
    kinds: dict[bytes, list[int]] = {}
    for i, session in enumerate(sessions):
        kinds.setdefault(session.codes.tobytes(), []).append(i)
    order = sorted(kinds.values(), key=lambda which: len(sessions[which[0]]))
    found = np.full(len(sessions), NEVER, np.int64)
    for start in range(0, len(order), ROWS):
        group = order[start : start + ROWS]
        when = _run(step, run, [sessions[which[0]] for which in group], alpha)
        for which, first in zip(group, when.tolist(), strict=True):
            found[which] = first
    return found


def _run(step: LogStep, run: Runner, sessions: Sequence[Session], alpha: float) -> Found:
    lengths = np.array([len(session) for session in sessions])
    B, end = len(sessions), step.codes - 1
    codes = np.full((int(lengths.max()) + 1, B), np.nan, np.float32)
    for b, session in enumerate(sessions):
        codes[: len(session), b], codes[len(session), b] = session.codes, end
    state, found = np.zeros((B, step.state_size), np.float32), np.full(B, NEVER, np.int64)
    t, ones, asked = np.full((B, 3), np.nan, np.float32), np.ones(B, np.float32), np.full(B, alpha, np.float32)
    for i, row_ in enumerate(codes):
        x = np.full((B, step.features), np.nan, np.float32)
        x[:, 0] = row_
        out = run(state, x, t, ones, asked)
        state = out.state
        found = np.where((out.onset_p < asked) & (found == NEVER) & (i <= lengths), i, found)
    return found


METHODS: dict[str, Method] = {
    "random": at_random,
    "always 1": always,
    "2-gram table": two_grams,
    "2-gram table + length": two_grams_and_length,
    "new event + length": event_and_length,
    "new event + length + count vector": event_length_counts,
    f"DeepLog's LSTM, top {TOP}": deeplog,
    "ours without LSTM": without_lstm,
    "ours": ours,
}
SEEDED = ("random", f"DeepLog's LSTM, top {TOP}", "ours without LSTM", "ours")
ASKED = ("random", "new event + length + count vector", "ours without LSTM", "ours")
"""What the asked rate changes; the other rows are run once."""


def run(
    sets: str = "hdfs,openstack,bgl,thunderbird",
    seeds: Annotated[int, typer.Option(min=1, help="Of ours with its LSTM; other rows have one.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of every network.")] = LogPlan.steps,
    part: Annotated[int, typer.Option(min=1, help="Take every n-th abnormal session of HDFS.")] = 1,
    methods: Annotated[str, typer.Option(help="Only these rows, separated by ;")] = "",
    data: Annotated[Path, typer.Option(help="Folder with the sets.")] = Path("../shared/data"),
    json_file: JsonFile = None,
) -> None:
    """Run every method on every set."""
    torch.set_num_threads(1)
    machine, rows, seconds = Machine.now(), list[Row](), Counter[str]()
    chosen = [name for name in METHODS if not methods or name in methods.split(";")]
    raw, quiet, hosts = list[RawRow](), list[QuietRow](), list[HostRow]()
    for name in sets.split(","):
        if name == HOSTS_SET:
            quiet, hosts = host_rows(steps, first_seed)
            continue
        if name in RAW_SETS:
            raw += raw_rows(name, data, steps)
            continue
        case = load(name, data, steps, part if name == "hdfs" else 1)
        cases = [replace(case, rate=rate) for rate in RATES if rate * len(case.train.sessions) >= 1] or [case]
        for method in chosen:
            for seed in range(first_seed, first_seed + (seeds if method == "ours" else 1)):
                began = time.monotonic()
                asked = cases if method in ASKED else cases[:1]
                rows += [row(one, method, seed, METHODS[method](one, seed)) for one in asked]
                if method == "ours" and (rate := case.fitted["standard", seed][2]):
                    best = replace(case, rate=rate)
                    rows.append(replace(row(best, method, seed, ours(best, seed)), recommended=True))
                seconds[method] += round(time.monotonic() - began)
    tables = [_table(name, [one for one in rows if one.set == name]) for name in sets.split(",") if name not in (*RAW_SETS, HOSTS_SET)]
    tables += [raw_table(raw)] if raw else []
    tables += host_tables(quiet, hosts) if hosts else []
    hdfs = [one.f1 for one in rows if one.set == "hdfs" and one.method == "ours" and one.asked == RATES[0]]
    goals = [Goal("F1 on HDFS, mean of the seeds", float(np.mean(hdfs)), bound) for bound in (GOAL, FLOOR)] if hdfs else []
    found = {
        "rows": [asdict(one) for one in rows],
        "raw": [asdict(one) for one in raw],
        "hosts": {"quiet": [asdict(one) for one in quiet], "incidents": [asdict(one) for one in hosts]},
        "seconds": dict(seconds),
    }
    report(tables, goals, machine, found, json_file)


def _table(name: str, rows: Sequence[Row]) -> Table:
    numbers = ("TPR", "FPR", "FPR ÷ asked", "F1", "95 %", "events", "p90", "before the end")
    made = table(f"{name}: sessions reported", ("asked", "method", "seed"), numbers)
    for one in sorted(rows, key=lambda one: -one.asked):
        events = [f"{value:.0f}" if value is not None else "–" for value in (one.events, one.events_p90)]
        interval = f"{one.f1_low:.1f}–{one.f1_high:.1f}"
        ratio = f"{one.fpr / one.asked:.2f}" if one.method in ASKED else ""
        cells = (f"{one.tpr:.4f}", f"{one.fpr:.5f}", ratio, f"{one.f1:.2f}", interval, *events, f"{one.before_end:.0%}")
        made.add_row(
            f"1/{1 / one.asked:,.0f}{' (recommended)' if one.recommended else ''}",
            one.method,
            str(one.seed) if one.method in SEEDED else "",
            *cells,
        )
    return made


if __name__ == "__main__":
    typer.run(run)
