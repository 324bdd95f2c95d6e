"""What all commands share: the config flag, and mistakes as one readable message."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

# TensorFlow's C++ start-up notices drown our own; errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vit_dist import config as config_lib

USAGE_ERROR = 2  # exit code of a user's mistake, as in GNU tools and argparse
_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def define_config() -> None:
    """Defines --config FILE[:arg] and --config.key=value."""
    config_flags.DEFINE_config_file("config", None, "config file, e.g. configs/demo.py[:arg]")


def load_config() -> ConfigDict:
    """The finalised config of the command line.

    Raises:
      ValueError: no --config, or contradictory durations.
    """
    flag = flags.FLAGS["config"]
    if flag.value is None:
        raise ValueError("give a config file: --config configs/demo.py")
    return config_lib.finalize(flag.value, config_flags.get_override_values(flag))


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, runs main, and exits with its code.

    A mistake of the user (in flags, config, data, files) ends with exit code 2 and one message;
    everything else keeps its traceback.
    """

    def wrapped(argv: list[str]) -> int:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; flags begin with --")
        return main() or 0

    try:
        app.run(_guard(wrapped), flags_parser=_guard(_parse))
    finally:
        logging.flush()


def _guard(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def guarded(argument: Any) -> Any:
        try:
            return function(argument)
        except Exception as error:
            message = _message(error)
            if message is None:
                raise
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.exit(USAGE_ERROR)

    return guarded


def _parse(argv: list[str]) -> list[str]:
    return flags.FLAGS(argv)


def _message(error: BaseException) -> str | None:
    """The one message to show for a user's mistake; None for a fault of ours."""
    if isinstance(error, flags.Error):
        return _flag_message(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = frames and os.path.abspath(frames[-1].filename).startswith(_PACKAGE)
    config = _config_file()
    in_config = [f for f in frames if config and os.path.abspath(f.filename) == config]
    if in_config:
        return f"{in_config[-1].filename}:{in_config[-1].lineno}: {_text(error)}"
    if any("config_path" in f.filename or "config_flags" in f.filename for f in frames):
        return f"in the --config flags: {_text(error)}"
    if own and isinstance(error, (ValueError, OSError)):
        return _text(error)
    return None


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error)


def _flag_message(error: flags.Error) -> str:
    # ml_collections packs the whole traceback of a config file into the message.
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        places = [line.strip() for line in lines if line.strip().startswith('File "')]
        return f"{lines[-1].strip()} ({places[-1]})" if places else lines[-1].strip()
    return str(error)


def _config_file() -> str | None:
    for i, argument in enumerate(sys.argv):
        name, _, value = argument.partition("=")
        if name in ("--config", "-config"):
            value = value or (sys.argv[i + 1] if i + 1 < len(sys.argv) else "")
            return os.path.abspath(value.split(":", 1)[0])
    return None
