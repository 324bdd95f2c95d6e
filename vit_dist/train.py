"""Trains a Vision Transformer: python -m vit_dist.train --config FILE --workdir FOLDER.

In call order: main -> train -> _train (checks the config, hosts meet and agree) -> _run (devices,
model, data) -> Loop.run (run/loop.py). The same command run again resumes from the newest whole
checkpoint in the workdir.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import tensorflow as tf
from absl import flags, logging
from ml_collections import ConfigDict

from vit_dist.cluster.hosts import all_hosts, is_chief, num_hosts
from vit_dist.cluster.meeting import meet
from vit_dist.cluster.preemption import PREEMPTED, Preemption
from vit_dist.cluster.strategy import choose_cluster, make_strategy
from vit_dist.cluster.watchdog import Watchdog
from vit_dist.config.errors import ConfigError
from vit_dist.monitoring import hparams
from vit_dist.monitoring.goodput import summary
from vit_dist.monitoring.log import RunLog, detail
from vit_dist.monitoring.profiler import Profiler
from vit_dist.monitoring.progress import Progress
from vit_dist.monitoring.starts import Starts
from vit_dist.monitoring.writer import events_folder, make_writer, was_written
from vit_dist.paths import expand
from vit_dist.run.announce import announce
from vit_dist.run.best import Best
from vit_dist.run.build import Evaluation, make_state, make_step
from vit_dist.run.check import check
from vit_dist.run.elastic import cut_batch
from vit_dist.run.evals import Evals
from vit_dist.run.explain import explain
from vit_dist.run.facts import host_facts
from vit_dist.run.forecast import fit_remat
from vit_dist.run.loop import Guards, Loop
from vit_dist.run.options import Data, RunOptions
from vit_dist.run.start import Start, check_data, find_start, restore_or_init
from vit_dist.run.tpu_hosts import check_reading, tpu_hosts
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.lock import STALE_SECONDS, WorkdirLock
from vit_dist.training.checkpoint import Checkpointer

# Shown until the first metrics are: for a large model this takes minutes.
WAITS = "the first step is traced and compiled"


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "folder of this run: checkpoints, metrics, config")


def main() -> int:
    """The command; returns its exit code."""
    config = cli.load_config()
    if not flags.FLAGS.workdir:
        raise ConfigError("give a folder for this run: --workdir runs/NAME")
    logging.set_verbosity(logging.INFO)
    metrics = train(config, flags.FLAGS.workdir)
    return PREEMPTED if metrics.get("preempted") else 0


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains as the config says, or resumes if the workdir holds a checkpoint.

    Args:
      config: see config.get_defaults.
      workdir: folder of the run, local or gs://; made if absent.

    Returns:
      The last metrics: "step", "loss", ...; "val_accuracy" and "test_accuracy" if the config names
      these splits; "preempted" 1.0 if a signal ended the run early.

    Raises:
      ConfigError: a mistake in the config; see check.
      DataError: data that is missing, damaged, or has changed since the run began.
      DivergedError: the loss or gradient is not finite; the last good checkpoint stays.
      StorageError: the workdir cannot be written.
      HostLostError: another worker is gone.
    """
    # From here on RunLog collects what is logged, to write it once the workdir is known to be ours,
    # and a signal to stop ends the run with code 42 rather than with a traceback.
    with RunLog() as log, Preemption() as preemption:
        return _train(config, str(expand(workdir)), log, preemption, Starts())


def _train(
    config: ConfigDict, workdir: str, log: RunLog, preemption: Preemption, starts: Starts
) -> dict[str, float]:
    """Checks the config, lets the hosts meet, and proves that all begin with equal things.

    No device is touched before all of that has been done.
    """
    options, data = check(config)
    check_bucket(workdir, "--workdir")
    devices = options.evaluation.strategy
    cluster = choose_cluster(devices["name"], devices["tpu"])
    starts.spending.switch("meeting")
    with (
        meet(cluster, timeout_seconds=devices["timeout_seconds"]) as meeting,
        tpu_hosts(devices, preemption.note) as tpu_slice,
        WorkdirLock(workdir, active=meeting.index == 0) as lock,
    ):
        # No host looks for a checkpoint before the chief has the lock: only then is it certain that
        # an earlier start writes no more of them, and all hosts find the same one. The chief may
        # first have to see whether an earlier chief's lock still beats.
        meeting.gather("the chief has the lock", chief_seconds=STALE_SECONDS)
        with starts.spending.on("restoring"):
            start = find_start(workdir, options)
        check_data(start, data)
        meeting.agree(host_facts(options, data, start))
        chief = meeting.index == 0
        if chief:
            log.open(workdir)
        starts.spending.switch("building")
        # The first call that starts devices. A strategy of several hosts replaces the handler of
        # SIGTERM, so Preemption puts its own in place after it.
        strategy = make_strategy(**devices)
        preemption.attach(functools.partial(all_hosts, strategy))
        check_reading(data.sources, strategy, tpu_slice.addresses)
        limits = {key: devices[key] for key in ("timeout_seconds", "patience_seconds")}
        with (
            starts.open(workdir, active=chief),
            Watchdog(meeting, **limits) as watchdog,
        ):
            # Which host an error between hosts is due to.
            def blame() -> str | None:
                return tpu_slice.lost() or watchdog.lost()

            guards = Guards(preemption, watchdog, lock, starts)
            metrics = _run(options, data, start, workdir, strategy, guards, blame=blame)
        tpu_slice.stopped = bool(metrics.get("preempted"))
        return metrics


