"""A log line → the code of its template and its numbers. Matched, never mined: what a model knows was fixed when it was trained.

    line      "2026-11-26T08:00:00Z web-1 Took 12.5 ms for /a?id=77 of 10.0.0.7:4711"
    message   "Took 12.5 ms for /a?id=77 of 10.0.0.7:4711"           the header is cut off, and what follows the first line
    words     Took · 12.5 · ms · for · /a?id=77 · of · 10.0.0.7:4711
    masked    Took <NUM> ms for /a?id=<NUM> of <IP>                  each word by itself
    template  Took <NUM> ms for <*> of <IP>                          as many tokens, each the same one or a wildcard
    numbers   12.5                                                   what <NUM> stands for in the template, in order

Of several templates that match, one with the fewest wildcards is taken, always the same one. Pure, and deterministic: it depends
on `Lines` and the line alone. Words that were seen are known, and so are masked lines; both memories are bounded.

Masks run in Python's own engine where they are those below, which take linear time there on any input, and in RE2 where they are
others': an expression that someone wrote must not stand still on what someone else sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import re2
from numpy.typing import NDArray

from service.artifact import NEW, NUMBER, NUMBERS, WILDCARD, Lines, Mask

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
MOST_NUMBERS = len(NUMBERS)
FLOAT32_MAX = float(np.finfo(np.float32).max)

_UNCAPTURED = re2.Options()
_UNCAPTURED.never_capture = True
_SHAPE = str.maketrans("123456789", "000000000")

Made = TypeVar("Made")
Pick = tuple[int, slice | None, int]
"""A number of a line: its word, and where it is in the word; None = it is not alone there, but the n-th of several masked parts."""


class Matched(NamedTuple):
    """What a masked line is."""

    code: int
    picks: tuple[Pick, ...]


_UNKNOWN = Matched(NEW, ())
_PADDING = [[math.nan] * missing for missing in range(MOST_NUMBERS, -1, -1)]


class Matcher:
    """Lines → codes, by the templates of one model. Not for two threads at once."""

    def __init__(self, lines: Lines) -> None:
        self.splitter = Splitter(lines.header, lines.masks, lines.delimiters)
        self._index = _index(lines.templates)
        self._templates = [template.split() for template in lines.templates]
        self._known = _Memory(self._matched, KNOWN, KNOWN_LENGTH)
        self._numbers = _Memory(self._numbers_of, NUMBERED, WORD_LENGTH)

    def codes(self, messages: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """[N] codes, NEW where no template matches, and [N, 4] the first numbers of each line, NaN = none."""
        codes: list[int] = []
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
        return self._known[masked].code

    def _matched(self, masked: str) -> Matched:
        """The masked words of a line, one a line → what it is."""
        tokens = masked.split()
        for literals, codes in self._index.get(len(tokens), ()):
            code = codes.get(literals(tokens))
            if code is not None:
                return Matched(code, self._picks(masked, self._templates[code - 1]))
        return _UNKNOWN

    def _picks(self, masked: str, template: list[str]) -> tuple[Pick, ...]:
        """Where the numbers of a line are that its template knows as such."""
        picks: list[Pick] = []
        tokens = iter(template)
        for i, word in enumerate(masked.split("\n")):
            nth, where = 0, _only(word)
            for token, known in zip(word.split(), tokens, strict=False):
                picks += [(i, where, nth + k) for k in range(known.count(NUMBER))]
                nth += token.count(NUMBER)
        return tuple(picks[:MOST_NUMBERS])

    def _number(self, word: str, where: slice | None, nth: int) -> float:
        if where is not None:
            return _float32(word[where])
        numbers = self._numbers[word]
        return numbers[nth] if nth < len(numbers) else math.nan  # a line may hold "<NUM>" as it stands

    def _numbers_of(self, word: str) -> list[float]:
        return list(map(_float32, self.splitter.numbers(word)))


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

    def numbers(self, word: str) -> list[str]:
        """What was replaced by NUMBER in this word, in order."""
        return self._mask.numbers(word)

    def _masked(self, word: str) -> str:
        masked = self._mask.masked(word)
        return masked.translate(self._delimiters) if self._delimiters else masked


class _Masking:
    """All masks as one expression of alternatives, a group for each.

    A word in which no mask of others is found is one for the default ones alone. To these all digits are alike, but for the 0 of 0x, so
    that words of one shape are masked alike: most words that were never seen have a shape that was.
    """

    def __init__(self, masks: Sequence[Mask]) -> None:
        ours = frozenset(mask.pattern for mask in DEFAULT_MASKS)
        others = [mask for mask in masks if mask.pattern not in ours]
        self._others = re2.compile(_either(others)) if others else None
        self._ours = _Ours([mask for mask in masks if mask.pattern in ours])
        self._all = _Everyones(masks)
        self._shapes = _Memory(self._ours.masked, SHAPES, WORD_LENGTH)

    def masked(self, word: str) -> str:
        if self._others is not None and self._others.search(word) is not None:
            return self._all.masked(word)
        if "x" in word or "X" in word:
            return self._ours.masked(word)
        return self._shapes[word.translate(_SHAPE)]

    def numbers(self, word: str) -> list[str]:
        """What was replaced by NUMBER, in order."""
        for_others = self._others is not None and self._others.search(word) is not None
        return self._all.numbers(word) if for_others else self._ours.numbers(word)


class _Ours:
    """Of the default masks, in Python's engine; they have no groups of their own."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._expression = re.compile(_either(masks), re.ASCII) if masks else None
        self._replacements = ["", *(mask.replacement for mask in masks)]

    def masked(self, word: str) -> str:
        return word if self._expression is None else self._expression.sub(self._replacement, word)

    def numbers(self, word: str) -> list[str]:
        found = self._expression.finditer(word) if self._expression is not None else ()
        return [one.group() for one in found if self._replacement(one) == NUMBER]

    def _replacement(self, found: re.Match[str]) -> str:
        return self._replacements[found.lastindex or 0]


class _Everyones:
    """Of any masks, in RE2."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._expression = re2.compile(_either(masks))
        groups = np.cumsum([1, *(re2.compile(mask.pattern).groups + 1 for mask in masks)])[:-1].tolist()
        self._replacements = [(group, mask.replacement) for group, mask in zip(groups, masks, strict=True)]

    def masked(self, word: str) -> str:
        return str(self._expression.sub(self._replacement, word))

    def numbers(self, word: str) -> list[str]:
        return [one.group() for one in self._expression.finditer(word) if self._replacement(one) == NUMBER]

    def _replacement(self, found: Any) -> str:
        return next(replacement for group, replacement in self._replacements if found.start(group) >= 0)


def _either(masks: Sequence[Mask]) -> str:
    return "|".join(f"({mask.pattern})" for mask in masks)


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


def _picker(places: tuple[int, ...]) -> Callable[[list[str]], Any]:
    return itemgetter(*places) if places else _nothing


def _nothing(tokens: list[str]) -> tuple[()]:
    return ()
