"""The training loop and what happens between its calls: log, save, evaluate, draw, stop.

`Loop.run` is the loop. The parts are handed in by vit_dist/train.py, when all of them are made and
the state is filled.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from vit_dist.cluster.hosts import all_hosts, is_chief
from vit_dist.cluster.preemption import Preemption
from vit_dist.cluster.watchdog import Watchdog
from vit_dist.config.errors import DivergedError
from vit_dist.data.pipeline import train_indices
from vit_dist.inspection.sheet import draw_grid
from vit_dist.monitoring.meter import Meter
from vit_dist.monitoring.profiler import Profiler
from vit_dist.monitoring.progress import Progress
from vit_dist.monitoring.starts import Starts
from vit_dist.monitoring.writer import Writer
from vit_dist.run.background import Background
from vit_dist.run.best import FOLDER as BEST
from vit_dist.run.best import Best
from vit_dist.run.build import Evaluation
from vit_dist.run.calendar import Calendar, Pace
from vit_dist.run.drawing import Drawing
from vit_dist.run.evals import Evals
from vit_dist.run.explain import Reading
from vit_dist.run.input import first_images, images_to_inspect, train_data
from vit_dist.run.judged import Judged
from vit_dist.run.options import Data, RunOptions
from vit_dist.run.scalars import Scalars
from vit_dist.storage.lock import WorkdirLock
from vit_dist.training.checkpoint import Checkpointer
from vit_dist.training.state import TrainState
from vit_dist.training.watch import KINDS, PREFIX


class Asked(NamedTuple):
    """What all hosts do after a call of the step; the same on each of them."""

    stop: bool  # a host got a signal
    save: bool  # the chief's clock says that it is time
    steps: int  # the most that the next call may run


@dataclasses.dataclass(frozen=True)
class Guards:
    """What a run has had since before its first device, and has until it ends.

    Attributes:
      preemption: signals to stop.
      watchdog: ends a run that stands still.
      lock: of the workdir.
      starts: what the time of this start goes into.
    """

    preemption: Preemption
    watchdog: Watchdog
    lock: WorkdirLock
    starts: Starts


class Loop:
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
        guards: Guards,
        profiler: Profiler,
        micro_batch: int,
        note: Callable[..., None],
    ):
        self.options, self.data, self.strategy, self.state = options, data, strategy, state
        self.train_steps, self.evaluate, self.evals = train_steps, evaluate, evals
        self.checkpointer, self.best = checkpointer, best
        self.writer, self.progress = writer, progress
        self.preemption, self.watchdog = guards.preemption, guards.watchdog
        self.starts, self.profiler = guards.starts, profiler
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
        self.background = Background(note=note)
        self.drawing = Drawing(
            options.model.network,
            options.evaluation.pipe,
            functools.partial(images_to_inspect, options.evaluation, data),
            writer,
            self.background,
        )
        self.judged = Judged(
            options.evaluation,
            data,
            writer,
            self.background,
            count=options.monitor.judged_images,
            figures=options.figures_steps > 0,
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
        # The split and the steps whose examples are being read, for the message if that fails.
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
        asked = Asked(stop=False, save=False, steps=self.pace.limit)
        logged = False
        # The order within a turn: train, log (which finds a loss that is not finite), save, then
        # evaluate. What is trained is saved before anything else can fail.
        while step < total and not self.is_over(step):
            n = min(self.calendar.steps_to_event(step), asked.steps)
            with self.profiler.step(step):
                tensors = self.call(batches, step, n)
            step += n
            if step - n == first:
                self.show_first()
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
                return self.stop(step, metrics)
        done: list[str] = []
        if step < total:
            self.note(f"step {step}: nothing better since step {self.best.step}; the run ends here")
            done = self.due(step)
            # A run that is started again has this checkpoint.
            if step > first:
                self.save(step)
        # The last checkpoint is being written meanwhile.
        metrics |= self.judge_all(["val", "test", *self.calendar.evals], step, without=done)
        self.judged.draw()
        self.finish_saving(step)
        self.finish_drawing()
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

    def ask(self) -> Asked:
        """Lets the hosts agree on what comes next; all get the same answer after the same step.

        Signals and clocks differ from host to host; if one host saved or left alone, the others
        would hang in their next all-reduce.
        """
        minutes = self.options.save_minutes
        save = self.chief and minutes > 0 and time.monotonic() - self.saved_time >= 60 * minutes
        # One gather of one number for each host: bit 0 is stop, bit 1 is save, the rest the steps.
        mine = self.preemption.noticed | save << 1 | self.pace.limit << 2
        answers = all_hosts(self.strategy, mine)
        return Asked(
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
        first, seen = self.first * batch_size, (step - self.first) * batch_size
        damage.check_share(count, seen=seen, first=first, repeats=self.options.input.repeats)
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
        # A step that went wrong since the last log left the weights as they were before it: they
        # may be the best, but whoever began with their state would end at once.
        self._check_finite()
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
            judge = self.evals if named else self.evaluate
            metrics = judge(split, stop=stop)
        self.starts.note(step)
        if metrics is None:
            self.note(f"step {step}: the evaluation on {split} is given up, to be done at a resume")
            return {}
        if self.chief and judge.verdicts is not None:
            self.judged.keep(split, step, judge.verdicts)
        self.writer.scalars(step, {f"{split}/{k}": v for k, v in metrics.items()})
        if named:
            shown = [f"{k} {v:.4f}" for k, v in metrics.items() if k != "examples"]
            # All of them are in metrics.jsonl; with an accuracy for each class they are many.
            text = ", ".join(shown[:8] + ["..."] * (len(shown) > 8))
        else:
            text = f"accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f}"
        self.note(f"step {step}: {split} {text} on {metrics['examples']:.0f} examples")
        return {f"{split}_{k}": v for k, v in metrics.items()}

    def save(self, step: int, tensors: Mapping[str, tf.Tensor] | None = None) -> None:
        """Starts to write a checkpoint (chief only), never of a state that went wrong.

        Args:
          step: number of steps done.
          tensors: of the last step, where nothing is to be saved if its update was skipped; None
            for a run that ends here, which would lose what it did since the last checkpoint.
        """
        if step == self.saved_step:
            return
        self.watchdog.progress(step, "the save")
        # Before the clocks are set to saving: it waits until the device has done the steps so far.
        self._check_finite()
        # In float16 a run that diverges skips updates until its loss scale is down to 1, and then
        # ends. Its weights are not worth replacing an older, good checkpoint.
        applied = tensors is None or float(tensors.get("applied", 1.0))
        if not applied and step < self.calendar.total:
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

    def show_first(self) -> None:
        """Lets the thread of pictures draw the first images that the step got.

        After the first call, which a person waits for: reading them takes a pipeline of its own.
        """
        count = self.options.monitor.batch_images
        # Not at a resume on a stream, which would have to be read up to the first step once more.
        streamed = self.first and not self.data.sources["train"].indexable
        if not self.chief or not count or streamed:
            return

        def draw() -> None:
            step = self.first
            cells = first_images(
                self.options, self.data, self.strategy, first_step=step, count=count
            )
            self.writer.images(step, "train/batch", np.asarray(draw_grid(cells))[np.newaxis])

        self.background.start("the first batch", draw)

    def draw(self, step: int) -> None:
        """Begins to draw the model's inside (chief only); a thread does it while training goes on.

        At the end the drawing is waited for, so that the last one is always there.
        """
        if self.chief:
            if step == self.calendar.total:
                self.finish_drawing()
            with self.meter.pause("figures"), self.starts.spending.on("drawing"):
                self.drawing.begin(step, self.state.eval_model)
            self.judged.draw()

    def finish_drawing(self) -> None:
        """Waits for the pictures; hosts without any return at once."""
        # This host's own signals alone: only the chief is here, and a look at those of all hosts
        # would be a collective, which the others answer with another number.
        with self.starts.spending.on("drawing"):
            self.background.finish(stop=lambda: self.preemption.noticed)

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
            # A host that left now could take the chief with it: engines end or restart a job as
            # soon as one of its processes has ended.
            all_hosts(self.strategy, 0)

    def stop(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Saves and ends early, after a signal."""
        self.starts.stopped(self.preemption.received)
        self.save(step)
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
