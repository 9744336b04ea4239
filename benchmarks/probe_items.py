"""Haystacks of real prose with things to find in them, in RULER's manner (arXiv 2404.06654).

Four kinds of item, asked as a completion, which a small model answers far better than a chat:

* `single`    a needle whose form stands once in the haystack;
* `multikey`  a needle among others of the same form, told apart by a name;
* `quote`     a sentence of the prose itself, begun by the question, to be continued word for word;
* `trace`     VAR A = 12345, VAR B = VAR A, ...: the value of a later variable of the one chain.

Everything follows from the text and one seed. What is asked lies behind the first page, which holds
the sinks, and before the newest tokens: a cache may keep both at full precision.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

KINDS = ("single", "multikey", "quote", "trace")
MOST_PER_KIND = 4  # questions of one kind that a haystack has room for
QUESTION_TOKENS = 128  # of a length, kept for a question and its answer
SINK_TOKENS = 64  # nothing asked begins before them: the largest page
NEWEST_TOKENS = 256 + 64  # nothing asked ends in them: what stays hot, and a page cut by it
SLACK_TOKENS = 128  # how far a sentence and needles beside it may push a needle to the right
PIECE_WORDS = 60  # longer sentences are cut
QUOTE_WORDS = 12  # of the sentence, given by the question
CONTINUED_WORDS = 8  # of the sentence, asked for
KEYS = 4  # needles of multikey's form
CHAIN = 5  # variables of trace

PLAIN_WORD = re.compile(r"[A-Za-z'-]+[,.;:?!]?")
SENTENCE_END = re.compile(r"(?<=[.?!]) +(?=[A-Z_\"'(\[])")
ADJECTIVES = ("amber", "brave", "crimson", "distant", "gentle", "hollow", "quiet", "wandering")
NOUNS = ("compass", "falcon", "harbour", "lantern", "meadow", "orchard", "teapot", "violin")
NAMES = (
    *("Abbott", "Baxter", "Carver", "Dalton", "Fletcher", "Granger", "Hooper", "Jarvis"),
    *("Keating", "Lambert", "Mercer", "Norwood", "Porter", "Quincy", "Sawyer", "Whitlock"),
)
SINGLE_FORMS = (  # the question is what stands before the value
    "The access code of the {key} vault is {value}.",
    "The serial number engraved on the {key} clock is {value}.",
    "The special magic number for {key} is: {value}.",
    "The {key} archive has the shelf mark {value}.",
)
MULTIKEY_FORM = "The telephone number of Mrs. {key} is {value}."

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Item:
    """One thing to find."""

    kind: str
    length: int  # tokens of context: haystack, question and answer
    depth: float  # where in the haystack it stands, from 0 to 1
    question: str
    expected: str


@dataclass(frozen=True)
class Haystack:
    """Token ids of prose with needles in it, `QUESTION_TOKENS` shorter than its length."""

    tokens: list[int]
    items: list[Item]


@dataclass(frozen=True)
class Needle:
    """A sentence to put in. `question` None: a distractor, or a link of a chain."""

    kind: str
    sentence: str
    question: str | None = None
    expected: str = ""


@dataclass(frozen=True)
class Prose:
    """A text in pieces of at most `PIECE_WORDS` words, with the token ids of each."""

    pieces: list[str]
    ids: list[list[int]]

    @classmethod
    def read(cls, text: str, encode: Encode) -> Prose:
        pieces = list(_pieces(text))
        return cls(pieces, [encode(f" {piece}") for piece in pieces])

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    def split(self, tail_tokens: int) -> tuple[Prose, list[int]]:
        """Everything but the last `tail_tokens`, and these. Cut pieces are in neither."""
        count, tail = len(self.ids), list[int]()
        while count and len(tail) < tail_tokens:
            count -= 1
            tail = self.ids[count] + tail
        return Prose(self.pieces[:count], self.ids[:count]), tail[len(tail) - tail_tokens :]


def _pieces(text: str) -> Iterator[str]:
    for sentence in SENTENCE_END.split(" ".join(text.split())):
        words = sentence.split()
        for start in range(0, len(words), PIECE_WORDS):
            yield " ".join(words[start : start + PIECE_WORDS])


def make_haystacks(
    prose: Prose,
    encode: Encode,
    kinds: Sequence[str],
    length: int,
    groups: Sequence[int],
    seed: int,
) -> list[Haystack]:
    """Haystacks of `length` tokens, the n-th with `groups[n]` items, their kinds in turn.

    Raises ValueError when the prose is too short, or a haystack too full.
    """
    if prose.tokens < length:
        raise ValueError(f"{prose.tokens:,} tokens of prose: expected {length:,} or more")
    haystacks, first = [], 0
    for number, count in enumerate(groups):
        rng = random.Random(f"{seed} {length} {number}")
        asked = [kinds[(first + i) % len(kinds)] for i in range(count)]
        haystacks.append(_haystack(prose, encode, asked, length, rng))
        first += count
    return haystacks


def found(item: Item, answer: str) -> bool:
    """Whether an answer holds the number, or begins with the words, word for word."""
    if item.kind == "quote":  # whose mark the answer may close at once
        return answer.replace('"', " ").split()[:CONTINUED_WORDS] == item.expected.split()
    return re.search(rf"(?<!\d){item.expected}(?!\d)", answer) is not None


def _haystack(
    prose: Prose, encode: Encode, asked: Sequence[str], length: int, rng: random.Random
) -> Haystack:
    size = length - QUESTION_TOKENS
    quotes = asked.count("quote")
    needles = _needles({kind: asked.count(kind) for kind in KINDS}, rng)
    count = len(needles) + quotes
    slots = [(i + rng.random()) / count for i in range(count)]
    rng.shuffle(slots)
    placed = _in_order(list(zip(slots[quotes:], needles)))
    tokens, at, filler = _lay_out(_passage(prose, size, rng), placed, encode, size)
    items = [
        Item(n.kind, length, round(start / size, 3), n.question, n.expected)
        for start, (_, n) in zip(at, placed)
        if n.question is not None
    ]
    for slot in slots[:quotes]:
        start, piece = _take_quotable(filler, slot, size)
        words = piece.split()
        question = f'The text says: "{" ".join(words[:QUOTE_WORDS])}'
        expected = " ".join(words[QUOTE_WORDS : QUOTE_WORDS + CONTINUED_WORDS])
        items.append(Item("quote", length, round(start / size, 3), question, expected))
    return Haystack(tokens, items)


def _needles(counts: dict[str, int], rng: random.Random) -> list[Needle]:
    """The sentences that so many items of each kind need, distractors included."""
    return [
        *_singles(counts["single"], rng),
        *(_multikey(counts["multikey"], rng) if counts["multikey"] else ()),
        *(_chain(counts["trace"], rng) if counts["trace"] else ()),
    ]


def _number(digits: int, rng: random.Random) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _fact(kind: str, form: str, key: str, value: str, asked: bool = True) -> Needle:
    question = form.partition(" {value}")[0].format(key=key)
    sentence = form.format(key=key, value=value)
    return Needle(kind, sentence, question if asked else None, value)


def _singles(count: int, rng: random.Random) -> list[Needle]:
    return [
        _fact("single", form, f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}", _number(7, rng))
        for form in rng.sample(SINGLE_FORMS, count)
    ]


def _multikey(count: int, rng: random.Random) -> list[Needle]:
    return [
        _fact("multikey", MULTIKEY_FORM, name, _number(7, rng), i < count)
        for i, name in enumerate(rng.sample(NAMES, KEYS))
    ]


def _chain(count: int, rng: random.Random) -> list[Needle]:
    """One chain; asked are `count` of its later variables."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < CHAIN:
        name = "".join(rng.choices(letters, k=3))
        names += [name] if name not in names else []
    value = _number(5, rng)
    asked = rng.sample(names[1:], count)
    return [
        Needle(
            "trace",
            f"VAR {name} = {value if i == 0 else f'VAR {names[i - 1]}'}.",
            f"The value of VAR {name} is" if name in asked else None,
            value,
        )
        for i, name in enumerate(names)
    ]


