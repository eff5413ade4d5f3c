"""A log line → the code of its template and its numbers. Matched, never mined: what a model knows was fixed when it was trained.

    line      "2026-11-26T08:00:00Z web-1 Took 12.5 ms for /a?id=77 of 10.0.0.7:4711"
    message   "Took 12.5 ms for /a?id=77 of 10.0.0.7:4711"           the header is cut off, and what follows the first line
    words     Took · 12.5 · ms · for · /a?id=77 · of · 10.0.0.7:4711
    masked    Took <NUM> ms for /a?id=<NUM> of <IP>                  each word by itself
    template  Took <NUM> ms for <*> of <IP>                          as many tokens, each the same one or a wildcard
    numbers   12.5                                                   what <NUM> stands for in the template, in order

Of several templates that match, one with the fewest wildcards is taken, always the same one; where none does, <HEX> of a template takes
a number, too: an id of hexadecimal digits has no letter now and then. Pure, and deterministic: it depends
on `Lines` and the line alone. Words that were seen are known, and so are masked lines; both memories are bounded.

Masks run in Python's own engine where they are those below, which take linear time there on any input, and in RE2 where they are
others': an expression that someone wrote must not stand still on what someone else sent.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import re2
from numpy.typing import NDArray

from service.artifact import NEW, NEW_KINDS, NUMBER, NUMBERS, WILDCARD, Lines, Mask
from service.events import FLOAT32_MAX

# Hexadecimal with a letter among the first eight: RE2 cannot look ahead, so it says where.
_EIGHT_DIGITS = "|".join([f"[0-9]{{{i}}}[a-fA-F][0-9a-fA-F]{{{7 - i},}}" for i in range(8)])

DEFAULT_MASKS = (
    Mask(name="uuid", pattern=r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b", replacement="<UUID>"),
    Mask(name="mac", pattern=r"\b[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}\b", replacement="<MAC>"),
    Mask(name="ipv6", pattern=r"\b[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{0,4}){3,7}\b", replacement="<IP>"),
    Mask(
        name="time",
        pattern=r"\b\d{4}[-./]\d\d[-./]\d\d(?:[T_-]?\d\d[:.]\d\d[:.]\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?)?\b",
        replacement="<TIME>",
    ),
    Mask(name="clock", pattern=r"\b\d\d:\d\d:\d\d(?:[.,]\d{1,9})?\b", replacement="<TIME>"),
    Mask(
        name="ip",
        pattern=r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?::\d{1,5})?(?:,\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?::\d{1,5})?)*\b",
        replacement="<IP>",
    ),
    Mask(name="hex", pattern=r"\b0[xX][0-9a-fA-F]+\b", replacement="<HEX>"),
    Mask(name="hash", pattern=rf"\b(?:(?:[0-9]+[a-fA-F]|[a-fA-F]+[0-9])[0-9a-fA-F]{{4,}}|{_EIGHT_DIGITS})\b", replacement="<HEX>"),
    Mask(name="id", pattern=r"_-?\d+", replacement="_<ID>"),
    Mask(name="signed", pattern=r"^[-+]\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", replacement=NUMBER),
    Mask(name="number", pattern=r"\b\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", replacement=NUMBER),
    Mask(name="digits", pattern=r"\d+", replacement="<ID>"),
)
"""What training masks unless it is told otherwise. A number is plain where a word begins; digits within a word are an identity."""

WORDS, WORD_LENGTH = 65_536, 128
"""Words that are kept masked, twice over, and the longest that is."""
SHAPES = 16_384
"""Words with all digits alike that are kept masked, twice over."""
NUMBERED = 4_096
"""Words that hold numbers and more, kept with them, twice over."""
KNOWN, KNOWN_LENGTH = 8_192, 1_000
"""Masked lines that are kept with their code, twice over, and the longest that is."""
HEXADECIMAL = "<HEX>"
"""What a default mask writes for an id of hexadecimal digits."""
MOST_IDS = 4
"""Ids in one token of which each may be a number by itself."""
MOST_NUMBERS = len(NUMBERS)
ALIKE = 2
"""First tokens that new patterns of one kind have in common."""

_NUMERIC = re.compile(f"{HEXADECIMAL}|{NUMBER}")
_EDGE, _SIX = r"\b", "(?=[0-9a-fA-F]{6})"
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DEFAULTS = frozenset(mask.pattern for mask in DEFAULT_MASKS)
_HASH = next(mask.pattern for mask in DEFAULT_MASKS if mask.name == "hash")

_UNCAPTURED = re2.Options()
_UNCAPTURED.never_capture = True
_SHAPE = str.maketrans("123456789", "000000000")


def plain(text: str) -> str:
    """Without colours, and U+FFFD for control characters: what is shown of a line must do nothing to a terminal or a mail."""
    return _CONTROLS.sub("\ufffd", _COLOURS.sub("", text))


Made = TypeVar("Made")
Pick = tuple[int, slice | None, int]
"""A number of a line: its word, and where it is in the word; None = it is not alone there, but the n-th of several masked parts."""


class Matched(NamedTuple):
    """What a masked line is."""

    code: float
    picks: tuple[Pick, ...]


_PADDING = [[math.nan] * missing for missing in range(MOST_NUMBERS, -1, -1)]


class Matcher:
    """Lines → codes, by the templates of one model. Not for two threads at once."""

    def __init__(self, lines: Lines) -> None:
        self.splitter = Splitter(lines.header, lines.masks, lines.delimiters)
        self._index = _index(lines.templates)
        self._with_ids = _with_ids(lines.templates)
        self._templates = [template.split() for template in lines.templates]
        self._known = _Memory(self._matched, KNOWN, KNOWN_LENGTH)
        self._numbers = _Memory(self._numbers_of, NUMBERED, WORD_LENGTH)

    def codes(self, messages: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """[N] codes, NEW and the line's kind where no template matches, and [N, 4] the first numbers of each line, NaN = none."""
        codes: list[float] = []
        numbers: list[list[float]] = []
        known, split, masked_of, number = self._known, self.splitter.words, self.splitter.masked_word, self._number
        for message in messages:
            words = split(message)
            code, picks = known["\n".join([masked_of[word] for word in words])]
            codes.append(code)
            numbers.append([number(words[word], where, nth) for word, where, nth in picks] + _PADDING[len(picks)] if picks else _PADDING[0])
        return np.array(codes, np.float32), np.array(numbers, np.float32).reshape(len(codes), MOST_NUMBERS)

    def code_of(self, masked: str) -> int:
        """Of a line that is masked already, its tokens separated by blanks."""
        return int(self._known[masked].code)

    def _matched(self, masked: str) -> Matched:
        """The masked words of a line, one a line → what it is."""
        tokens = masked.split()
        for literals, codes in self._index.get(len(tokens), ()):
            code = codes.get(literals(tokens))
            if code is not None:
                return Matched(code, self._picks(masked, self._templates[code - 1]))
        if NUMBER in masked:
            for code, taken in self._with_ids.get(len(tokens), ()):
                if all(token in one for token, one in zip(tokens, taken, strict=True) if one):
                    return Matched(code, self._picks(masked, self._templates[code - 1]))
        return Matched(_new(tokens), ())

    def _picks(self, masked: str, template: list[str]) -> tuple[Pick, ...]:
        """Where the numbers of a line are that its template knows as such."""
        picks: list[Pick] = []
        tokens = iter(template)
        for i, word in enumerate(masked.split("\n")):
            nth, where = 0, _only(word)
            for token, known in zip(word.split(), tokens, strict=False):
                found = _NUMERIC.findall(token)
                wanted = [k for k, mask in enumerate(_NUMERIC.findall(known)) if mask == NUMBER]
                picks += [(i, where, nth + found[:k].count(NUMBER)) for k in wanted]
                nth += found.count(NUMBER)
        return tuple(picks[:MOST_NUMBERS])

    def _number(self, word: str, where: slice | None, nth: int) -> float:
        if where is not None:
            return _float32(word[where])
        numbers = self._numbers[word]
        return numbers[nth] if nth < len(numbers) else math.nan  # a line may hold "<NUM>" as it stands

    def _numbers_of(self, word: str) -> list[float]:
        return list(map(_float32, self.splitter.numbers(word)))


