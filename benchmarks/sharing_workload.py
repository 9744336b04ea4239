"""The workloads of `prefix_sharing.py`, `multi_turn.py` and `simulate.py`: who asks what, when.

Groups own a prefix each. A first pass asks every group once; the measured requests then pick groups
round-robin, or with SGLang's zipf probabilities 1 / rank^alpha. Everything comes from a seed, so
that all servers and the simulator see one trace; only the answers are the server's own.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

WORKLOADS = {"round-robin": None, "zipf 0.4": 0.4, "zipf 1.0": 1.0}
"""Exponent by name; None takes turns."""
VOCABULARY = range(1000, 20000)


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens.

    prefix    of a group before its first question
    question  of every request, new each time
    answer    of every request
    turns     of a conversation, which then starts over from the prefix; 0: one question each
    """

    prefix: int
    question: int
    answer: int
    turns: int = 0

    @property
    def group_tokens(self) -> int:
        """The most that a group has that may be asked for again."""
        return self.prefix + self.turns * (self.question + self.answer)


class Source:
    """Where token ids come from: a tokenised text, or chance."""

    def __init__(self, text: Sequence[int] | None, seed: int) -> None:
        self.text = text
        self.rng = random.Random(seed)

    def passages(self, count: int, length: int) -> list[list[int]]:
        """`count` passages of `length` tokens that start at different places of the text."""
        if self.text is None:
            return [self.rng.choices(VOCABULARY, k=length) for _ in range(count)]
        last = len(self.text) - length
        if last < count:
            raise ValueError(f"--text: {count} passages of {length} tokens need a longer text")
        starts = [i * last // count for i in range(count)]
        return [list(self.text[start : start + length]) for start in starts]

    def passage(self, length: int) -> list[int]:
        """One from anywhere."""
        if self.text is None:
            return self.rng.choices(VOCABULARY, k=length)
        start = self.rng.randrange(len(self.text) - length)
        return list(self.text[start : start + length])


def read_text(model: Path, path: Path | None) -> list[int] | None:
    """Token ids of a text file."""
    if path is None:
        return None
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model).encode(
        path.read_text(), add_special_tokens=False
    )
    return ids


@dataclass
class Workload:
    """Requests in order: `first` are asked once and not measured, then `picks`.

    prefixes   token ids by group
    questions  of the first pass, then of the measured requests
    histories  by group, what the next question follows: the prefix and the turns so far
    """

    shape: Shape
    prefixes: list[list[int]]
    first: list[int]
    picks: list[int]
    questions: list[list[int]] = field(repr=False)

    def __post_init__(self) -> None:
        self.histories = [list(prefix) for prefix in self.prefixes]
        self.turns = [0] * len(self.prefixes)

    @classmethod
    def build(
        cls, name: str, shape: Shape, working_tokens: int, least: int, source: Source
    ) -> Workload:
        """
        working_tokens  that all groups have together, at their longest
        least           measured requests, if the groups do not make more
        """
        groups = max(2, round(working_tokens / shape.group_tokens))
        count = max(least, groups * (shape.turns - 1 if shape.turns else 1))
        rng = source.rng
        ranked = rng.sample(range(groups), groups)  # by popularity
        alpha = WORKLOADS[name]
        if alpha is None:
            picks = [i % groups for i in range(count)]
        else:
            picks = rng.choices(ranked, zipf_weights(groups, alpha), k=count)
        prefixes = source.passages(groups, shape.prefix)
        questions = [source.passage(shape.question) for _ in range(groups + count)]
        return cls(shape, prefixes, list(range(groups)), picks, questions)

    @property
    def order(self) -> list[int]:
        """The group of every request."""
        return self.first + self.picks

    def prompt(self, number: int) -> list[int]:
        """Token ids of request `number`; with turns only once the group's last was answered."""
        return self.histories[self.order[number]] + self.questions[number]

    def answered(self, number: int, prompt: list[int], answer: Iterable[int]) -> None:
        """With turns, the group goes on from here, or after its last turn from the prefix."""
        if not self.shape.turns:
            return
        group = self.order[number]
        self.turns[group] = (self.turns[group] + 1) % self.shape.turns
        self.histories[group] = (
            [*prompt, *answer] if self.turns[group] else list(self.prefixes[group])
        )


def zipf_weights(groups: int, alpha: float) -> list[float]:
    """Weights by rank, as sglang.benchmark.datasets.generated_shared_prefix has them."""
    return [rank**-alpha for rank in range(1, groups + 1)]


class Limitless:
    """How many tokens of a prompt a cache would serve that never forgets.

    page_size  1 counts every token; a server's own counts what whole pages can hold
    """

    def __init__(self, page_size: int) -> None:
        self.tree = RadixCache.create_simulated(page_size=page_size)

    def serve(self, prompt: list[int], answer: list[int]) -> int:
        """The hit of a request, whose tokens and answer are known afterwards."""
        key = RadixKey(array("q", prompt[:-1]), None)  # a server computes at least one token
        hit = len(self.tree.match_prefix(MatchPrefixParams(key=key)).device_indices)
        self.tree.insert(InsertParams(key=RadixKey(array("q", [*prompt, *answer]), None)))
        return hit
