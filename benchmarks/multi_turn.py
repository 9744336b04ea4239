"""Conversations that grow turn by turn: whose history is still cached when it is their turn?

usage: python benchmarks/multi_turn.py [--model DIR] [--text FILE] [--pool-tokens 8192]
       [--servers spherical bf16] [--working-sets 0.5 1 2 4 8] [--json OUT] [--plot OUT.png]
       [-- FLAGS of every server]

Every group has one conversation at a time, which starts over from the group's prefix after its last
turn. The working set is what all hold at their longest; the first pass is their first turn.
"""

from __future__ import annotations

from sharing_run import main
from sharing_workload import Shape

if __name__ == "__main__":
    main(
        "multi-turn",
        __doc__,
        lambda args: Shape(args.first_tokens, args.question_tokens, args.answer_tokens, args.turns),
        {"first-tokens": 640, "question-tokens": 88, "answer-tokens": 8, "turns": 4},
    )
