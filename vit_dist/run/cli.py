"""What all commands share: the config flag, exit codes, and failures as one readable message."""

import contextlib
import importlib
import logging as std_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from vit_dist.cluster import gpus, tpu_slice, tpu_vm
from vit_dist.cluster.environment import names_other_hosts
from vit_dist.config import defaults as config_lib
from vit_dist.config import recorded
from vit_dist.config.binding import did_you_mean
from vit_dist.config.errors import ConfigError, UserError
from vit_dist.monitoring.lines import LineFormatter
from vit_dist.run import notices
from vit_dist.run.help_text import help_text


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Within it these packages cannot be imported, as if they were not installed."""
    # An entry None in sys.modules makes Python's import of that name fail.
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


# TensorFlow reads this variable while it is imported, so it stands before the imports that follow.
# 2: only errors, because notices and warnings drown what we print. What TensorFlow writes before it
# has read the variable is hidden by `notices`.
os.environ.setdefault(notices.LEVEL_VARIABLE, "2")

# It reads variables about TPUs, too. A TPU that would make the import hang or crash is left alone,
# and whoever asks for it is told why later.
tpu_vm.prepare()

# Where these three are installed, Keras imports them for wrappers and plots that nothing here uses:
# a third of the time to import TensorFlow, and 100 MB. Afterwards they can be imported as before.
with notices.hidden(), _hidden("matplotlib", "scipy", "sklearn"):
    importlib.import_module("keras")


import tensorflow as tf  # noqa: E402

from vit_dist.run import out_of_memory  # noqa: E402
from vit_dist.storage import errors as storage_errors  # noqa: E402

FAILURE = 1  # exit code of a run that broke: disk full, loss not finite, a worker lost
USAGE_ERROR = 2  # exit code of a user's mistake, as in GNU tools and argparse
_INTERRUPTED = 130  # as shells report a program that SIGINT ended


# The flag whose run gives its recorded config where --config is not given. A list, because
# define_config fills it: absl's flags are global to the process, and so is this.
_DEFAULT_FROM: list[str] = []
# The command's own config, where it takes no file; filled like _DEFAULT_FROM.
_BUILT_IN: list[ConfigDict] = []


def define_config(*, default_from: str | None = None, built_in: ConfigDict | None = None) -> None:
    """Defines --config FILE[:arg] and --config.key=value.

    Args:
      default_from: name of a flag that names a run, or several with commas between; without
        --config the (first) run's config is taken.
      built_in: the command's own config, of which keys can be changed; it takes no file then.
    """
    _DEFAULT_FROM[:] = [default_from] if default_from else []
    _BUILT_IN[:] = [] if built_in is None else [built_in]
    if built_in is not None:
        # Guarded, because the definition applies the --config.key=value of the command line.
        _guard(lambda own: config_flags.DEFINE_config_dict("config", own, "its own"))(built_in)
        return
    config_flags.DEFINE_config_file(
        "config", None, "config file, e.g. configs/demo.py[:arg], or a run's folder or config.json"
    )


def load_config() -> FrozenConfigDict:
    """The finalised config of the command line.

    Raises:
      ConfigError: no --config, a file that gives none, or contradictory durations.
    """
    flag = flags.FLAGS["config"]
    if not flag.present and flag.value is None:
        raise ConfigError("give a config file: --config configs/demo.py")
    if flag.value is None:
        raise ConfigError(
            f"get_config() of {_config_file()} returns None: end it with return config"
        )
    return config_lib.finalize(flag.value, config_flags.get_override_values(flag))


def config_of(words: list[str]) -> FrozenConfigDict:
    """The finalised config of another command line: --config=FILE and --config.KEY=VALUE.

    Raises:
      ConfigError: the words make no config.
    """
    # Flags of their own: those of this process are parsed once and hold its own config.
    apart = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "as the command line's", flag_values=apart)
    # ml_collections looks for keys in the process's own words, whatever it is given to parse; so
    # do the explanations.
    before, sys.argv = sys.argv, [sys.argv[0], *with_recorded_config(words)]
    try:
        apart(sys.argv)
        return config_lib.finalize(
            apart["config"].value, config_flags.get_override_values(apart["config"])
        )
    except Exception as error:
        message, _ = _explain(error)
        if message is None:
            raise
        raise ConfigError(message) from error
    finally:
        sys.argv = before


def with_recorded_config(arguments: list[str]) -> list[str]:
    """The command line, with --config RUN turned into a config file that ml_collections can read.

    RUN is a run's folder or its config.json. ml_collections reads Python files only, so RUN becomes
    config/recorded.py:RUN, a config file whose argument says which run's config to read.
    """
    # Done on the words of the command line: --config.key=value can be parsed only once the config
    # file has told which keys there are, so all has to be in place before absl parses anything.
    found, given = list(arguments), False
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-config"):
            continue
        given = True
        # Where the file's name stands: in this word (--config=FILE) or in the next (--config FILE).
        place = i if equals else i + 1
        if not equals and place < len(arguments):
            value = arguments[place]
        if value and recorded.find(value):
            value = f"{recorded.__file__}:{value}"
        elif value.startswith("~"):
            value = os.path.expanduser(value)  # shells leave it as it is behind a "="
        if place < len(arguments):
            found[place] = (f"{flag}=" if equals else "") + value
    run = _value_of(_DEFAULT_FROM[0], arguments) if _DEFAULT_FROM and not given else None
    if run and not recorded.find(run):
        run = run.partition(",")[0]  # of several, such as the checkpoints of an average
    if run and recorded.find(run):
        # Behind the program's name (word 0) and before all --config.key=value.
        found.insert(1, f"--config={recorded.__file__}:{run}")
    return found


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """What the command line gives for --flag; None if it does not."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return value if equals else next(iter(arguments[i + 1 : i + 2]), None)
    return None


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, runs main, and exits with its code.

    What a user can mend (flags, config, data, disk, a lost worker) ends with one message, which
    begins with "error:", and exit code USAGE_ERROR or FAILURE; all else keeps its traceback.
    """

    def wrapped(argv: list[str]) -> int:
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}; flags begin with --")
        return main() or 0

    if {"--help", "-h", "-help", "--helpshort"} & set(sys.argv[1:]):
        print(help_text(sys.modules[main.__module__]))
        return  # absl would exit with 1
    # TensorFlow prints its notices itself; passed on to absl's handler they would appear twice.
    std_logging.getLogger("tensorflow").propagate = False
    std_logging.getLogger("tensorflow").setLevel(std_logging.WARNING)
    # Not only at the start: TensorFlow logs wherever a device, a kernel or XLA is first used.
    with notices.hidden(python_apart=True):
        # A person at a terminal reads plain lines. A file, such as another host's log, keeps times
        # and the places in the source.
        if sys.stderr.isatty():
            logging.get_absl_handler().setFormatter(LineFormatter())
        # Both are guarded: the config file runs, and may fail, while the flags are parsed.
        try:
            app.run(_guard(wrapped), flags_parser=_guard(_parse_flags))
        finally:
            logging.flush()


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(with_recorded_config(arguments))
    except SystemExit as error:  # absl parses without one: a config file has called sys.exit
        raise ConfigError(
            f"config file {_config_file()} ended the program with exit code {error.code}: raise a "
            "ValueError that says what is wrong"
        ) from error


def _guard(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, with failures printed and turned into exit codes."""

    def guarded(argument: Any) -> Any:
        try:
            return function(argument)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            _leave(_INTERRUPTED)
        except Exception as error:
            message, code = _explain(error)
            print(f"error: {message}" if message else traceback.format_exc(), file=sys.stderr)
            _leave(code, at_once=out_of_memory.is_out_of_memory(error))

    return guarded


