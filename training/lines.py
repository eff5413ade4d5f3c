"""Log lines → the templates of a log model (`Lines`), fixed for as long as it lives.

    entries ─► masked lines, each once with its count ─► Drain: clusters of similar ones, a template each
            ─► words that tell: a wildcard that takes only a few words gets a template for each of them
            ─► ids: templates that differ by one alone, because some ids happen to have no letter, become one

Drain (He et al., ICWS 2017; the package drain3-improved) merges lines that share most of their words, also where the one that differs is
what matters: "VM <*> (Lifecycle Event)" for Started, Stopped and Paused. The second step takes these apart again; a word that no line had
makes a new pattern. `python -m bench.lines` compares both with the hand-made templates of loghub.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import re2
from drain3.drain import Drain
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from service.artifact import MAX_TEMPLATES, NEW, NUMBER, WILDCARD, Lines, Mask
from service.errors import TableError
from service.lines import DEFAULT_MASKS, HEXADECIMAL, Matcher, Splitter, plain
from service.log_files import Counted, LogFormat, read
from service.outputs import write_text
from service.patterns import PatternPage

MAX_DISTINCT = 2_000_000
"""Masked lines that differ. More would mean that something variable is not masked."""
MAX_TOKENS = 400
"""Longer lines (dumps, JSON) make no template: what they hold is not said in words."""
FEW, LEAST = 8, 3
"""A wildcard is taken apart where it takes at most so many words, each so often on average."""

EXAMPLE_LENGTH = 200


@dataclass(frozen=True)
class Mining:
    """What templates are mined with."""

    header: str = ""
    masks: tuple[Mask, ...] = DEFAULT_MASKS
    delimiters: str = ""
    similarity: float = 0.5
    """Share of their words that two lines of a cluster have in common at least."""
    depth: int = 4
    """Of Drain's tree: its leading `depth - 3` words tell lines apart."""


@dataclass(frozen=True)
class Pattern:
    """A template as the preview shows it."""

    code: int
    template: str
    count: int
    example: str
    """A line as it was written."""


def mine(messages: Iterable[str], mining: Mining = Mining(), session_seconds: float | None = None) -> Lines:
    """The templates of all messages, the most frequent first. Every message matches one, but for those longer than MAX_TOKENS.

    Deterministic: it depends on the messages and their order alone. Raises TableError where there is none, or too many of them differ.
    """
    splitter = Splitter(mining.header, mining.masks, mining.delimiters)
    counts: Counter[str] = Counter()
    for message in messages:
        tokens = splitter.tokens(message)
        if 0 < len(tokens) <= MAX_TOKENS:
            counts[" ".join(tokens)] += 1
        if len(counts) > MAX_DISTINCT:
            raise TableError(f"More than {MAX_DISTINCT} masked lines differ: mask what varies (--mask), see `python -m training lines`.")
    if not counts:
        raise TableError("There is no line to mine templates from.")
    templates: list[str] = []
    wider = _clusters(counts, mining)
    while len(wider) > len(templates):  # what one word tells apart may have further words that tell
        templates, wider = wider, _told_apart(wider, counts)
    templates = _joined(templates, counts)
    if len(templates) > MAX_TEMPLATES:
        raise TableError(f"{len(templates)} templates; there may be {MAX_TEMPLATES}: mask what varies (--mask) or lower --similarity.")
    made = Lines(
        header=mining.header,
        masks=list(mining.masks),
        delimiters=mining.delimiters,
        templates=templates,
        session_seconds=session_seconds,
    )
    often = _often(templates, counts)
    used = [i for i in range(len(templates)) if often[i + 1]]  # a word that no line had is a new pattern
    ordered = sorted(used, key=lambda i: -often[i + 1])
    return made.model_copy(update={"templates": [templates[i] for i in ordered]})


def patterns(lines: Lines, messages: Iterable[str]) -> list[Pattern]:
    """How often each template matches, with an example, and first (code 0) what none does."""
    matcher, counts = Matcher(lines), Counter[int]()
    examples: dict[int, str] = {}
    for message in messages:
        code = int(matcher.codes([message])[0][0])
        counts[code] += 1
        examples.setdefault(code, message)
    texts = ["", *lines.templates]
    return [Pattern(code, text, counts[code], examples.get(code, "")) for code, text in enumerate(texts)]


