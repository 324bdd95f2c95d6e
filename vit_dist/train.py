"""Trains a Vision Transformer: python -m vit_dist.train --config FILE --workdir FOLDER.

main -> check the config -> train: strategy, state, restore, data, then the loop. Run the same
command again and it resumes from the newest whole checkpoint in the workdir.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from vit_dist.run import cli  # before TensorFlow, whose start-up notices it turns down

# isort: split
import tensorflow as tf
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from vit_dist.cluster.hosts import all_hosts, describe, device_kind, is_chief
from vit_dist.cluster.preemption import Preemption
from vit_dist.cluster.strategy import make_strategy
from vit_dist.config import defaults as config_lib
from vit_dist.data.damage import check_share
from vit_dist.evaluators.classification import make_evaluator
from vit_dist.monitoring.meter import Meter
from vit_dist.monitoring.progress import Progress
from vit_dist.monitoring.writer import Writer, make_writer
from vit_dist.run.advice import average_warnings, data_warnings
from vit_dist.run.build import make_state
from vit_dist.run.check import Run, check, check_parts
from vit_dist.run.explain import explain_error
from vit_dist.run.input import eval_data, first_images, train_data
from vit_dist.run.start import check_data, check_hosts, find_start, restore_or_init
from vit_dist.training.checkpoint import Checkpointer
from vit_dist.training.losses import make_loss
from vit_dist.training.schedules import make_schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import choose_jit, make_train_step

PREEMPTED = 42  # exit code after SIGTERM: saved, start again to go on (as TensorFlow's handler)


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "folder of this run: checkpoints, metrics, config")


def main() -> int:
    """The command; returns its exit code."""
    config = cli.load_config()
    if not flags.FLAGS.workdir:
        raise ValueError("give a folder for this run: --workdir runs/NAME")
    logging.set_verbosity(logging.INFO)
    metrics = train(config, flags.FLAGS.workdir)
    return PREEMPTED if metrics.get("preempted") else 0


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Trains as the config says, or resumes if the workdir holds a checkpoint.

    Args:
      config: finalised; see config.get_defaults.
      workdir: folder of the run, local or gs://; made if absent.

    Returns:
      The last metrics: "step", "loss", ..., "val_accuracy" and "test_accuracy" where those splits
      are configured, "preempted" 1.0 if SIGTERM ended the run early.

    Raises:
      ValueError: a mistake in the config or the data; see check.
      FloatingPointError: the loss or gradient is not finite; the last good checkpoint stays.
      OSError: the workdir cannot be written.
      ConnectionError: another worker is gone.
    """
    run = check(config)
    start = find_start(workdir, run.config)
    check_data(start, run)
    _make_folder(workdir)
    strategy = make_strategy(**run.strategy)
    check_parts(run.step, run.mixing, num_replicas=strategy.num_replicas_in_sync)
    check_hosts(start, strategy)
    state = make_state(run, strategy)
    origin = restore_or_init(state, run, start)
    del start  # its arrays would take up memory to the end
    first, chief = int(state.step.numpy()), is_chief(strategy)
    checkpointer = Checkpointer(workdir, keep=run.config.keep_checkpoints)
    with (
        Preemption(strategy) as preemption,
        make_writer(workdir, first_step=first, active=chief) as writer,
        Progress(run.total_steps, first_step=first, title="train") as progress,
    ):
        note = progress.note if chief else logging.info
        _announce(run, strategy, state, workdir, origin, writer, note)
        loop = _Loop(run, strategy, state, checkpointer, writer, progress, preemption, note)
        try:
            metrics = loop.run(first)
        except Exception as error:
            _finish_saving(checkpointer)
            loop.explain(error, workdir)
            raise
    all_hosts(strategy, 0)  # stay until the chief has saved: who leaves takes the cluster down
    if chief:
        print(result_line(metrics, workdir), flush=True)
    return metrics


def _make_folder(workdir: str) -> None:
    try:
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the workdir {workdir} ({error.strerror}): give another --workdir"
        ) from error


def _finish_saving(checkpointer: Checkpointer) -> None:
    """Before leaving with an error: what was begun before it is good."""
    try:
        checkpointer.wait()
    except OSError as error:
        logging.error("%s", error.strerror)