def _new(tokens: Sequence[str]) -> float:
    """NEW, and of which kind: as many tokens, and the same first ones."""
    kind = zlib.crc32(f"{len(tokens)} {' '.join(tokens[:ALIKE])}".encode("utf-8", "surrogatepass")) % NEW_KINDS
    return NEW + kind / (2 * NEW_KINDS)


def _only(masked: str) -> slice | None:
    """Where the number is in a word of which nothing else was masked."""
    before, number, after = masked.partition(NUMBER)
    return slice(len(before), -len(after) or None) if number and "<" not in before + after else None


def _float32(text: str) -> float:
    try:
        number = float(text)
    except ValueError:  # a mask of the trainer's calls it a number, or it is "<NUM>" as it stands
        return math.nan
    return number if abs(number) <= FLOAT32_MAX else math.nan


class Splitter:
    """Lines → masked words. Mining (training/lines.py) sees lines as matching does."""

    def __init__(self, header: str, masks: Sequence[Mask], delimiters: str) -> None:
        self._header = re2.compile(header.encode(), _UNCAPTURED) if header else None
        self._mask = _Masking(masks)
        self._delimiters = str.maketrans(dict.fromkeys(delimiters, " "))
        self.masked_word = _Memory(self._masked, WORDS, WORD_LENGTH)
        """Word → what stands for it, its tokens separated by blanks."""

    def words(self, message: str) -> list[str]:
        """Of the message's first line that is not blank, without its header."""
        if "\n" in message:
            message = message.lstrip().partition("\n")[0]
        if self._header is not None:
            # RE2 matches UTF-8. Given a str, its wrapper counts the characters of every span, which takes longer than all else.
            encoded = message.encode()
            if header := self._header.match(encoded):
                message = encoded[header.end() :].decode()
        return message.split()

    def tokens(self, message: str) -> list[str]:
        """What templates are made of."""
        return " ".join([self.masked_word[word] for word in self.words(message)]).split()

    def pattern(self, message: str, length: int) -> str:
        """The tokens, as far as so many characters show them."""
        parts, size = list[str](), 0
        for word in self.words(message):
            parts.append(self.masked_word[word])
            if (size := size + len(parts[-1]) + 1) > length:
                break
        return " ".join(" ".join(parts).split())[:length]

    def numbers(self, word: str) -> list[str]:
        """What was replaced by NUMBER in this word, in order."""
        return self._mask.numbers(word)

    def _masked(self, word: str) -> str:
        masked = self._mask.masked(word)
        return masked.translate(self._delimiters) if self._delimiters else masked