def masks_of(written: Sequence[str]) -> tuple[Mask, ...]:
    """Masks written as REPLACEMENT=REGEX, or =REGEX of names that stay, then the default ones. Raises TableError."""
    masks = []
    for text in written:
        replacement, _, pattern = text.partition("=")
        try:
            masks.append(Mask(name=replacement.strip("<>") or replacement or "name", pattern=pattern, replacement=replacement))
        except ValidationError as error:
            first = error.errors()[0]
            raise TableError(
                f"--mask {text!r}: {first['loc'][0]}: {first['msg']}. It is REPLACEMENT=REGEX, as '<USER>=user-[0-9]+', "
                "or =REGEX for what is to stay as it is."
            ) from error
    return (*masks, *DEFAULT_MASKS)


class Idle:
    """The user's masks that no line has had a word for: most likely mistakes."""

    def __init__(self, mining: Mining) -> None:
        self.masks = [mask for mask in mining.masks if mask not in DEFAULT_MASKS]
        self._words_of = Splitter(mining.header, mining.masks, mining.delimiters).words

    def look(self, text: str) -> None:
        if self.masks:
            words = self._words_of(text)
            self.masks = [mask for mask in self.masks if not any(re2.search(mask.pattern, word) for word in words)]

    def said(self) -> list[str]:
        """A sentence for each."""
        return [f"No word holds what --mask '{mask.replacement}={mask.pattern}' masks: it sees each word by itself." for mask in self.masks]


def exported(files: Sequence[Path]) -> list[str]:
    """Lines that a model in service had no template for, from replies of its GET /v1/patterns. Raises TableError."""
    found: list[str] = []
    for file in files:
        try:
            page = msgspec.json.decode(file.read_bytes(), type=PatternPage)
        except (OSError, msgspec.MsgspecError) as error:
            raise TableError(f"{file} is no reply of GET /v1/patterns: {error}.") from error
        found += [one.example for one in page.patterns]
    return found


def preview(
    paths: Sequence[Path],
    format_: LogFormat,
    mining: Mining,
    console: Console,
    most: int,
    json_file: Path | None,
    seen: Sequence[str],
) -> None:
    """Mine the files, and the lines `seen` elsewhere, and print what was found. Raises TableError."""
    counted, streams, idle = Counted(), Counter[str](), Idle(replace(mining, header=format_.header))

    def messages() -> Iterator[str]:
        for entry in read(paths, format_, counted):
            streams[entry.stream] += 1
            idle.look(entry.text)
            yield entry.text
        yield from seen

    mined = mine(messages(), replace(mining, header=format_.header))
    found = [one for one in patterns(mined, (entry.text for entry in read(paths, format_))) if one.count or one.code]
    splitter = Splitter(mined.header, mined.masks, mined.delimiters)
    grid = Grid(title=f"{len(mined.templates)} templates", box=box.SIMPLE)
    for name, how in (("code", "right"), ("lines", "right"), ("template", "left"), ("example", "left")):
        grid.add_column(name, justify=how, overflow="fold")  # type: ignore[arg-type]
    for one in found[:most]:
        example = " ".join(splitter.words(one.example))
        template, example = plain(one.template or "(none)"), plain(example)[:EXAMPLE_LENGTH]
        grid.add_row(str(one.code), f"{one.count:,}", template, example)
    console.print(grid)
    if len(found) > most:
        console.print(f"{len(found) - most:,} rarer templates are not shown (--most).")
    once = sum(one.count == 1 for one in found)
    console.print(
        f"{counted.entries:,} entries of {counted.lines:,} lines in {len(streams):,} streams; {once:,} templates came once. "
        f"{counted.left_out}"
    )
    for sentence in idle.said():
        console.print(sentence)
    if json_file:
        write_text(json_file, json.dumps([asdict(one) for one in found], indent=2))