class _Loop:
    """The training loop and what happens between its calls: log, evaluate, save, preempted."""

    def __init__(self, run, strategy, state, checkpointer, writer, progress, preemption, note):
        self.r, self.strategy, self.state = run, strategy, state
        self.checkpointer, self.writer, self.progress = checkpointer, writer, progress
        self.preemption, self.note, self.chief = preemption, note, is_chief(strategy)
        replicas = strategy.num_replicas_in_sync
        self.meter = Meter(batch_size=run.batch_size, num_devices=replicas)
        kind = device_kind(strategy)
        jit = choose_jit(
            run.step["jit"], kind=kind, num_replicas=replicas, sharded=run.optimizer["shard_state"]
        )
        self.train_steps = make_train_step(
            state,
            make_loss(**run.loss),
            strategy=strategy,
            schedule=make_schedule(**run.schedule),
            preprocess=run.train_pipe.device,
            batch_size=run.batch_size,
            seed=run.config.seed,
            accumulation=run.step["accumulation"],
            clip_norm=run.step["clip_norm"],
            ema_decay=run.step["ema_decay"],
            all_reduce_dtype=run.step["all_reduce_dtype"],
            jit=jit,
            mixing=run.mixing,
            masked=bool(run.damage),
        )
        self.evaluate = make_evaluator(
            state.eval_model,
            make_loss(name=run.loss["name"]),
            strategy=strategy,
            preprocess=run.eval_pipe.device,
            jit=jit != "off",
        )
        self.datasets: dict[str, Any] = {}
        self.fingerprint = run.sources["train"].fingerprint()  # takes a second with many files
        self.masked = tf.zeros(())  # examples of this process; on the device until logged
        self.saved = -1  # the step of the newest checkpoint of this process
        self.reading: tuple[str, range] = ("train", range(0))  # split and steps, for messages

    def run(self, first: int) -> dict[str, float]:
        """Steps `first` to the end; returns the last metrics."""
        run, total = self.r, self.r.total_steps
        metrics: dict[str, float] = {"step": float(first)}
        self.first = first
        batches = iter(train_data(run, self.strategy, first_step=first))
        step = first
        self.meter.start(first)
        while step < total:
            n = self._until_next_event(step)
            self.reading = ("train", range(step, step + n + run.config.input.prefetch))
            tensors = self.train_steps(batches, tf.constant(n, tf.int64))
            self.masked += tensors.pop("masked", 0.0)
            self.meter.waited += tensors.pop("input_wait")
            step += n
            if step % run.log_steps == 0 or step == total or step - n == first:
                metrics |= self.log(step, tensors)
            if run.eval_steps and step % run.eval_steps == 0 and step < total:
                metrics |= self.judge("val", step)
            if run.save_steps and step % run.save_steps == 0 and step < total:
                self.save(step)
            if self.preemption.requested():
                return self.stop(step, metrics)
        if step > first:
            self.save(step)
        for split in ("val", "test"):
            metrics |= self.judge(split, step)
        self.checkpointer.wait()
        return {**metrics, "step": float(step)}

    def _until_next_event(self, step: int) -> int:
        ends = [self.r.total_steps - step]
        for every in (self.r.log_steps, self.r.eval_steps, self.r.save_steps):
            if every:
                ends.append(every - step % every)
        return min(ends)

    def log(self, step: int, tensors: Mapping[str, tf.Tensor]) -> dict[str, float]:
        """Fetches the step's metrics; the one place where the host waits for the device."""
        metrics = {k: float(v) for k, v in tensors.items()}
        self._check_finite()
        metrics |= self.meter.read(step)
        self.checkpointer.poll()
        if self.state.model.compute_dtype == "float16":
            metrics["loss_scale"] = float(self.state.loss_scale.numpy())
            metrics["skipped_steps"] = float(step - int(self.state.updates.numpy()))
        metrics["weight_norm"] = _norm(self.state)
        metrics["epoch"] = step * self.r.batch_size / self.r.sources["train"].num_examples
        if self.r.damage:
            metrics |= self._count_masked(step)
        self.writer.scalars(step, {f"train/{k}": v for k, v in metrics.items()})
        if self.chief:
            shown = ["loss", "accuracy", "learning_rate", "grad_norm", "examples_per_second"]
            shown += [k for k in ("loss_scale", "skipped_steps") if k in metrics]
            shown += ["masked"] if metrics.get("masked") else []
            eta = self.meter.eta(step, self.r.total_steps)
            self.progress.update(step, {k: metrics[k] for k in shown}, eta=eta)
        return metrics

    def _count_masked(self, step: int) -> dict[str, float]:
        """How many damaged examples this process has trained without, and why (this host's)."""
        count = int(self.masked.numpy())
        check_share(
            count,
            seen=(step - self.first) * self.r.batch_size,
            num_examples=self.r.sources["train"].num_examples,
            limit=self.r.config.input.max_bad_share,
        )
        reasons = self.r.damage["train"].counts()
        return {"masked": float(count), **{f"masked_{k}": float(v) for k, v in reasons.items()}}

    def _check_finite(self) -> None:
        bad = int(self.state.first_bad_step.numpy())
        if bad >= 0:
            raise FloatingPointError(
                f"the loss or gradient of step {bad} is not finite. The weights are as they were "
                "before it and the last checkpoint is good: lower optimizer.learning_rate, or "
                "lengthen the warmup, or set precision=float32, and run again"
            )

    def judge(self, split: str, step: int) -> dict[str, float]:
        """Evaluates a split, where the config names one."""
        if split not in self.r.sources:
            return {}
        with self.meter.pause():
            self.reading = (split, range(0))
            if split not in self.datasets:
                self.datasets[split] = eval_data(self.r, self.strategy, split)
            metrics = self.evaluate(self.datasets[split])
        self.writer.scalars(step, {f"{split}/{k}": v for k, v in metrics.items()})
        self.note(
            f"step {step}: {split} accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.4f} "
            f"on {metrics['examples']:.0f} examples"
        )
        return {f"{split}_{k}": v for k, v in metrics.items()}

    def save(self, step: int) -> None:
        """Starts to write a checkpoint (chief only), never of a state that went wrong."""
        if step == self.saved:
            return
        self.saved = step
        with self.meter.pause():
            self._check_finite()
            arrays = self.state.to_arrays() if self.chief or self.state.read_by_all_hosts else {}
            if self.chief:
                notes = {
                    "config": json.loads(config_lib.to_json(self.r.config)),
                    "model": self.state.model.get_config(),
                    "data": self.fingerprint,
                    "class_names": list(self.r.sources["train"].class_names),
                }
                notes = json.loads(json.dumps(notes, default=str))
                self.checkpointer.save(arrays, step=step, notes=notes)

    def explain(self, error: Exception, workdir: str) -> None:
        """Raises a readable error in place of TensorFlow's or the system's, if one can be given."""
        code = error.errno if isinstance(error, OSError) else None
        if isinstance(error, OSError) and code and error.strerror == os.strerror(code):
            raise OSError(
                code,
                f"{error.filename or workdir}: {error.strerror}. Checkpoints are untouched: make "
                "room or mend the storage and run again to resume",
            ) from error
        split, steps = self.reading
        reason = explain_error(error, self.r, self.strategy, split=split, steps=steps)
        if reason is not None:
            raise reason from error

    def stop(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Saves and ends early, after SIGTERM or Ctrl-C."""
        self.save(step)
        self.checkpointer.wait()
        self.note(f"step {step}: stopped on request, saved; run the same command to go on")
        return {**metrics, "step": float(step), "preempted": 1.0}


def _norm(state: TrainState) -> float:
    return float(
        tf.linalg.global_norm([tf.convert_to_tensor(w.value) for w in state.model.weights])
    )


def _announce(
    run: Run,
    strategy: tf.distribute.Strategy,
    state: TrainState,
    workdir: str,
    origin: str,
    writer: Writer,
    note: Any,
) -> None:
    text, first, chief = config_lib.to_json(run.config), int(state.step.numpy()), is_chief(strategy)
    if chief:
        (epath.Path(workdir) / "config.json").write_text(text)
        writer.text(first, "config", f"```json\n{text}\n```")
    logging.info("config: %s", text)
    source = run.sources["train"]
    note(describe(strategy, batch_size=run.batch_size, accumulation=run.step["accumulation"]))
    note(
        f"model {run.config.model.variant} at {run.model['image_size']}: "
        f"{state.model.count_params():,} parameters; {source.num_examples:,} training examples in "
        f"{source.num_classes} classes; {run.total_steps:,} steps"
    )
    warnings = data_warnings(run.sources, run.model["image_size"]) if chief else []
    for line in [*warnings, *average_warnings(run.step["ema_decay"], run.total_steps)]:
        note(f"warning: {line}")
    for line in origin.splitlines():
        note(line)
    # A stream would have to be skipped through once more.
    if chief and first < run.total_steps and (source.indexable or not first):
        writer.images(first, "train/batch", first_images(run, strategy, first_step=first))
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
