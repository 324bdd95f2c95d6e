"""The flags of every benchmark.

--smoke: once and tiny, to see that it runs; numbers mean nothing. --record: keep the result.
"""

import argparse
from collections.abc import Sequence
from typing import Any


def parse(
    parser: argparse.ArgumentParser,
    smoke: dict[str, Any],
    words: Sequence[str] | None = None,
    *,
    kept: bool = True,
) -> argparse.Namespace:
    """Parses the command line (or `words`).

    Args:
      parser: the benchmark's; it gets the flag --smoke, and --record.
      smoke: argument -> its value under --smoke, in place of the default. Arguments that the
        command line gives keep their values.
      words: parsed instead of the command line.
      kept: whether there is a result to keep, and so a flag --record.
    """
    parser.add_argument("--smoke", action="store_true", help="once and tiny: does it run at all?")
    if kept:
        parser.add_argument("--record", action="store_true", help="keep the result for the docs")
    args = parser.parse_args(words)
    # Parsed a second time, with other defaults: so what was given wins over what --smoke sets.
    if args.smoke:
        parser.set_defaults(**smoke)
        args = parser.parse_args(words)
    return args