class _Masking:
    """All masks: at each place the first of them that matches.

    A word in which no mask of others is found is one for the default ones alone. To these all digits are alike, but for the 0 of 0x, so
    that words of one shape are masked alike: most words that were never seen have a shape that was.
    """

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._ours = _Ours([mask for mask in masks if mask.pattern in _DEFAULTS])
        self._both = _Both(masks) if any(mask.pattern not in _DEFAULTS for mask in masks) else None
        self._shapes = _Memory(self._ours.masked, SHAPES, WORD_LENGTH)

    def masked(self, word: str) -> str:
        if self._both is not None and self._both.needed(word):
            return self._both.masked(word)
        if "x" in word or "X" in word:
            return self._ours.masked(word)
        return self._shapes[word.translate(_SHAPE)]

    def numbers(self, word: str) -> list[str]:
        """What was replaced by NUMBER, in order."""
        return (self._both if self._both is not None and self._both.needed(word) else self._ours).numbers(word)


class _Ours:
    """Of the default masks, in Python's engine; they have no groups of their own."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._expression = re.compile(_sooner(masks), re.ASCII) if masks else None
        self._replacements = ["", *(mask.replacement for mask in masks)]

    def masked(self, word: str) -> str:
        return word if self._expression is None else self._expression.sub(self._replacement, word)

    def numbers(self, word: str) -> list[str]:
        found = self._expression.finditer(word) if self._expression is not None else ()
        return [one.group() for one in found if self._replacement(one) == NUMBER]

    def _replacement(self, found: re.Match[str]) -> str:
        return self._replacements[found.lastindex or 0]


class _Found(NamedTuple):
    """A part of a word that is masked; of two that begin at one place the mask that comes first counts."""

    start: int
    mask: int
    end: int


class _Both:
    """Masks of others beside the default ones: those in RE2, these in Python's engine.

    As one expression in RE2 they took seconds for a word of 65,536 characters: each match may look at all that is left of the word, and
    has the spans of all groups.
    """

    def __init__(self, masks: Sequence[Mask]) -> None:
        places = range(len(masks))
        ours, others = [i for i in places if masks[i].pattern in _DEFAULTS], [i for i in places if masks[i].pattern not in _DEFAULTS]
        self._replacements = [mask.replacement for mask in masks]
        self._ours = re.compile(_sooner([masks[i] for i in ours]), re.ASCII) if ours else None
        self._of_ours = [-1, *ours]
        self._others = re2.compile(_either([masks[i] for i in others]))
        groups = np.cumsum([1, *(re2.compile(masks[i].pattern).groups + 1 for i in others)])[:-1].tolist()
        self._of_others = list(zip(groups, others, strict=True))

    def needed(self, word: str) -> bool:
        """Whether a mask of others is found in it."""
        return self._others.search(word) is not None

    def masked(self, word: str) -> str:
        parts, end = list[str](), 0
        for found in self._each(word):
            parts += word[end : found.start], self._replacements[found.mask] or word[found.start : found.end]
            end = found.end
        return "".join([*parts, word[end:]])

    def numbers(self, word: str) -> list[str]:
        return [word[found.start : found.end] for found in self._each(word) if self._replacements[found.mask] == NUMBER]

    def _each(self, word: str) -> Iterator[_Found]:
        """What is masked, from left to right."""
        mine, others = self._mine(word, 0), self._theirs(word, 0)
        theirs = next(others, None)
        while found := min((one for one in (mine, theirs) if one is not None), default=None):
            yield found
            if mine is not None and mine.start < found.end:
                mine = self._mine(word, found.end)
            if theirs is not None and theirs.start < found.end:
                others = others if found is theirs else self._theirs(word, found.end)
                theirs = next(others, None)

    def _mine(self, word: str, start: int) -> _Found | None:
        found = self._ours.search(word, start) if self._ours is not None else None
        return None if found is None else _Found(found.start(), self._of_ours[found.lastindex or 0], found.end())

    def _theirs(self, word: str, start: int) -> Iterator[_Found]:
        for found in self._others.finditer(word, start):
            if found.end() > found.start():
                yield _Found(found.start(), next(i for group, i in self._of_others if found.start(group) >= 0), found.end())


def _either(masks: Sequence[Mask]) -> str:
    return "|".join(f"({mask.pattern})" for mask in masks)


def _sooner(masks: Sequence[Mask]) -> str:
    """What `_either` finds of default masks, in less time: where none can begin they are not tried one by one."""
    parts: list[str] = []
    for bounded, some in itertools.groupby(masks, lambda mask: mask.pattern.startswith(_EDGE)):
        tried = "|".join([f"({_SIX if mask.pattern == _HASH else ''}{mask.pattern.removeprefix(_EDGE)})" for mask in some])
        parts.append(f"{_EDGE}(?:{tried})" if bounded else tried)
    return f"(?=[0-9a-fA-F_+-])(?:{'|'.join(parts)})"


class _Memory(dict[str, Made]):
    """Text → what `make` makes of it. Keeps between `size` and twice as many of the latest; none that is longer than `length`."""

    def __init__(self, make: Callable[[str], Made], size: int, length: int) -> None:
        super().__init__()
        self._make, self._size, self._length = make, size, length
        self._older: dict[str, Made] = {}

    def __missing__(self, text: str) -> Made:
        if len(text) > self._length:
            return self._make(text)
        made = self._older.get(text)
        if made is None:
            made = self._make(text)
        if len(self) >= self._size:
            self._older = dict(self)
            self.clear()
        self[text] = made
        return made


def _index(templates: Sequence[str]) -> dict[int, list[tuple[Callable[[list[str]], Any], dict[Any, int]]]]:
    """Number of tokens → for each set of places that are literal, the fewest wildcards first: what picks them, and literals → code."""
    found: dict[int, dict[tuple[int, ...], dict[Any, int]]] = {}
    for code, template in enumerate(templates, NEW + 1):
        tokens = template.split()
        places = tuple(i for i, token in enumerate(tokens) if token != WILDCARD)
        found.setdefault(len(tokens), {}).setdefault(places, {})[_picker(places)(tokens)] = code
    return {
        length: [(_picker(places), codes) for places, codes in sorted(sets.items(), key=lambda one: (-len(one[0]), min(one[1].values())))]
        for length, sets in found.items()
    }


def _with_ids(templates: Sequence[str]) -> dict[int, list[tuple[int, list[frozenset[str]]]]]:
    """Number of tokens → templates with HEXADECIMAL, the fewest wildcards first: code, and what each token takes; nothing = anything."""
    found: dict[int, list[tuple[int, list[frozenset[str]]]]] = {}
    for code, template in enumerate(templates, NEW + 1):
        if HEXADECIMAL in template:
            tokens = template.split()
            found.setdefault(len(tokens), []).append((code, [frozenset() if one == WILDCARD else _taken(one) for one in tokens]))
    return {length: sorted(some, key=lambda one: (one[1].count(frozenset()), one[0])) for length, some in found.items()}


def _taken(token: str) -> frozenset[str]:
    """The token itself, and with numbers in place of hexadecimal digits; of many only with all of them."""
    parts = token.split(HEXADECIMAL)
    masks = itertools.product((HEXADECIMAL, NUMBER), repeat=len(parts) - 1) if len(parts) <= MOST_IDS + 1 else [[NUMBER] * (len(parts) - 1)]
    return frozenset({token, *("".join(itertools.chain.from_iterable(zip(parts, [*some, ""], strict=True))) for some in masks)})


def _picker(places: tuple[int, ...]) -> Callable[[list[str]], Any]:
    return itemgetter(*places) if places else _nothing


def _nothing(tokens: list[str]) -> tuple[()]:
    return ()
