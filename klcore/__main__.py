"""`klcore`, or `python -m klcore`: what it is and finds here; `--selftest`: whether it is right; `compare`."""

import argparse
import sys

from klcore.config import show_config


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a promise does not hold, and what `compare` says."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="klcore", description="Print what klcore is and finds here, ready to paste into an issue."
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="also check values, gradients and bits on every device, for a few seconds; exit status 1 if one is wrong",
    )
    commands = parser.add_subparsers(dest="command", metavar="compare")
    compare = commands.add_parser(
        "compare",
        help="two files of logits, one report",
        description="How far a quantised, pruned or ported model is from the original: two files of logits.",
    )
    if "compare" in given:  # what it imports, bug reports can do without
        from klcore.compare.command import add_arguments
        from klcore.compare.command import main as compare_main

        add_arguments(compare)
        parsed = parser.parse_args(given)
        if parsed.command == "compare":
            return compare_main(parsed, ["klcore", *given])
    selftest = parser.parse_args(given).selftest
    print("```text")  # as Markdown wants it
    show_config()
    holds = True
    if selftest:
        from klcore.selftest import run

        print()
        holds = run()
    print("```")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