def _leave(code: int, *, at_once: bool = False) -> NoReturn:
    """Exits; one of several hosts at once, because TensorFlow would wait 10-20 s for the others.

    `at_once` is for errors after which TensorFlow cannot clean up.
    """
    if at_once or names_other_hosts() or tpu_slice.was_opened():
        logging.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _explain(error: BaseException) -> tuple[str | None, int]:
    """The message for a failure that a user can mend, else None, and the exit code."""
    if isinstance(error, flags.Error):
        return _flag_message(error), USAGE_ERROR
    if isinstance(error, UserError):
        return str(error), error.exit_code
    message = _config_message(error)
    if message:
        return message, USAGE_ERROR
    # Raised by a library with a text of its own, not by the system: data that our checks miss.
    if isinstance(error, FileNotFoundError) and not error.errno:
        return str(error), USAGE_ERROR
    explained = _explain_gpu(error) or _explain_memory(error) or storage_errors.explain(error)
    if explained is not None:
        return str(explained), explained.exit_code
    if isinstance(error, OSError):
        return _text(error), FAILURE
    return None, FAILURE


def _explain_gpu(error: BaseException) -> UserError | None:
    said = gpus.explain(error.message) if isinstance(error, tf.errors.OpError) else None
    return UserError(f"{said} ({storage_errors.cause(error)})") if said else None


