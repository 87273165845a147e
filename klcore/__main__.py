"""`klcore`, or `python -m klcore`: the configuration; with `--selftest` a check of klcore; and `klcore compare`."""

import argparse
import sys

from klcore.config import show_config


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a check of the self-test fails, or the status of `compare`."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="klcore",
        description="Print the versions, devices and settings that klcore uses, ready to paste into an issue.",
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="also check values, gradients and bits on every device (a few seconds); exit status 1 if a check fails",
    )
    commands = parser.add_subparsers(dest="command", metavar="compare")
    compare = commands.add_parser(
        "compare",
        help="compare the logits of two models",
        description="Report how far a quantised, pruned or ported model is from the original: two files of logits.",
    )
    if "compare" in given:  # a bug report must not depend on these imports
        from klcore.compare.command import add_arguments
        from klcore.compare.command import main as compare_main

        add_arguments(compare)
        parsed = parser.parse_args(given)
        if parsed.command == "compare":
            return compare_main(parsed, ["klcore", *given])
    selftest = parser.parse_args(given).selftest
    print("```text")  # so that it pastes into Markdown
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
