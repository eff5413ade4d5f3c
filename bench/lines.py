"""Lines matched a second (masked, found among the templates, numbers read), beside drain3's own match; and how well lines are grouped.

    python -m bench.lines [--quick] [--seconds 3] [--json FILE]

Over the 2,000-line samples of loghub in `../shared/data/loghub_2k` (column Content of the structured files), in bodies of 1,000 lines:

    known   the same lines again: every word and every masked line is in memory
    live    every digit is another one each time, as in a stream: words with numbers are masked anew, the rest is in memory
    new     a matcher that has seen nothing: everything is made
    drain3  `TemplateMiner.match` with the same masks, the templates it mined itself, over the live lines; it keeps nothing

and of two samples also the raw lines, whose header (time, host) is cut off by an expression. Rates are of one core's time
(`time.process_time`), so that what else runs on the machine counts less. Grouping accuracy is the share of lines whose group is exactly
that of the hand-made templates (Zhu et al., ICSE 2019): of Drain alone, as drain3 mines with these masks, and of both steps of
training/lines.py. Goal: 50,000 live lines/s.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from drain3 import TemplateMiner
from drain3.masking import MaskingInstruction
from drain3.template_miner_config import TemplateMinerConfig

from bench.report import Goal, JsonFile, Machine, report, table
from service.lines import Matcher
from training.lines import Mining, grouping_accuracy, mine

DATA = Path("../shared/data/loghub_2k")
SYSTEMS = ("BGL", "Thunderbird", "HDFS", "OpenStack", "Hadoop")
RAW = {
    "BGL, raw": r"\S+ (\d{10}) \S+ \S+ \S+ \S+ \S+ \S+ \S+ ",
    "Thunderbird, raw": r"\S+ (\d{10}) \S+ \S+ \w+ +\d+ \S+ \S+ (?:[^\s:\[]+(?:\[\d+\])?: )?",
}
BODY_LINES = 1_000
GOAL_LINES = 50_000


@dataclass(frozen=True)
class Row:
    """One system; rates are lines a second of one core's time."""

    system: str
    known: float
    live: float
    new: float
    drain3: float
    ratio: float
    """Live lines, ours ÷ drain3's."""
    accuracy_of_drain: float
    accuracy: float
    templates: int
    hand_made: int


def main(
    seconds: Annotated[float, typer.Option(min=0.2, help="Of each rate.")] = 3.0,
    quick: Annotated[bool, typer.Option("--quick", help="HDFS alone, half a second each.")] = False,
    data: Annotated[Path, typer.Option(help="Folder of the samples.")] = DATA,
    json_file: JsonFile = None,
) -> None:
    """Measure each sample and print a table."""
    machine = Machine.now()
    rows = [measure(data, system, 0.5 if quick else seconds) for system in (("HDFS",) if quick else (*SYSTEMS, *RAW))]
    made = table(
        "Lines matched a second of one core's time, and how they are grouped",
        ["system"],
        ["known", "live", "new", "drain3, live", "ratio", "accuracy of Drain alone", "accuracy", "templates", "hand-made"],
    )
    for row in rows:
        rates = (f"{rate:,.0f}" for rate in (row.known, row.live, row.new, row.drain3))
        accuracies = (f"{value:.3f}" for value in (row.accuracy_of_drain, row.accuracy))
        made.add_row(row.system, *rates, f"{row.ratio:.1f}", *accuracies, str(row.templates), str(row.hand_made))
    goals = [Goal(f"{row.system}: live lines a second", row.live, GOAL_LINES) for row in rows]
    report([made], goals, machine, {"rows": [asdict(row) for row in rows]}, json_file)


def measure(data: Path, system: str, seconds: float) -> Row:
    """Rates and accuracy of one sample."""
    name = system.removesuffix(", raw")
    lines, truth = read(data / f"{name}_2k.log_structured.csv")
    if system in RAW:
        lines = (data / f"{name}_2k.log").read_text(encoding="utf-8").splitlines()
    mining = Mining(header=RAW.get(system, ""))
    mined = mine(lines, mining)
    matcher, peer = Matcher(mined), drain3_of(lines, mining)
    live = live_lines(lines, 20)
    matcher.codes(lines)
    alone = [int(found.cluster_id) if (found := peer.match(line)) else 0 for line in lines]
    ours = _rate(matcher.codes, live, seconds)
    theirs = _rate(lambda body: [peer.match(line) for line in body], live, seconds)
    known = matcher.codes(lines)[0].astype(int)
    return Row(
        system,
        known=round(_rate(matcher.codes, [lines], seconds)),
        live=round(ours),
        new=round(_rate(lambda body: Matcher(mined).codes(body), [lines], seconds)),
        drain3=round(theirs),
        ratio=round(ours / theirs, 2),
        accuracy_of_drain=round(grouping_accuracy(alone, truth), 4),
        accuracy=round(grouping_accuracy(known.tolist(), truth), 4),
        templates=len(set(known.tolist())),
        hand_made=len(set(truth)),
    )


def read(file: Path) -> tuple[list[str], list[str]]:
    """The lines of a structured file, and the events that people gave them."""
    with file.open(newline="", encoding="utf-8") as rows:
        found = [(row["Content"], row["EventId"]) for row in csv.DictReader(rows)]
    return [line for line, _ in found], [event for _, event in found]


def live_lines(lines: Sequence[str], copies: int) -> list[list[str]]:
    """The lines again and again, each digit another one: their shapes stay, their numbers do not."""
    rng = np.random.default_rng(0)
    text = np.frombuffer("\n".join(lines).encode("latin-1", "replace"), np.uint8)
    digits = np.flatnonzero((text >= ord("0")) & (text <= ord("9")))
    bodies: list[list[str]] = []
    for _ in range(copies):
        other = text.copy()
        other[digits] = rng.integers(ord("0"), ord("9") + 1, len(digits))
        copy = other.tobytes().decode("latin-1").split("\n")
        bodies += [copy[i : i + BODY_LINES] for i in range(0, len(copy), BODY_LINES)]
    return bodies


def drain3_of(lines: Sequence[str], mining: Mining) -> TemplateMiner:
    """As its documentation has it: masks and Drain, fitted to the lines."""
    config = TemplateMinerConfig()
    config.masking_instructions = [MaskingInstruction(mask.pattern, mask.replacement.strip("<>_")) for mask in mining.masks]
    if mining.header:
        config.masking_instructions.insert(0, MaskingInstruction("^" + mining.header, "HEADER"))
    config.drain_sim_th, config.drain_depth = mining.similarity, mining.depth
    config.profiling_enabled = False
    miner = TemplateMiner(config=config)
    for line in lines:
        miner.add_log_message(line)
    return miner


def _rate(run: Callable[[Any], object], bodies: Sequence[list[str]], seconds: float) -> float:
    """Lines a second of this process's time."""
    taken, done = 0.0, 0
    while taken < seconds:
        for body in bodies:
            began = time.process_time()
            run(body)
            taken += time.process_time() - began
            done += len(body)
            if taken >= seconds:
                break
    return done / taken


if __name__ == "__main__":
    typer.run(main)
