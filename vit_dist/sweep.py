"""Trains one config in several variants: python -m vit_dist.sweep --set KEY=V1,V2 ...

    python -m vit_dist.sweep --config configs/demo.py --workdir runs/sweep \\
        --set optimizer.learning_rate=1e-3,3e-4 --set seed=0,1

Several --set are combined: four runs here, in runs/sweep/learning_rate=1e-3,seed=0 and so on.
Without --set the variants are those of the config file's function get_variants(), a list of dicts
{key: value}. They run one after another, each as vit_dist.launch runs it, which tries again what
fails; a run that ends with an error does not end the others. The same command run again goes on
where it was. At the end stands a table, which is also sweep.csv; tensorboard --logdir WORKDIR shows
the runs beside each other.

Exit codes: 0 all runs are done, 1 some ended with an error, 2 a mistake that a person has to mend,
42 asked to stop (run it again to go on).
"""

import contextlib
import csv
import importlib.util
import io
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from absl import flags
from etils import epath

from vit_dist.cluster.preemption import PREEMPTED, SIGNALS
from vit_dist.cluster.worker import bound
from vit_dist.config.errors import ConfigError, UserError
from vit_dist.launch import split_arguments
from vit_dist.paths import expand
from vit_dist.run import cli
from vit_dist.run.check import check
from vit_dist.run.variants import (
    Variant,
    as_variants,
    name_variants,
    parse_choices,
    product,
    sort_rows,
    table,
    words_of,
)
from vit_dist.storage.files import exists, make_folder, read_json, read_text, write_whole
from vit_dist.storage.lock import WorkdirLock

FLAGS = flags.FLAGS
_SHOWN = ("val/accuracy", "test/accuracy", "val/loss", "train/loss")


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "folder of the sweep: one run in each folder of it")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE,VALUE: what the runs differ in; repeatable")
    flags.DEFINE_string("metric", "val/accuracy", "of metrics.jsonl: orders the table")
    flags.DEFINE_string("launch", "", "flags for vit_dist.launch, such as '--workers=2'")
    flags.DEFINE_boolean("dry_run", False, "print the runs' commands; run nothing")


def main() -> int:
    """The command; returns its exit code."""
    if not FLAGS.workdir:
        raise ConfigError("give a folder for the sweep: --workdir runs/NAME")
    workdir, base = expand(FLAGS.workdir), _config_words(sys.argv[1:])
    if FLAGS.set:
        variants = product([parse_choices(text) for text in FLAGS.set])
    else:
        variants = _variants_of_config(base)
    names = name_variants(variants)
    # Before the first run begins: a mistake in the last one would be found days later.
    for name, variant in zip(names, variants, strict=True):
        try:
            check(cli.config_of([*base, *words_of(variant)]))
        except UserError as error:
            raise type(error)(f"{name}: {error}") from error
    commands = {
        name: [*base, *words_of(variant)] for name, variant in zip(names, variants, strict=True)
    }
    if FLAGS.dry_run:
        for name, command in commands.items():
            print(shlex.join(_launch(command, workdir / name)))
        return 0
    make_folder(workdir)
    with WorkdirLock(str(workdir)):
        return Sweep(workdir, commands, variants).run()