def grouping_accuracy(codes: Sequence[int], truth: Sequence[str]) -> float:
    """Share of lines whose group is exactly their group in `truth` (Zhu et al., ICSE 2019)."""
    ours, theirs = defaultdict(list), defaultdict(list)
    for i, (code, event) in enumerate(zip(codes, truth, strict=True)):
        ours[code].append(i)
        theirs[event].append(i)
    return sum(len(group) for group in ours.values() if theirs[truth[group[0]]] == group) / len(codes)


def _clusters(masked: Iterable[str], mining: Mining) -> list[str]:
    """Drain's templates, of lines with the same names in the same places each; none that is wildcards alone, which says nothing."""
    names = [re2.compile(mask.pattern) for mask in mining.masks if not mask.replacement]
    drains: dict[tuple[tuple[int, str], ...], Drain] = {}
    for line in masked:
        named = tuple((i, token) for i, token in enumerate(line.split()) if any(name.search(token) for name in names)) if names else ()
        if named not in drains:
            drains[named] = Drain(depth=mining.depth, sim_th=mining.similarity, param_str=WILDCARD)
        drains[named].add_log_message(line)
    templates = dict.fromkeys(cluster.get_template() for drain in drains.values() for cluster in drain.clusters)
    return [template for template in templates if set(template.split()) != {WILDCARD}]


def _told_apart(templates: list[str], counts: Counter[str]) -> list[str]:
    """`templates`, and those that name the words of a wildcard which takes only a few."""
    matcher = Matcher(Lines(templates=templates))
    rows_of: dict[int, list[tuple[list[str], int]]] = defaultdict(list)
    for line, count in counts.items():
        rows_of[matcher.code_of(line)].append((line.split(), count))
    named: dict[str, None] = {}
    for code, rows in rows_of.items():
        if code != NEW:
            named |= dict.fromkeys(_with_words(templates[code - 1].split(), rows))
    return list(dict.fromkeys([*templates, *named]))


def _with_words(template: list[str], rows: list[tuple[list[str], int]]) -> list[str]:
    """A template for each combination of words in the wildcards that take few; `rows` are its lines, with their counts."""
    total = sum(count for _, count in rows)
    words_of = {i: {tokens[i] for tokens, _ in rows} for i, token in enumerate(template) if token == WILDCARD}
    telling = [i for i, words in words_of.items() if len(words) <= FEW and total >= LEAST * len(words) and all(map(_is_word, words))]
    places: list[int] = []
    for i in sorted(telling, key=lambda i: len(words_of[i])):
        if len({tuple(tokens[j] for j in (*places, i)) for tokens, _ in rows}) <= FEW:
            places.append(i)
    made = []
    for words in {tuple(tokens[i] for i in places): None for tokens, _ in rows} if places else {}:
        told = dict(zip(places, words, strict=True))
        made.append(" ".join(told.get(i, token) for i, token in enumerate(template)))
    return made


def _joined(templates: list[str], counts: Counter[str]) -> list[str]:
    """`templates`, those that differ by an id alone as one: of hexadecimal digits it is a number where it happens to have no letter."""
    often = _often(templates, counts)
    lines = {template: often[code] for code, template in enumerate(templates, NEW + 1)}
    wider: dict[str, str] = {}
    for template in templates:
        tokens = template.split()
        for i, token in enumerate(tokens):
            usual = " ".join([*tokens[:i], token.replace(NUMBER, HEXADECIMAL), *tokens[i + 1 :]])
            if NUMBER in token and lines.get(usual, 0) > lines[template] and any(one != WILDCARD for one in tokens[:i] + tokens[i + 1 :]):
                wider[template] = wider[usual] = " ".join([*tokens[:i], WILDCARD, *tokens[i + 1 :]])
    return _joined(list(dict.fromkeys(wider.get(template, template) for template in templates)), counts) if wider else templates


def _often(templates: list[str], counts: Counter[str]) -> Counter[int]:
    """Code → how many lines have it."""
    matcher, often = Matcher(Lines(templates=templates)), Counter[int]()
    for line, count in counts.items():
        often[matcher.code_of(line)] += count
    return often


def _is_word(token: str) -> bool:
    """Neither an identity nor masked, but for one number in it: where that is missing ("-"), the others are still numbers."""
    token = token.replace(NUMBER, "", 1)
    return "<" not in token and not any(map(str.isdigit, token))
