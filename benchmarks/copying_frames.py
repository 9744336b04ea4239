"""A calibration file whose distortions count copying from far back as much as prose.

usage: python benchmarks/copying_frames.py --model DIR --text FILE --frames FILE --out FILE
       [--windows 6] [--weight 1.0] [--repeated] [--device cpu]

Windows of 2,048 tokens. *Answers*: facts in prose of the text, then questions for them and passages
of it again, in other words than those that `probe_items.py` asks in. *Repeated*: sentences, and
then the same ones in another order. Gradients are those of the log odds of the copied tokens, where
the model is right: of its margin. Gradients of its predictions, as `calibrate` takes them, all but
vanish where it is sure, as it is when it copies. Odds have random signs, so that squares of
gradients add up, and not the gradients.

Written are the file's frames, and its distortions plus `--weight` times those of copying, both as
shares of what they sum up to at cold, all heads alike.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import probe_items
import torch
from probe_items import Encode, Prose
from probes import load_encode
from tqdm import tqdm

from sglang_spherical import frame_file
from sglang_spherical.evaluation import gradients, inputs
from sglang_spherical.frame_file import CHOICES
from sglang_spherical.pool.frames import Frames
from spherical_kernels.codec.patterns import FrameKind, Pattern

SEED = 5
FACTS = 16
ASKED_TOKENS = 640  # of a window, for questions and passages
GIVEN_TOKENS = 8  # of a passage, before it counts as copied
COLD = (Pattern(FrameKind.CALIBRATED, (4, 2, 2, 2)), Pattern(FrameKind.CALIBRATED, (2, 2, 2, 2)))
LEADS = (
    "As was said above,",
    "It is written in the same place:",
    "We read before that",
    "To repeat the passage:",
    "In his own words:",
)
FORMS = (
    ("The ship {a} left {b} with {v} barrels on board.", "When the ship {a} left {b}, it had"),
    ("In the year of the {a}, the town of {b} counted {v} souls.", "In that year {b} counted"),
    ("The {a} in the cabinet of Doctor {b} weighs {v} grains.", "The {a} of Doctor {b} weighs"),
    ("A letter to {b} about the {a} was filed under {v}.", "The letter to {b} is filed under"),
    ("The lodger {b} keeps {a}s in room {v}.", "Where does {b} keep {a}s? In room"),
    ("Brother {b} paid {v} shillings for the {a}.", "For the {a}, in shillings, {b} paid"),
)
THINGS = (
    *("comet", "sextant", "walnut", "sparrow", "ribbon", "barometer", "chestnut", "saddle"),
    *("mirror", "kettle", "thimble", "anchor", "cello", "turnip", "candle", "ladder"),
)
NAMES = (
    *("Bristol", "Umberto", "Leyden", "Rosalind", "Padua", "Tobias", "Ghent", "Wilhelm"),
    *("Cordoba", "Agnes", "Trieste", "Ludwig", "Oporto", "Beatrix", "Zurich", "Casimir"),
)


@dataclass(frozen=True)
class Window:
    """Token ids, and of each whether it is copied from far back."""

    ids: list[int]
    copied: list[bool]


class Writer:
    """A window that grows."""

    def __init__(self, prose: Prose, encode: Encode, rng: random.Random) -> None:
        self.prose, self.encode, self.rng = prose, encode, rng
        self.at = rng.randrange(len(prose.ids))
        self.ids: list[int] = []
        self.copied: list[bool] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: list[int], given: int | None = None) -> None:
        """Tokens, of which all behind the first `given` are copied; None: none of them."""
        self.ids += ids
        given = len(ids) if given is None else min(given, len(ids))
        self.copied += [False] * given + [True] * (len(ids) - given)

    def read_on(self) -> str:
        """Adds the text's next piece and returns it."""
        piece, ids = self.prose.pieces[self.at], self.prose.ids[self.at]
        self.at = (self.at + 1) % len(self.prose.ids)
        self.add(ids)
        return piece

    def repeat(self, piece: str) -> None:
        self.add(self.encode(f"\n\n{self.rng.choice(LEADS)}"))
        self.add(self.encode(f" {piece}"), GIVEN_TOKENS)

    def window(self) -> Window:
        size = inputs.WINDOW_TOKENS
        return Window(self.ids[:size], self.copied[:size])


def repeated(writer: Writer) -> Window:
    """Half of a window, and its pieces in another order."""
    pieces = list[str]()
    while len(writer) < inputs.WINDOW_TOKENS // 2:
        pieces.append(writer.read_on())
    while len(writer) < inputs.WINDOW_TOKENS:
        writer.rng.shuffle(pieces)
        for piece in pieces:
            writer.repeat(piece)
    return writer.window()


