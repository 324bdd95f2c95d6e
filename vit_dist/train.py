"""Trains a Vision Transformer: python -m vit_dist.train --config FILE --workdir FOLDER.

In call order: main -> train -> _train (checks the config, hosts meet and agree) -> _run (devices,
model, data) -> _Loop.run. The same command run again resumes from the newest whole checkpoint in
the workdir.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
import tensorflow as tf
from absl import flags, logging
from ml_collections import ConfigDict

from vit_dist.cluster.hosts import all_hosts, describe, device_kind, is_chief, num_hosts
from vit_dist.cluster.meeting import meet
from vit_dist.cluster.preemption import PREEMPTED, Preemption
from vit_dist.cluster.strategy import choose_cluster, device_warnings, make_strategy
from vit_dist.cluster.watchdog import Watchdog
from vit_dist.config.errors import ConfigError, DivergedError
from vit_dist.data.pipeline import train_indices
from vit_dist.inspection.sheet import draw_grid
from vit_dist.monitoring import hparams
from vit_dist.monitoring.goodput import summary
from vit_dist.monitoring.log import RunLog, detail
from vit_dist.monitoring.meter import Meter
from vit_dist.monitoring.profiler import Profiler
from vit_dist.monitoring.progress import Progress
from vit_dist.monitoring.starts import Starts
from vit_dist.monitoring.writer import Writer, events_folder, make_writer, was_written
from vit_dist.paths import expand
from vit_dist.run.advice import average_warnings, data_warnings, pixel_warnings
from vit_dist.run.best import FOLDER as BEST
from vit_dist.run.best import Best
from vit_dist.run.build import Evaluation, make_state, make_step
from vit_dist.run.calendar import Calendar, Pace
from vit_dist.run.check import check
from vit_dist.run.drawing import Drawing
from vit_dist.run.elastic import cut_batch
from vit_dist.run.evals import Evals
from vit_dist.run.explain import Reading, explain
from vit_dist.run.facts import host_facts
from vit_dist.run.input import first_images, images_to_inspect, train_data
from vit_dist.run.notices import notices
from vit_dist.run.options import Data, RunOptions
from vit_dist.run.scalars import Scalars
from vit_dist.run.start import Start, check_data, find_start, restore_or_init
from vit_dist.run.texts import changes_text, config_text, model_text, run_text
from vit_dist.run.tpu_hosts import check_reading, tpu_hosts
from vit_dist.storage.errors import check_bucket
from vit_dist.storage.files import write_whole
from vit_dist.storage.lock import WorkdirLock
from vit_dist.training.checkpoint import Checkpointer
from vit_dist.training.state import TrainState
from vit_dist.training.step import jit_warnings
from vit_dist.training.watch import KINDS, PREFIX

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
        # After the lock: only now is it certain that an earlier start writes no more checkpoints.
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

            metrics = _run(
                options,
                data,
                start,
                workdir,
                strategy,
                preemption,
                watchdog,
                lock,
                starts,
                blame=blame,
            )
        tpu_slice.stopped = bool(metrics.get("preempted"))
        return metrics


def _run(
    options: RunOptions,
    data: Data,
    start: Start,
    workdir: str,
    strategy: tf.distribute.Strategy,
    preemption: Preemption,
    watchdog: Watchdog,
    lock: WorkdirLock,
    starts: Starts,
    *,
    blame: Callable[[], str | None],
) -> dict[str, float]:
    """Makes and fills the state on the devices, and trains; returns the last metrics."""
    # Only now the number of replicas is certain, by which the batch has to be divided.
    cut = cut_batch(options, start, num_replicas=strategy.num_replicas_in_sync)
    step = dataclasses.replace(options.step, accumulation=cut.accumulation)
    options = dataclasses.replace(options, step=step)
    starts.runs_on(hosts=num_hosts(strategy), replicas=strategy.num_replicas_in_sync)
    state = make_state(options, strategy)
    with starts.spending.on("restoring"):
        origin = f"{restore_or_init(state, options, data, start)}\n{cut.note}"
    checkpointer = Checkpointer(
        workdir, keep=options.keep_checkpoints, permit=lock.check, damaged=start.damaged
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
        loop = _Loop(
            options,
            data,
            strategy=strategy,
            state=state,
            train_steps=make_step(options, data, state, strategy),
            evaluate=Evaluation(options.evaluation, data, state.eval_model, strategy),
            evals=Evals(options.evaluation, data, state.eval_model, strategy),
            checkpointer=checkpointer,
            best=Best(options.best, workdir, strategy, permit=lock.check),
            writer=writer,
            progress=progress,
            preemption=preemption,
            watchdog=watchdog,
            starts=starts,
            profiler=profiler,
            micro_batch=cut.micro_batch,
            note=note,
        )
        try:
            _announce(options, data, strategy, state, workdir, origin, writer, note)
            metrics = loop.run(evaluated=evaluated)
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
            loop.drawing.close()
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


class _Asked(NamedTuple):
    """What all hosts do after a call of the step; the same on each of them."""

    stop: bool  # a host got a signal
    save: bool  # the chief's clock says that it is time
    steps: int  # the most that the next call may run


class _Loop:
    """The training loop and what happens between its calls: log, save, evaluate, stop."""

    def __init__(
        self,
        options: RunOptions,
        data: Data,
        *,
        strategy: tf.distribute.Strategy,
        state: TrainState,
        train_steps: Callable[..., dict[str, tf.Tensor]],
        evaluate: Evaluation,
        evals: Evals,
        checkpointer: Checkpointer,
        best: Best,
        writer: Writer,
        progress: Progress,
        preemption: Preemption,
        watchdog: Watchdog,
        starts: Starts,
        profiler: Profiler,
        micro_batch: int,
        note: Callable[..., None],
    ):
        self.options, self.data, self.strategy, self.state = options, data, strategy, state
        self.train_steps, self.evaluate, self.evals = train_steps, evaluate, evals
        self.checkpointer, self.best = checkpointer, best
        self.writer, self.progress = writer, progress
        self.preemption, self.watchdog, self.starts = preemption, watchdog, starts
        self.profiler = profiler
        self.micro_batch, self.note, self.chief = micro_batch, note, is_chief(strategy)
        self.calendar = Calendar(
            total=options.total_steps,
            log=options.log_steps,
            save=options.save_steps,
            evaluate=options.eval_steps,
            draw=options.figures_steps,
            evals={name: entry.every for name, entry in options.evaluation.evals.items()},
            watch=options.monitor.watch.every,
            bounds=profiler.bounds,
        )
        self.drawing = Drawing(
            options.model.network,
            options.evaluation.pipe,
            functools.partial(images_to_inspect, options.evaluation, data),
            writer,
            note=note,
        )
        self.pace = Pace()
        self.meter = Meter(
            batch_size=options.input.batch_size, num_devices=strategy.num_replicas_in_sync
        )
        self.scalars = Scalars(options, state, strategy, self.meter)
        # Made once for all checkpoints: it takes a second with many files.
        self.fingerprint = data.sources["train"].fingerprint()
        self.first = int(state.step.numpy())  # the step at which this process begins
        # Sums since the last log. They are tensors, so that adding to them waits for no device.
        self.sums: dict[str, tf.Tensor] = {}
        # Damaged examples masked since `first`, over all hosts; a tensor, too.
        self.masked = tf.zeros(())
        # Seconds since the last log in which calls that did not compile waited for input; becomes a
        # tensor, too, on the device where the step leaves it.
        self.stalled: float | tf.Tensor = 0.0
        self.saved_step, self.saved_time = -1, time.monotonic()
        # The split and the steps whose examples are being read, for the message if that fails. It
        # begins with the images that TensorBoard shows.
        self.split, self.steps_read = "train", range(self.first, self.first + 2)

    def run(self, *, evaluated: Collection[str]) -> dict[str, float]:
        """Trains to the end; returns the last metrics.

        Args:
          evaluated: what an earlier start has judged at the first step: "val", and names in
            config.evals.
        """
        total, step, first = self.calendar.total, self.first, self.first
        metrics: dict[str, float] = {"step": float(first)}
        # An evaluation that was given up when the run was stopped is made up for.
        # So is the best one's, even if it was judged: the run may have ended before it was saved.
        again = {self.best.name} if self.best.step != first else set()
        metrics |= self.judge_all(self.due(first), first, without=set(evaluated) - again)
        tensors: dict[str, tf.Tensor] = {}
        batches = iter(train_data(self.options, self.data, self.strategy, first_step=first))
        self.meter.start(first)
        self.starts.spending.switch("compiling")
        asked = _Asked(stop=False, save=False, steps=self.pace.limit)
        logged = False
        # The order within a turn: train, log (which finds a loss that is not finite), save, then
        # evaluate. What is trained is saved before anything else can fail.
        while step < total and not self.is_over(step):
            n = min(self.calendar.steps_to_event(step), asked.steps)
            with self.profiler.step(step):
                tensors = self.call(batches, step, n)
            step += n
            self.look(step, tensors)
            asked = self.ask()
            # Only now: after its first call a host waits here for those that compile longer.
            self.starts.spending.switch("steps")
            # The first event of any kind is logged as well, so that a person sees the run moving.
            event = self.calendar.steps_to_event(step - n) == n
            if self.calendar.logs_at(step) or (event and not logged):
                metrics |= self.log(step, tensors)
                logged = True
            if self.calendar.saves_at(step) or asked.save:
                self.save(step, tensors)
            if self.calendar.draws_at(step):
                self.draw(step)
            stop = asked.stop
            due = self.due(step)
            if due and not stop:
                metrics |= self.judge_all(due, step)
                stop = self.preemption.requested()
            if stop:
                return self.stop(step, tensors, metrics)
        done: list[str] = []
        if step < total:
            self.note(f"step {step}: nothing better since step {self.best.step}; the run ends here")
            done = self.due(step)
            # A run that is started again has this checkpoint.
            if step > first:
                self.save(step, tensors)
        # The last checkpoint is being written meanwhile.
        metrics |= self.judge_all(["val", "test", *self.calendar.evals], step, without=done)
        self.finish_saving(step)
        self.drawing.finish(stop=self.preemption.requested)
        if self.preemption.requested():
            self.starts.stopped(self.preemption.received)
            metrics["preempted"] = 1.0
        return {**metrics, "step": float(step)}

    def call(self, batches: Any, step: int, n: int) -> dict[str, tf.Tensor]:
        """Runs n steps, the first of them number `step`; returns the metrics since the last log."""
        # Batches are prefetched, so what fails to be read may belong to later steps.
        self.split, self.steps_read = "train", range(step, step + n + self.options.input.prefetch)
        self.watchdog.progress(step)
        began = time.monotonic()
        # A tensor: a Python int would be traced and compiled again for each new value.
        tensors = self.train_steps(batches, tf.constant(n, tf.int64))
        seconds = time.monotonic() - began
        self.pace.done(n, seconds)
        # The first call compiles: its time is none of a step.
        if step > self.first:
            self.meter.called(n, seconds)
        waited = tensors.pop("input_wait")
        self.meter.waited += waited
        self.stalled += waited if step > self.first else 0.0
        self.masked += tensors.pop("masked", 0.0)
        # The step returns means over a call; calls have different numbers of steps, so the means
        # are weighted by them.
        for name in ("loss", "accuracy"):
            self.sums[name] = self.sums.get(name, 0.0) + tensors[name] * float(n)
        self.sums["steps"] = self.sums.get("steps", 0.0) + float(n)
        means = {name: self.sums[name] / self.sums["steps"] for name in ("loss", "accuracy")}
        return {**tensors, **means}

    def ask(self) -> _Asked:
        """Lets the hosts agree on what comes next; all get the same answer after the same step.

        Signals and clocks differ from host to host; if one host saved or left alone, the others
        would hang in their next all-reduce.
        """
        minutes = self.options.save_minutes
        save = self.chief and minutes > 0 and time.monotonic() - self.saved_time >= 60 * minutes
        # One gather of one number for each host: bit 0 is stop, bit 1 is save, the rest the steps.
        mine = self.preemption.noticed | save << 1 | self.pace.limit << 2
        answers = all_hosts(self.strategy, mine)
        return _Asked(
            stop=any(a & 1 for a in answers),
            save=any(a & 2 for a in answers),
            steps=min(a >> 2 for a in answers),
        )

    def look(self, step: int, tensors: dict[str, tf.Tensor]) -> None:
        """Writes what a look at the variables has found, and a profile that ends here."""
        found = {k: tensors.pop(k) for k in list(tensors) if k.startswith(PREFIX)}
        if self.chief and found and self.calendar.watches_at(step):
            names = list(self.state.optimizer.variables)
            for kind in KINDS:
                norms = found[f"{PREFIX}{kind}/norms"].numpy()
                counts = found.get(f"{PREFIX}{kind}/counts")
                self.writer.watched(
                    step, kind, names, norms, None if counts is None else counts.numpy()
                )
        if self.profiler.ends_at(step):
            with self.meter.pause("profile"), self.starts.spending.on("profiling"):
                self.profiler.stop(lambda: float(tensors["loss"]))

    def log(self, step: int, tensors: Mapping[str, tf.Tensor]) -> dict[str, float]:
        """Fetches and writes the metrics; between saves the one wait for the device (law 4)."""
        # float() waits until the device has done the steps so far.
        metrics = {k: float(v) for k, v in tensors.items() if k != "applied"}
        self.sums = {}
        self._check_finite()
        times = {f"speed/{k}": v for k, v in self.meter.step_times().items()}
        metrics |= self.meter.read(step)
        # A save that failed in the background ends the run here, at the next log.
        self.checkpointer.poll()
        self.best.poll()
        if self.state.model.compute_dtype == "float16":
            metrics["loss_scale"] = float(self.state.loss_scale.numpy())
            metrics["skipped_steps"] = float(step - int(self.state.updates.numpy()))
        metrics["weight_norm"] = _norm(self.state)
        num_examples = self.data.sources["train"].num_examples
        metrics["epoch"] = step * self.options.input.batch_size / num_examples
        if self.data.damage:
            metrics |= self._count_masked(step)
        self.starts.spending.stalled(float(self.stalled))
        self.stalled = 0.0
        self.starts.note(step)
        more = {**times, **self.scalars.read(step, metrics)}
        rows = {f"train/{k}": v for k, v in metrics.items()}
        self.writer.scalars(step, {**rows, **more, **self.starts.scalars()})
        if self.chief:
            shown = ["loss", "accuracy", "learning_rate", "grad_norm", "examples_per_second"]
            shown += [k for k in ("loss_scale", "skipped_steps") if k in metrics]
            shown += ["masked"] if metrics.get("masked") else []
            eta = self.meter.eta(step, self.calendar.total)
            self.progress.update(step, {k: metrics[k] for k in shown}, eta=eta)
        return metrics

    def _count_masked(self, step: int) -> dict[str, float]:
        """Counts damaged examples: "masked" over all hosts, "masked_REASON" as this host saw them.

        Raises:
          DataError: they are more than config.input.max_bad_share.
        """
        count = int(self.masked.numpy())
        damage, batch_size = self.data.damage["train"], self.options.input.batch_size
        seen = (step - self.first) * batch_size
        damage.check_share(count, seen=seen, repeats=self.options.input.repeats)
        # Not of prefetched batches, which have not been trained on yet.
        reasons = damage.counts(before=step * batch_size)
        return {"masked": float(count), **{f"masked_{k}": float(v) for k, v in reasons.items()}}

    def _check_finite(self) -> None:
        # The device has stopped all updates at this step already; the host only learns of it here.
        bad = int(self.state.first_bad_step.numpy())
        if bad >= 0:
            raise DivergedError(
                f"the loss or gradient of step {bad} is not finite. The weights are as they were "
                "before it and the last checkpoint is good: lower optimizer.learning_rate, or "
                "lengthen the warmup, or set precision=float32, and run again"
            )

    def due(self, step: int) -> list[str]:
        """What is judged at `step`, before the end: "val", names in config.evals."""
        val = ["val"] if self.calendar.evaluates_at(step) else []
        return val + self.calendar.evals_at(step)

    def is_over(self, step: int) -> bool:
        """Whether the run ends at `step` as it has become no better for long; alike on all hosts.

        Only where it is judged, so that a run which was stopped in between ends at the same step.
        """
        return self.best.is_over(step) and self.best.name in self.due(step)

    def judge_all(
        self, names: Sequence[str], step: int, *, without: Collection[str] = ()
    ) -> dict[str, float]:
        """Judges one after the other until a signal to stop comes."""
        metrics: dict[str, float] = {}
        for name in names:
            # All hosts ask alike: the answer is gathered from all of them.
            if name not in without and not self.preemption.requested():
                found = self.judge(name, step)
                metrics |= found
                if found and name == self.best.name:
                    self.keep_best(step, {k.removeprefix(f"{name}_"): v for k, v in found.items()})
        return metrics

    def keep_best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Starts to write the state beside the newest ones if it is the best so far."""
        if self.best.is_better(step, metrics):
            self.note(f"step {step}: the best so far, kept in the folder {BEST} of the run")
            with self.meter.pause("saving"), self.starts.spending.on("saving"):
                self.best.save(*self.collect(), step=step)

    def judge(self, split: str, step: int) -> dict[str, float]:
        """Evaluates a split, or as one of config.evals says.

        Returns:
          {} if the config does not name it, or if a signal to stop came.
        """
        named = split in self.calendar.evals
        if not named and split not in self.data.sources:
            return {}

        # Called after each batch: it also tells the watchdog that the evaluation gets on.
        def stop() -> bool:
            self.watchdog.progress(step, f"the evaluation of {split}")
            return self.preemption.requested()

        self.watchdog.progress(step, f"the evaluation of {split}")
        with self.meter.pause("evaluation"), self.starts.spending.on("evaluating"):
            read = self.options.evaluation.evals[split].split if named else split
            self.split, self.steps_read = read, range(0)
            metrics = (self.evals if named else self.evaluate)(split, stop=stop)
        self.starts.note(step)
        if metrics is None:
            self.note(f"step {step}: the evaluation on {split} is given up, to be done at a resume")
            return {}
        self.writer.scalars(step, {f"{split}/{k}": v for k, v in metrics.items()})
        if named:
            shown = [f"{k} {v:.4f}" for k, v in metrics.items() if k != "examples"]
            # All of them are in metrics.jsonl; with an accuracy for each class they are many.
            text = ", ".join(shown[:8] + ["..."] * (len(shown) > 8))
        else:
            text = f"accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f}"
        self.note(f"step {step}: {split} {text} on {metrics['examples']:.0f} examples")
        return {f"{split}_{k}": v for k, v in metrics.items()}

    def save(self, step: int, tensors: Mapping[str, tf.Tensor]) -> None:
        """Starts to write a checkpoint (chief only), never of a state that went wrong."""
        if step == self.saved_step:
            return
        self.watchdog.progress(step, "the save")
        # Before the clocks are set to saving: it waits until the device has done the steps so far.
        self._check_finite()
        # In float16 a run that diverges skips updates until its loss scale is down to 1, and then
        # ends. Its weights are not worth replacing an older, good checkpoint.
        if not float(tensors.get("applied", 1.0)) and step < self.calendar.total:
            self.note(f"step {step}: not saved, its update was skipped (float16 overflow)")
            return
        with self.meter.pause("saving"), self.starts.spending.on("saving"):
            self.saved_step, self.saved_time = step, time.monotonic()
            arrays, notes = self.collect()
            # Before the save begins: a checkpoint whose step no line tells would seem to come from
            # nowhere.
            self.starts.note(step)
            if self.chief:
                self.checkpointer.save(arrays, step=step, notes=notes)

    def draw(self, step: int) -> None:
        """Begins to draw the model's inside (chief only); a thread does it while training goes on.

        At the end the drawing is waited for, so that the last one is always there.
        """
        if self.chief:
            if step == self.calendar.total:
                self.drawing.finish(stop=self.preemption.requested)
            with self.meter.pause("figures"):
                self.drawing.begin(step, self.state.eval_model)

    def collect(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The state and the notes of a checkpoint, on the chief; a collective."""
        # Copied now, so that training can go on while a thread writes. Sharded state is fetched by
        # a collective, in which all hosts take part.
        arrays = self.state.to_arrays() if self.chief or self.state.read_by_all_hosts else {}
        notes = {
            "config": self.options.record,
            "model": self.state.model.get_config(),
            "data": self.fingerprint,
            "class_names": list(self.data.sources["train"].class_names),
            "micro_batch": self.micro_batch,
        }
        # As a resume will read them from JSON: tuples are lists, unknown objects strings.
        return arrays, json.loads(json.dumps(notes, default=str))

    def finish_saving(self, step: int) -> None:
        """Waits until the last checkpoint is written; only the chief has one to wait for."""
        self.watchdog.progress(step, "the last save")
        with self.starts.spending.on("saving"):
            self.checkpointer.wait()
            self.best.wait()
        # A host that left now could take the chief with it: engines end or restart a job as soon
        # as one of its processes has ended.
        all_hosts(self.strategy, 0)

    def stop(
        self, step: int, tensors: Mapping[str, tf.Tensor], metrics: dict[str, float]
    ) -> dict[str, float]:
        """Saves and ends early, after a signal."""
        self.starts.stopped(self.preemption.received)
        self.save(step, tensors)
        self.finish_saving(step)
        self.note(f"step {step}: stopped on request, saved; run the same command to go on")
        return {**metrics, "step": float(step), "preempted": 1.0}

    def reading(self) -> Reading:
        """What is being read now, so that a failure can be explained."""
        if self.split != "train":
            return Reading(self.split, self.options.evaluation.pipe)

        # Called only if reading fails: which examples the steps in question read.
        def indices() -> list[int]:
            return train_indices(
                self.data.sources["train"],
                batch_size=self.options.input.batch_size,
                seed=self.options.seed,
                first_step=self.steps_read.start,
                num_steps=len(self.steps_read),
                repeats=self.options.input.repeats,
            ).tolist()

        return Reading("train", self.options.input.pipe, indices)


def _norm(state: TrainState) -> float:
    return float(
        tf.linalg.global_norm([tf.convert_to_tensor(w.value) for w in state.model.weights])
    )


def _announce(
    options: RunOptions,
    data: Data,
    strategy: tf.distribute.Strategy,
    state: TrainState,
    workdir: str,
    origin: str,
    writer: Writer,
    note: Callable[..., None],
) -> None:
    """Shows and records what the run begins with: config, devices, model, data, first images."""
    text = json.dumps(options.record, indent=2, sort_keys=True)
    first, chief = int(state.step.numpy()), is_chief(strategy)
    if chief:
        write_whole(expand(workdir) / "config.json", text.encode())
        devices = {"replicas": strategy.num_replicas_in_sync, "hosts": num_hosts(strategy)}
        record = options.record
        writer.summary(first, lambda: hparams.session_start(record, devices=devices))
        writer.text(first, "run", run_text(options, strategy))
        writer.text(first, "config", config_text(record))
        writer.text(first, "config_changes", changes_text(record))
        writer.text(first, "model", model_text(state.model, options.model.network))
        writer.text(first, "weights", f"```\n{origin}\n```")
    detail("config: %s", text)
    detail("TensorFlow %s said while it started:\n%s", tf.__version__, notices().rstrip() or "-")
    source = data.sources["train"]
    batch_size, accumulation = options.input.batch_size, options.step.accumulation
    note(describe(strategy, batch_size=batch_size, accumulation=accumulation))
    height, width = options.image_size
    note(
        f"model {options.record['model']['variant']} at {height}x{width}: "
        f"{state.model.count_params():,} parameters"
    )
    note(
        f"{source.num_examples:,} training examples in {source.num_classes} classes; "
        f"{options.total_steps:,} steps"
    )
    warnings = device_warnings(strategy)
    warnings += jit_warnings(
        options.step.jit,
        kind=device_kind(strategy),
        num_replicas=strategy.num_replicas_in_sync,
    )
    if chief:
        pipes = {"train_pipe": options.input.pipe, "eval_pipe": options.evaluation.pipe}
        warnings += data_warnings(data.splits, options.image_size)
        warnings += pixel_warnings(data.sources, **pipes)
    for line in [*warnings, *average_warnings(options.step.ema_decay, options.total_steps)]:
        note(f"warning: {line}")
    for line in origin.splitlines():
        note(line)
    # Not at a resume on a stream, which would have to be read up to the first step once more.
    if chief and first < options.total_steps and (source.indexable or not first):
        sheet = draw_grid(first_images(options, data, strategy, first_step=first))
        writer.images(first, "train/batch", np.asarray(sheet)[np.newaxis])
    note(f"TensorBoard: tensorboard --logdir {workdir}")


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
