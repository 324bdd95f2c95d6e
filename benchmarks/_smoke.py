"""Every benchmark knows --smoke: once and tiny, to see that it runs; its numbers mean nothing."""

import argparse
from collections.abc import Sequence
from typing import Any


def parse(
    parser: argparse.ArgumentParser, smoke: dict[str, Any], words: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parses the command line (or `words`).

    Args:
      parser: of the benchmark; gets a flag --smoke.
      smoke: argument -> its value under --smoke, in place of the default. What the command line
        names itself stays.
      words: instead of the command line's.
    """
    parser.add_argument("--smoke", action="store_true", help="once and tiny: does it run at all?")
    args = parser.parse_args(words)
    if args.smoke:
        parser.set_defaults(**smoke)
        args = parser.parse_args(words)
    return args
