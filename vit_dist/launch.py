"""Starts the processes of a run on machines without a scheduler: python -m vit_dist.launch.

One process with all devices of this machine; or --workers=N of them here; or this machine's share
of a run on several machines, --hosts=a,b,c, by the same command on each. It shows what they print,
hands signals on, and starts all again after a failure, from the newest checkpoint.

    python -m vit_dist.launch --workers=2 --config configs/demo.py --workdir runs/two
    python -m vit_dist.launch --hosts=host1,host2 --config configs/demo.py --workdir /shared/run

--config, --config.key=value, --workdir and all that stands after -- go to vit_dist.train.

Exit codes: 0 done, 2 a mistake that a person has to mend, 42 asked to stop and saved (run it again
to go on), else that of the worker that failed first.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vit_dist.cluster.own_hosts import free_addresses, own_indices, parse_hosts
from vit_dist.cluster.supervisor import LONGEST_BACKOFF_SECONDS, Supervisor
from vit_dist.cluster.worker import Worker, bound
from vit_dist.config.errors import ConfigError
from vit_dist.paths import is_remote
from vit_dist.run.help_text import help_text
from vit_dist.training.layout import newest_whole_step

FLAGS = flags.FLAGS
_TRAIN = "vit_dist.train"
_GPUS = "CUDA_VISIBLE_DEVICES"
_LOOK_SECONDS = 300  # for a look at a bucket

# A bucket is read by TensorFlow alone: another process imports it, looks, and ends.
_LOOK = """
import sys
from vit_dist.run import cli
from vit_dist.training.checkpoint import open_checkpoint
print(open_checkpoint(sys.argv[1], weights=True).step)
"""


def define_flags() -> None:
    """Defines this command's flags."""
    flags.DEFINE_integer("workers", None, "so many workers on this machine", lower_bound=1)
    flags.DEFINE_integer("port", None, "of worker 0 of --workers; the others take the next ones", 1)
    flags.DEFINE_string("hosts", None, "all workers, HOST or HOST:PORT, with commas between")
    flags.DEFINE_integer("host_index", None, "the one of --hosts to start here, counted from 0", 0)
    flags.DEFINE_alias("index", "host_index")
    flags.DEFINE_integer("cpus", None, "one process with so many virtual devices on the CPU", 1)
    flags.DEFINE_integer(
        "gpus_per_worker",
        None,
        "each worker here sees the next ones, of CUDA_VISIBLE_DEVICES where that is set; 0 hides "
        "all; unset: each worker sees all",
        0,
    )
    flags.DEFINE_string("logs", None, "folder of worker-I.log; WORKDIR/logs, for gs:// runs/logs")
    flags.DEFINE_float("grace", 30.0, "seconds from SIGTERM to SIGKILL, to save a checkpoint", 0)
    flags.DEFINE_integer("max_restarts", 3, "restarts without a newer checkpoint", 0)
    flags.DEFINE_float(
        "backoff",
        1.0,
        "seconds before a restart, doubled at each further one without a newer checkpoint, up to "
        f"{LONGEST_BACKOFF_SECONDS:g}",
        0,
    )
    flags.DEFINE_string("program", _TRAIN, "module or FILE.py that each process runs")
    flags.DEFINE_boolean("dry_run", False, "print the commands, to paste anywhere; run nothing")