def _in_order(placed: list[tuple[float, Needle]]) -> list[tuple[float, Needle]]:
    """Needles by slot, with the links of a chain in their own order."""
    links = iter([needle for _, needle in placed if needle.kind == "trace"])
    ordered = sorted(placed, key=lambda pair: pair[0])
    return [(s, next(links) if needle.kind == "trace" else needle) for s, needle in ordered]


def _passage(prose: Prose, size: int, rng: random.Random) -> Iterator[tuple[str, list[int]]]:
    """Consecutive pieces from anywhere in the prose; after its end it begins again."""
    start = rng.randrange(len(prose.pieces))
    for i in range(len(prose.pieces)):
        at = (start + i) % len(prose.pieces)
        yield prose.pieces[at], prose.ids[at]


def _target(slot: float, size: int) -> int:
    """The token at which something at `slot`, from 0 to 1, is to begin."""
    return SINK_TOKENS + int(slot * (size - NEWEST_TOKENS - SLACK_TOKENS - SINK_TOKENS))


def _lay_out(
    passage: Iterator[tuple[str, list[int]]],
    placed: Sequence[tuple[float, Needle]],
    encode: Encode,
    size: int,
) -> tuple[list[int], list[int], list[tuple[int, str]]]:
    """The haystack's token ids, where each needle begins, and where each piece of prose does."""
    tokens, at, filler = list[int](), list[int](), list[tuple[int, str]]()
    while len(tokens) < size:
        if len(at) < len(placed) and _target(placed[len(at)][0], size) <= len(tokens):
            at.append(len(tokens))
            tokens += encode(f" {placed[len(at) - 1][1].sentence}")
            if len(tokens) > size - NEWEST_TOKENS:
                raise ValueError(f"{len(placed)} needles do not fit a haystack of {size} tokens")
        else:
            piece, ids = next(passage)
            filler.append((len(tokens), piece))
            tokens += ids
    return tokens[:size], at, filler


def _quotable(piece: str) -> bool:
    """Whether a piece is long enough, and prose: tables and formulas are not."""
    words = piece.split()[: QUOTE_WORDS + CONTINUED_WORDS]
    plain = all(PLAIN_WORD.fullmatch(word) for word in words)
    return plain and len(words) == QUOTE_WORDS + CONTINUED_WORDS


def _take_quotable(filler: list[tuple[int, str]], slot: float, size: int) -> tuple[int, str]:
    """Removes from `filler` the piece nearest to `slot` that can be quoted, and returns it."""
    beginnings = [" ".join(piece.split()[:QUOTE_WORDS]) for _, piece in filler]
    target = _target(slot, size)
    candidates = [
        (abs(start - target), i)
        for i, (start, piece) in enumerate(filler[:-1])
        if start >= SINK_TOKENS
        and filler[i + 1][0] <= size - NEWEST_TOKENS
        and _quotable(piece)
        and beginnings.count(beginnings[i]) == 1
    ]
    if not candidates:
        raise ValueError(f"no {QUOTE_WORDS + CONTINUED_WORDS} plain words to quote in a haystack")
    return filler.pop(min(candidates)[1])
