"""What it costs to read pages at a level: the mean KL divergence of next-token predictions from the
dense model's, in nat, when all but the newest page of a prefix are read at that level.

Measured on SmolLM2-135M-Instruct in float32 over 4 windows of 2,048 tokens of Newton's Opticks,
pages going down from one level to the next:

    python -m sglang_spherical evaluate --model DIR --text opticks.txt --windows 4
        --tiers hot,warm,cool,cold,frozen --alike --json OUT.json

(`benchmarks/results/ladder_smollm2.json`; for other bits, levels of those bits in place of these).
One table serves all models: the policy reads ratios, and the model's own would have to be measured
on text like its users'.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_spherical.pool.layout import Level

FINEST_HOT = ("8", "8")

MEASURED = {  # by patterns of keys and values
    FINEST_HOT: 0.00017,
    ("4", "4"): 0.0474,
    ("6-4-4-2", "4-4-4-4"): 0.00258,
    ("6-4-4-2", "4-4-2-2"): 0.0075,
    ("4-4-2-2", "4-4-2-2"): 0.0157,
    ("4-2-2-2", "4-4-2-2"): 0.0324,
    ("4-2-2-2", "2-2-2-2"): 0.0497,
    ("4-2-1-1", "2-2-2-2"): 0.0847,
}

DROPPED = 1.0
"""Of a page that is not there: it is computed again, without error, and that time is priced at 1
nat, many times what the coarsest level costs. So of nodes worth the same none is dropped before all
are at the last level, and one that is worth much less goes before the others get there."""


def distortions(levels: Sequence[Level]) -> list[float]:
    """Of every level, finest first.

    Pages of all lower levels have been hot before: what hot loses beyond 8 bits, they lose too.
    """
    hot, *lower = (MEASURED[level.keys.name, level.values.name] for level in levels)
    lost = hot - MEASURED[FINEST_HOT]
    return [hot, *(lost + distortion for distortion in lower)]
