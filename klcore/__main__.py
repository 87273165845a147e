"""`python -m klcore`: what klcore is and finds here, for bug reports; `--selftest`: whether it keeps its promises."""

import argparse
import sys

from klcore.config import show_config


def main() -> int:
    """The exit status: 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m klcore", description="Print what klcore is and finds here, ready to paste into an issue."
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="also check values, gradients and bits on every device, for a few seconds; exit status 1 if one is wrong",
    )
    selftest = parser.parse_args().selftest
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