class Sweep:
    """The runs of a sweep, and the record of those that have ended, WORKDIR/sweep.json.

    Args:
      workdir: folder of the sweep.
      commands: name of a run -> the words that make its config.
      variants: what each run changes, in the order of `commands`.
    """

    def __init__(
        self, workdir: epath.Path, commands: Mapping[str, list[str]], variants: Sequence[Variant]
    ):
        self._workdir, self._commands = workdir, dict(commands)
        self._variants = dict(zip(commands, variants, strict=True))
        self._record = workdir / "sweep.json"
        self._ended: dict[str, dict[str, Any]] = {}
        if exists(self._record):
            self._ended = read_json(
                self._record,
                remedy="remove it, and each run is started again, to go on from its checkpoint",
            )
        for name, entry in self._ended.items():
            if name in self._commands and entry["config"] != self._commands[name]:
                raise ConfigError(
                    f"{workdir} holds the run {name} of another sweep, made by "
                    f"{shlex.join(entry['config'])}, not by {shlex.join(self._commands[name])}: "
                    "take another --workdir"
                )
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def run(self) -> int:
        """Runs what has not ended well yet; returns the exit code."""
        # What is ignored stays so: SIGHUP under nohup, SIGINT in the background job of a script.
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            for number, name in enumerate(self._commands, 1):
                if self._ended.get(name, {}).get("code") == 0:
                    continue
                print(f"sweep: run {number} of {len(self._commands)}: {name}", flush=True)
                code, seconds = self._one(name)
                if self._stopping or code == PREEMPTED:
                    print("sweep: stopped; the same command goes on", flush=True)
                    return PREEMPTED
                entry = {"config": self._commands[name], "code": code, "seconds": round(seconds)}
                self._ended[name] = entry
                write_whole(self._record, json.dumps(self._ended, indent=2).encode())
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._report()

    def _one(self, name: str) -> tuple[int, float]:
        """Exit code and seconds of one run."""
        began = time.monotonic()
        command = bound(_launch(self._commands[name], self._workdir / name))
        # In a session of its own: Ctrl-C at a terminal goes to all processes of a session, and the
        # launcher would take the one that is passed on for the second, which ends a run at once.
        self._child = subprocess.Popen(command, start_new_session=True)
        if self._stopping:  # a signal that came just before
            self._child.send_signal(signal.SIGTERM)
        code = self._child.wait()
        self._child = None
        return code, time.monotonic() - began

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._child is not None:
            self._child.send_signal(number)

    def _report(self) -> int:
        rows = [self._row(name) for name in self._commands]
        metric = FLAGS.metric
        if all(row.get(metric) is None for row in rows):
            known = sorted({key for name in self._commands for key in self._metrics(name)})
            print(f"sweep: no run has {metric!r}; --metric may be: {', '.join(known)}")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(sort_rows(rows, metric))
        write_whole(self._workdir / "sweep.csv", text.getvalue().encode())
        print(f"{table(rows, metric=metric)}\n{self._workdir / 'sweep.csv'}", flush=True)
        bad = sum(row["outcome"] != "done" for row in rows)
        if bad:
            print(f"sweep: {bad} of {len(rows)} runs ended with an error", file=sys.stderr)
        return cli.FAILURE if bad else 0

    def _row(self, name: str) -> dict[str, Any]:
        entry, found = self._ended[name], self._metrics(name)
        outcome = "done" if entry["code"] == 0 else f"exit code {entry['code']}"
        changed = {key: self._variants[name].get(key) for v in self._variants.values() for key in v}
        shown = dict.fromkeys((FLAGS.metric, *_SHOWN))
        numbers = {key: found.get(key) for key in shown}
        return {"run": name, "outcome": outcome, "seconds": entry["seconds"], **changed, **numbers}

    def _metrics(self, name: str) -> dict[str, float]:
        """The last value of each metric of a run."""
        path = self._workdir / name / "metrics.jsonl"
        found: dict[str, float] = {}
        for line in read_text(path).split("\n") if exists(path) else ():
            # A line that a kill has torn is passed over.
            with contextlib.suppress(ValueError, TypeError):
                found |= json.loads(line)
        return found


def _launch(config_words: Sequence[str], workdir: epath.Path) -> list[str]:
    own = shlex.split(FLAGS.launch)
    command = [sys.executable, "-m", "vit_dist.launch", *own]
    return [*command, *config_words, f"--workdir={workdir}"]


def _variants_of_config(words: Sequence[str]) -> list[Variant]:
    """Those of get_variants() in the config file."""
    given = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    file = (given or [""])[-1].split(":", 1)[0]
    if not file.endswith(".py"):
        raise ConfigError("give what the runs differ in: --set optimizer.learning_rate=1e-3,3e-4")
    spec = importlib.util.spec_from_file_location("sweep_config", file)
    assert spec is not None and spec.loader is not None, file  # cli has read it as Python
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_variants"):
        raise ConfigError(
            f"give what the runs differ in: --set optimizer.learning_rate=1e-3,3e-4, or a function "
            f"get_variants() in {file} that returns a list of dicts"
        )
    return as_variants(module.get_variants(), file=file)


def _config_words(arguments: Sequence[str]) -> list[str]:
    """What a command line says of the config, as --config=FILE and --config.KEY=VALUE."""
    words, joined = split_arguments(arguments)[1], []
    while words:
        word = words.pop(0)
        # A switch such as --config.model.qkv_bias has no value, and --config always one.
        follows = "=" not in word and words and not words[0].startswith("--")
        joined.append(f"{word}={words.pop(0)}" if follows else word)
    return [word for word in joined if not word.startswith("--workdir=")]


def script() -> None:
    """The program vit-dist-sweep: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