def _run(
    options: RunOptions,
    data: Data,
    start: Start,
    workdir: str,
    strategy: tf.distribute.Strategy,
    guards: Guards,
    *,
    blame: Callable[[], str | None],
) -> dict[str, float]:
    """Makes and fills the state on the devices, and trains; returns the last metrics."""
    starts = guards.starts
    # Only now the number of replicas is certain, by which the batch has to be divided.
    cut = cut_batch(options, start, num_replicas=strategy.num_replicas_in_sync)
    step = dataclasses.replace(options.step, accumulation=cut.accumulation)
    options = dataclasses.replace(options, step=step)
    options, remat = fit_remat(options, data.sources["train"].num_examples, strategy)
    starts.runs_on(hosts=num_hosts(strategy), replicas=strategy.num_replicas_in_sync)
    state = make_state(options, strategy)
    with starts.spending.on("restoring"):
        origin = restore_or_init(state, options, data, start)
    origin = "\n".join(filter(None, (origin, cut.note, remat)))
    checkpointer = Checkpointer(
        workdir, keep=options.keep_checkpoints, permit=guards.lock.check, damaged=start.damaged
    )
    # Otherwise its open files and loaded tensors would stay to the end of the run.
    del start
    first, chief = int(state.step.numpy()), is_chief(strategy)
    starts.note(first)
    # Only the chief has metrics on its disk; all hosts must decide alike.
    judged = {"val": "val/loss", **{name: f"{name}/examples" for name in options.evaluation.evals}}
    evaluated = {
        name
        for name, row in judged.items()
        if any(all_hosts(strategy, was_written(workdir, row, first)))
    }
    with (
        make_writer(workdir, first_step=first, active=chief) as writer,
        Progress(options.total_steps, first_step=first, title="train", waits=WAITS) as progress,
        Profiler(
            str(events_folder(workdir)),
            first=options.monitor.profile.start_step,
            count=options.monitor.profile.num_steps,
            active=chief,
        ) as profiler,
    ):
        note = progress.note if chief else logging.info
        loop = Loop(
            options,
            data,
            strategy=strategy,
            state=state,
            train_steps=make_step(options, data, state, strategy),
            evaluate=Evaluation(options.evaluation, data, state.eval_model, strategy),
            evals=Evals(options.evaluation, data, state.eval_model, strategy),
            checkpointer=checkpointer,
            best=Best(options.best, workdir, strategy, permit=guards.lock.check),
            writer=writer,
            progress=progress,
            guards=guards,
            profiler=profiler,
            micro_batch=cut.micro_batch,
            note=note,
        )
        try:
            announce(options, data, strategy, state, workdir, origin, writer, note)
            metrics = loop.run(evaluated=evaluated)
            starts.spending.switch("ending")
            if not metrics.get("preempted"):
                writer.summary(int(metrics["step"]), hparams.session_end)
        except Exception as error:
            _finish_saving(checkpointer)
            better = explain(
                error,
                loop.reading(),
                data,
                strategy,
                workdir=workdir,
                blame=blame,
            )
            if better is None:
                raise
            raise better from error
        finally:
            loop.background.close()
    # A barrier: a host that leaves takes the cluster down, and the chief may still be saving.
    all_hosts(strategy, 0)
    if chief:
        for line in (summary(starts.records()), result_line(metrics, workdir)):
            print(line, flush=True)
            detail("%s", line)
    return metrics


def _finish_saving(checkpointer: Checkpointer) -> None:
    """Waits for the checkpoint that is being written: it was begun before the error and is good."""
    # Of any kind, and only logged: the error that ends the run came first, and is the one to show.
    try:
        checkpointer.wait()
    except Exception as error:
        logging.error("%s", error)


def result_line(metrics: Mapping[str, float], workdir: str) -> str:
    """One line for people and for grep: the step and the accuracies."""
    parts = [f"step {metrics['step']:.0f}"]
    parts += [
        f"{split} accuracy {metrics[f'{split}_accuracy']:.2%}"
        for split in ("val", "test")
        if f"{split}_accuracy" in metrics
    ]
    state = "stopped" if metrics.get("preempted") else "done"
    return f"{state}: {', '.join(parts)} ({workdir})"


def script() -> None:
    """The program vit-dist-train: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