def _facts(rng: random.Random) -> list[tuple[str, str, str]]:
    """(sentence, question, answer)s of four forms, so that several differ in their words alone."""
    found, some = [], rng.sample(FORMS, 4)
    names = zip(rng.sample(THINGS, FACTS), rng.sample(NAMES, FACTS))
    for number, (thing, name) in enumerate(names):
        value = str(rng.randrange(10**4, 10**7))
        words = {"a": thing, "b": name, "v": value}
        sentence, question = some[number % len(some)]
        found.append((sentence.format(**words), question.format(**words), value))
    return found


def answers(writer: Writer) -> Window:
    """Prose with facts in it, then questions for them, every third one a passage instead."""
    rng, room = writer.rng, inputs.WINDOW_TOKENS - ASKED_TOKENS
    facts, pieces = _facts(rng), list[str]()
    for number, (sentence, _, _) in enumerate(facts):
        while len(writer) < (number + rng.random()) / FACTS * room:
            pieces.append(writer.read_on())
        writer.add(writer.encode(f" {sentence}"))
    rng.shuffle(facts)
    number = 0
    while len(writer) < inputs.WINDOW_TOKENS:
        if number % 3 == 2:
            writer.repeat(rng.choice(pieces))
        else:
            _, question, value = facts[(number - number // 3) % len(facts)]
            writer.add(writer.encode(f"\n\n{question}"))
            writer.add(writer.encode(f" {value}"), 0)
        number += 1
    return writer.window()


class CopiedOdds(gradients.Gradients):
    """Gradients of the log odds of copied tokens, where the model is right.

    copied  of every window, in order
    """

    def __init__(self, page_size: int, copied: Sequence[list[bool]]) -> None:
        super().__init__(page_size)
        self.copied: Iterator[list[bool]] = iter(copied)

    def pull(self, model: Any, ids: torch.Tensor, generator: torch.Generator) -> None:
        """See `Gradients.pull`."""
        self.seen.clear()
        rows = model.get_input_embeddings()(ids.unsqueeze(0)).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=rows, use_cache=False).last_hidden_state[0]
        at = torch.tensor(next(self.copied))[1:].nonzero().squeeze(1)
        logits, true = model.lm_head(hidden[at]).float(), ids[at + 1]
        right = logits.argmax(-1) == true
        logits, place = logits[right], true[right].unsqueeze(1)
        others = logits.scatter(1, place, -torch.inf).logsumexp(-1)
        odds = logits.gather(1, place).squeeze(1) - others
        signs = torch.randint(2, odds.shape, generator=generator, device=odds.device) * 2 - 1
        (odds * signs).sum().backward()


def share(distortion: torch.Tensor) -> torch.Tensor:
    """Distortions [2, layers, kv_heads, choices] over their sum at cold, all heads alike."""
    places = (side.index(pattern) for side, pattern in zip(CHOICES, COLD))
    return distortion / sum(x[..., place].sum() for x, place in zip(distortion, places))


def make_windows(
    write: Callable[[Writer], Window], prose: Prose, encode: Encode, count: int
) -> list[Window]:
    return [write(Writer(prose, encode, random.Random(f"{SEED} {n}"))) for n in range(count)]


def run(args: argparse.Namespace) -> None:
    identity = frame_file.model_identity(args.model)
    known = frame_file.load(args.frames, identity)
    if known.distortion is None:
        raise ValueError(f"--frames {args.frames}: without distortions there are none to add to")
    encode = load_encode(args.model)
    prose = probe_items.Prose.read(args.text.read_text("utf-8", errors="replace"), encode)
    write = repeated if args.repeated else answers
    windows = make_windows(write, prose, encode, args.windows)
    model = inputs.load_model(args.model, "float32", args.device)
    frames = Frames(*inputs.cache_shape(model), known.page_size, args.device)
    frames.load(known.centre, known.gain, known.spread)
    odds = CopiedOdds(frames.page_size, [window.copied for window in windows])
    ids = tqdm([torch.tensor(window.ids) for window in windows], unit="window")
    found = gradients.distortion(model, gradients.Coder(frames), ids, odds)
    mixed = share(known.distortion.double()) + args.weight * share(found.cpu())
    frame_file.save(args.out, replace(known, distortion=mixed.float()), identity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="prose for the windows, UTF-8")
    parser.add_argument("--frames", type=Path, required=True, help="calibration file")
    parser.add_argument("--out", type=Path, required=True, help="calibration file to write")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--weight", type=float, default=1.0, help="of copying (default: 1)")
    parser.add_argument("--repeated", action="store_true", help="repeated sentences, not answers")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    try:
        with inputs.usable_device(args.device):
            run(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
