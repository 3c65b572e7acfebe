"""What only the operator may see: facts of single examples, which no noise covers."""

import sys
from collections.abc import Sequence

ELSEWHERE = (
    "what was counted in the private data (repeated rows, ...) is told on a terminal "
    "only: --config.run.dry_run=True in one shows it"
)


def tell(lines: Sequence[str], *, private: bool) -> None:
    """Print to stderr; what is private only if that is a terminal, and marked as such.

    Anything else is a file, or a pipe into one: it may be kept, shared or published. What
    is said instead does not depend on the data.
    """
    if not private:
        shown = "\n".join(lines)
    elif sys.stderr.isatty():
        shown = "\n".join(f"PRIVATE, not to be published: {line}" for line in lines)
    else:
        shown = ELSEWHERE
    print(shown, file=sys.stderr)