def main(train_flags: Sequence[str] = ()) -> int:
    """The command; returns its exit code.

    Args:
      train_flags: what each process gets.
    """
    _check_flags(train_flags)
    workdir = _value_of("--workdir", train_flags)
    if FLAGS.dry_run:
        for worker in make_workers(train_flags, workdir):
            print(worker.shell_command())
        return 0
    supervisor = Supervisor(
        lambda: make_workers(train_flags, workdir),
        newest_step=lambda: newest_step(workdir),
        grace=FLAGS.grace,
        max_restarts=FLAGS.max_restarts,
        backoff=FLAGS.backoff,
    )
    return supervisor.run()


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(this command's flags, those of vit_dist.train), from the words of a command line.

    Of the latter --config* and --workdir are known here. Anything else that looks like a flag might
    be a misspelt one of this command, so others stand after --.

    Raises:
      ConfigError: --config or --workdir ends the words, or is followed by another flag.
    """
    own: list[str] = []
    train: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        if word == "--":
            train += words
            break
        if name in ("--config", "--workdir") or name.startswith("--config."):
            train.append(word)
            # A word that begins with - is a value only if it is a number, such as -1.
            if not equals and words and not re.match(r"-[^0-9.]", words[0]):
                train.append(words.pop(0))
            elif not equals and name in ("--config", "--workdir"):
                raise ConfigError(f"{name} needs a value")
        elif word.startswith("--"):
            # --dry-run is --dry_run, as the scripts of launch/ spell it.
            own.append("--" + name[2:].replace("-", "_") + word[len(name) :])
        else:
            own.append(word)
    return own, train


def make_workers(train_flags: Sequence[str], workdir: str | None) -> list[Worker]:
    """What is to be started on this machine, as the flags say.

    Raises:
      ConfigError: this machine is none of --hosts, or CUDA_VISIBLE_DEVICES names too few cards.
    """
    words = [FLAGS.program] if FLAGS.program.endswith(".py") else ["-m", FLAGS.program]
    command = (sys.executable, *words, *train_flags)
    if FLAGS.workers is None and FLAGS.hosts is None:
        return [_make_alone(command, train_flags)]
    addresses, own = _find_share()
    logs = _choose_logs(workdir)
    workers = []
    for place, index in enumerate(own):
        task = {"type": "worker", "index": index}
        environment: dict[str, str | None] = {
            "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})
        }
        if FLAGS.gpus_per_worker is not None:
            environment[_GPUS] = _choose_gpus(FLAGS.gpus_per_worker, place, workers=len(own))
        workers.append(
            Worker(
                name=f"worker {index}",
                # Behind --config, where ml_collections wants its keys.
                command=(*command, "--config.strategy.name=multiworker"),
                environment=environment,
                log=logs / f"worker-{index}.log",
            )
        )
    return workers


def _choose_gpus(count: int, place: int, *, workers: int) -> str:
    """CUDA_VISIBLE_DEVICES of the worker that is the `place`-th of some on this machine."""
    first, total = place * count, count * workers
    cards = [str(i) for i in range(total)]
    given = os.environ.get(_GPUS)
    if given is not None:
        # Numbers or UUIDs. CUDA takes "" and -1 for the end of the list.
        names = (name.strip() for name in given.split(","))
        cards = list(itertools.takewhile(lambda name: name not in ("", "-1"), names))
    if len(cards) < total:
        raise ConfigError(
            f"--gpus_per_worker={count} takes {total} GPUs of this machine, and "
            f"{_GPUS}={given!r} leaves {len(cards)}: name more there, or unset it"
        )
    return ",".join(cards[first : first + count]) or "-1"


def _make_alone(command: Sequence[str], train_flags: Sequence[str]) -> Worker:
    # TensorFlow itself reads these two, which a cluster may have left in the environment.
    environment: dict[str, str | None] = {"TF_CONFIG": None, "TPU_NAME": None}
    added: list[str] = []
    if FLAGS.cpus is not None:
        environment[_GPUS] = "-1"
        added += ["--config.strategy.name=mirrored", f"--config.strategy.virtual_cpus={FLAGS.cpus}"]
    elif not _has("--config.strategy.name", train_flags):
        added.append("--config.strategy.name=local")
    return Worker(name="the run", command=(*command, *added), environment=environment)


def _find_share() -> tuple[list[str], list[int]]:
    """Addresses of all workers, and the numbers of those to start here."""
    if FLAGS.workers is not None:
        count = FLAGS.workers
        if FLAGS.port is None:
            addresses = free_addresses(count)  # at a restart others: these may be taken by then
        else:
            addresses = [f"localhost:{FLAGS.port + i}" for i in range(count)]
        return addresses, list(range(count))
    addresses = parse_hosts(FLAGS.hosts)
    if FLAGS.host_index is None:
        own = own_indices(addresses)
        if not own:
            raise ConfigError(
                f"none of --hosts {FLAGS.hosts} is a name or an address of this machine: give "
                "--host_index, this machine's place in the list, counted from 0"
            )
        return addresses, own
    if FLAGS.host_index >= len(addresses):
        raise ConfigError(
            f"--host_index {FLAGS.host_index} is out of range: --hosts has {len(addresses)} "
            "entries, counted from 0"
        )
    return addresses, [FLAGS.host_index]


def _check_flags(train_flags: Sequence[str]) -> None:
    """Raises ConfigError where flags contradict each other or one is missing."""
    alone = FLAGS.workers is None and FLAGS.hosts is None
    if FLAGS.workers is not None and FLAGS.hosts is not None:
        raise ConfigError("--workers is for one machine, --hosts for several: give one of them")
    if FLAGS.host_index is not None and FLAGS.hosts is None:
        raise ConfigError("--host_index belongs to --hosts")
    if FLAGS.port is not None and FLAGS.workers is None:
        raise ConfigError("--port belongs to --workers; in --hosts write HOST:PORT")
    if FLAGS.port is not None and FLAGS.port + FLAGS.workers > 2**16:
        raise ConfigError(f"--port {FLAGS.port} leaves no room for {FLAGS.workers} ports to 65535")
    if FLAGS.gpus_per_worker is not None and alone:
        raise ConfigError("--gpus_per_worker belongs to --workers and --hosts")
    if FLAGS.cpus is not None and not alone:
        raise ConfigError("--cpus is for one process: leave out --workers and --hosts")
    if FLAGS.logs is not None and alone:
        raise ConfigError("--logs belongs to --workers and --hosts; one process alone prints here")
    if FLAGS.program == _TRAIN:
        for name in ("--config", "--workdir"):
            if not _has(name, train_flags) and not _has("--flagfile", train_flags):
                raise ConfigError(f"{name} is missing: give --config FILE and --workdir DIR")
    strategy = ("--config.strategy.name", "--config.strategy.virtual_cpus")
    for flag, names in (("workers", strategy[:1]), ("hosts", strategy[:1]), ("cpus", strategy)):
        for name in names:
            if FLAGS[flag].value is not None and _has(name, train_flags):
                raise ConfigError(f"{name} is set by --{flag}: leave one of them out")


def _choose_logs(workdir: str | None) -> Path:
    if FLAGS.logs is not None:
        return Path(os.path.expanduser(FLAGS.logs))
    if workdir is None or is_remote(workdir):
        return Path("runs/logs")
    # pathlib would raise for the home of a user that there is none of; the run takes the name as it
    # stands.
    return Path(os.path.expanduser(workdir)) / "logs"


def newest_step(workdir: str | None) -> int | None:
    """The step of the newest whole checkpoint; None where there is none, or it cannot be told."""
    if workdir is None:
        return None
    try:
        if not is_remote(workdir):
            return newest_whole_step(workdir)
        command = bound([sys.executable, "-c", _LOOK, workdir])
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LOOK_SECONDS)
        return int(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"launch: cannot tell the newest checkpoint of {workdir}: {error}", file=sys.stderr)
        return None


def _has(name: str, words: Sequence[str]) -> bool:
    return any(word == name or word.startswith(f"{name}=") for word in words)


def _value_of(name: str, words: Sequence[str]) -> str | None:
    """What the words give for a flag, the last one if there are several; reads --flagfile, too."""
    value = None
    words = FLAGS.read_flags_from_files(list(words))
    for i, word in enumerate(words):
        if word.startswith(f"{name}="):
            value = word.partition("=")[2]
        elif word == name:
            value = next(iter(words[i + 1 : i + 2]), None)
    return value


def script() -> None:
    """The program vit-dist-launch: its flags, then main."""
    define_flags()
    sys.exit(_run(sys.argv))


def _run(words: Sequence[str]) -> int:
    # Not by run/cli.py, as the other commands: that imports TensorFlow.
    try:
        own, train_flags = split_arguments(words[1:])
        if {"--help", "-h", "-help", "--helpshort"} & set(own):
            print(help_text(sys.modules[main.__module__]))
            return 0
        rest = FLAGS([words[0], *own])[1:]
        if rest:
            raise ConfigError(f"unexpected {rest[0]!r} (see --help)")
        return main(train_flags)
    except flags.UnrecognizedFlagError as error:
        text = f"{error}; flags of {_TRAIN} other than --config* and --workdir stand after --"
    except (flags.Error, ConfigError) as error:
        # absl would show the reason in Python's words: "invalid literal for int() with base 10".
        found = re.match(r"flag (--\w+)=(.*): invalid literal for int", str(error))
        text = f"{found[1]} needs a whole number, not '{found[2]}'" if found else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"error: {text}", file=sys.stderr)
    return ConfigError.exit_code


if __name__ == "__main__":
    script()