def _explain_memory(error: BaseException) -> UserError | None:
    # A remedy may only name flags that the command has (law 3); --workdir tells a training.
    remedy = out_of_memory.OTHER
    if "config" in flags.FLAGS:
        training = "workdir" in flags.FLAGS
        remedy = out_of_memory.TRAINING if training else out_of_memory.EVALUATION
    return out_of_memory.explain_memory(error, remedy=remedy)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError):
        text = error.strerror or str(error) or type(error).__name__
        return text + (f": {error.filename}" if error.filename else "")
    if isinstance(error, (AttributeError, KeyError)):
        # ml_collections' message lists every key and value there is; two names of it are enough.
        key = re.search(r'Key "(\w+)" does not exist', str(error))
        near = re.search(r'Did you mean "(\w+)"', str(error))
        if key:
            return f"there is no key {key[1]!r}" + (f"; did you mean {near[1]!r}?" if near else "")
    return f"{type(error).__name__}: {error}"


def _flag_message(error: flags.Error) -> str:
    name = getattr(error, "flagname", "")
    if "Overriding config is not allowed" in str(error):
        return "this command has its own config and takes no file: change it by --config.key=value"
    if name.split(".")[0] == "config" and _config_file() is None and not _BUILT_IN:
        return f"give a config file before --{name}: --config configs/demo.py"
    # ml_collections packs the whole traceback of a config file into the message.
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if not any(line.startswith("Traceback") for line in lines):
        return str(error)
    # The last line is "ValueError: text"; of the frames the last one in the config file is named.
    text = lines[-1].partition(": ")[2] or lines[-1]
    file = _config_file()
    places = [line.split(", ") for line in lines if line.strip().startswith(f'File "{file}"')]
    return f"{file}:{places[-1][1].removeprefix('line ')}: {text}" if places else text


def _config_message(error: BaseException) -> str | None:
    """What is wrong with the config file or a --config.key=value; None if neither is."""
    file = _config_file()
    if file is None:
        return _unknown_key() if _BUILT_IN and isinstance(error, AttributeError) else None
    if isinstance(error, OSError) and not os.path.exists(file):
        return f"config file {file} does not exist"
    if isinstance(error, OSError) and isinstance(error.__cause__, OSError):
        # ml_collections wraps what get_config() raised in an OSError of its own.
        return _config_message(error.__cause__)
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{file}:{error.lineno}: {error.msg}"
    # An error whose traceback passes through the config file is that file's: its last frame there
    # is the line to name.
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename == file]
    if own:
        return f"{file}:{own[-1].lineno}: {_text(error)}"
    if not any("config_path" in f.filename or "config_flags" in f.filename for f in frames):
        return None
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return f"config file {file} has no function get_config(arg=None)"
    return _unknown_key() or f"in the --config flags: {_text(error)}"


def _unknown_key() -> str | None:
    """Names the first --config.key of the command line that no config has."""
    for argument in sys.argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        known: Any = {"config": config_lib.get_defaults()}
        for part in name.split(".") if name.startswith("config.") else ():
            if not isinstance(known, (dict, ConfigDict)) or part not in known:
                near = did_you_mean(part, known if isinstance(known, ConfigDict) else ())
                return f"--{name}: there is no key {part!r}{near}"
            known = known[part]
    return None


def _config_file() -> str | None:
    """The file of --config FILE[:arg], as given but for the home folder."""
    for i, argument in enumerate(sys.argv):
        name, _, value = argument.partition("=")
        if name in ("--config", "-config"):
            value = value or (sys.argv[i + 1] if i + 1 < len(sys.argv) else "")
            return os.path.expanduser(value.split(":", 1)[0])
    return None
