"""The answers of `probes.py`: whom to ask what, what is kept of an interrupted run, the sums."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import probe_items
from probe_items import KINDS, Encode, Haystack, Item

DENSE = "dense"
ALL = "all"

Counts = dict[str, int]
Summary = dict[str, dict[str, Counts]]


@dataclass
class Probe:
    """An item and what the servers said to it."""

    item: Item
    answers: dict[str, str] = field(default_factory=dict)  # by server

    @property
    def found(self) -> dict[str, bool]:
        return {name: probe_items.found(self.item, text) for name, text in self.answers.items()}

    def pending(self, server: str) -> bool:
        """Whether a server is still to be asked: a tier's, only for what the dense one found."""
        wanted = server == DENSE or self.found.get(DENSE, False)
        return wanted and server not in self.answers


@dataclass
class Run:
    """All probes of a command line, and where their answers are kept."""

    settings: dict[str, object]
    encode: Encode
    tail: list[int]  # token ids that are in no haystack
    haystacks: list[Haystack]
    partial: Path | None  # None keeps nothing

    def __post_init__(self) -> None:
        self.by_haystack = [[Probe(item) for item in hay.items] for hay in self.haystacks]

    @property
    def probes(self) -> list[Probe]:
        return [probe for probes in self.by_haystack for probe in probes]

    def pending(self, server: str) -> Iterator[tuple[Haystack, list[Probe]]]:
        """Haystacks with what a server is still to be asked over them, if there is anything."""
        for haystack, probes in zip(self.haystacks, self.by_haystack):
            asked = [probe for probe in probes if probe.pending(server)]
            if asked:
                yield haystack, asked

    def resume(self) -> int:
        """Takes over the answers of an interrupted run and says how many there are.

        Raises ValueError when other things were asked in it.
        """
        if self.partial is None or not self.partial.exists():
            return 0
        kept = json.loads(self.partial.read_text())
        now = self._state()
        if any(kept[key] != now[key] for key in ("settings", "items")):
            raise ValueError(f"--json: {self.partial} is of another run: move it away")
        for probe, answers in zip(self.probes, kept["answers"]):
            probe.answers = answers
        return sum(len(probe.answers) for probe in self.probes)

    def keep(self) -> None:
        """Writes all answers so far, at once or not at all."""
        if self.partial is None:
            return
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.partial.with_name(self.partial.name + ".writing")
        scratch.write_text(json.dumps(self._state()))
        scratch.replace(self.partial)

    def _state(self) -> dict[str, object]:
        return {
            "settings": self.settings,
            "items": [asdict(probe.item) for probe in self.probes],
            "answers": [probe.answers for probe in self.probes],
        }

    def results(self) -> list[dict[str, object]]:
        """Every item with its answers, for the JSON."""
        return [
            {**asdict(probe.item), "answers": probe.answers, "found": probe.found}
            for probe in self.probes
        ]


def count(probes: Sequence[Probe], tiers: Sequence[str]) -> Counts:
    """How many were asked, how many the dense server found, how many of these each tier found."""
    asked = [probe.found for probe in probes if DENSE in probe.answers]
    found = [by_server for by_server in asked if by_server[DENSE]]
    kept = {tier: sum(by_server.get(tier, False) for by_server in found) for tier in tiers}
    return {"asked": len(asked), DENSE: len(found), **kept}


def summarise(probes: Sequence[Probe], tiers: Sequence[str]) -> Summary:
    """`count` by kind and by length, and under `ALL` over either or both."""
    kinds = [kind for kind in KINDS if any(probe.item.kind == kind for probe in probes)]
    lengths = sorted({probe.item.length for probe in probes})
    return {
        kind: {
            str(length): count(
                [
                    probe
                    for probe in probes
                    if kind in (ALL, probe.item.kind) and length in (ALL, probe.item.length)
                ],
                tiers,
            )
            for length in (*lengths, ALL)
        }
        for kind in (*kinds, ALL)
    }


def table(summary: Summary, tiers: Sequence[str]) -> str:
    """Of what was asked, what the dense server found; of this, what each tier found."""
    lines = [f"{'kind':<9}{'tokens':>7}{'dense':>9}" + "".join(f"{tier:>9}" for tier in tiers)]
    for kind, lengths in summary.items():
        for length, row in lengths.items():
            cells = [f"{row[DENSE]}/{row['asked']}", *(f"{row[t]}/{row[DENSE]}" for t in tiers)]
            lines.append(f"{kind:<9}{length:>7}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)
