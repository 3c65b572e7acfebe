"""Tell which dpjax this is.

    python -m dpjax --version    versions of the packages that compute, commit and device

Exit status: 0 done, 2 wrong arguments.
"""

import sys

from dpjax.training.about import software


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if argv != ["--version"]:
        given = " ".join(argv) or "nothing"
        print(f"error: {given} is given; use --version or --help", file=sys.stderr)
        return 2
    for name, fact in software().items():
        print(f"{name} {fact}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
