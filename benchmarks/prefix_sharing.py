"""Long shared prefixes, short questions: what stays cached when the prefixes outgrow the memory?

usage: python benchmarks/prefix_sharing.py [--model DIR] [--text FILE] [--pool-tokens 8192]
       [--servers spherical bf16] [--working-sets 0.5 1 2 4 8] [--json OUT] [--plot OUT.png]
       [-- FLAGS of every server]
"""

from __future__ import annotations

from sharing_run import main
from sharing_workload import Shape

if __name__ == "__main__":
    main(
        "prefix-sharing",
        __doc__,
        lambda args: Shape(args.prefix_tokens, args.question_tokens, args.answer_tokens),
        {"prefix-tokens": 1024, "question-tokens": 80, "answer-tokens": 8},
    )
