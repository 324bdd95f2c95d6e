"""The options of a run: a config turned into typed values that have all been checked.

`run/check.py` makes them from a config; after it nothing reads the config again. Durations are in
steps, names are resolved, and what can be built without a device (loss, schedule, pipes) is built.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vit_dist.costs.devices import Device
from vit_dist.data.damage import Damage
from vit_dist.data.mixing import Mixing
from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.sources.source import Source
from vit_dist.evaluators.registry import Kind
from vit_dist.run.sources import SPLITS
from vit_dist.training.losses import Loss
from vit_dist.training.optimizer import OptimizerOptions
from vit_dist.training.schedules import Schedule
from vit_dist.training.step import StepOptions
from vit_dist.training.watch import WatchOptions


@dataclasses.dataclass(frozen=True)
class Data:
    """The opened splits of a run, and the count of examples found damaged in them.

    Unlike the options in this file these objects change: files are opened, damage is counted.

    Attributes:
      sources: split -> source, for those of "train", "val" and "test" that the config names, and
        for what config.evals names besides.
      damage: split -> its count of damaged examples; empty unless damaged examples are masked.
    """

    sources: Mapping[str, Source]
    damage: Mapping[str, Damage]

    @property
    def splits(self) -> dict[str, Source]:
        """The sources of "train", "val" and "test", those that there are."""
        return {split: source for split, source in self.sources.items() if split in SPLITS}


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the model is built.

    Attributes:
      network: the arguments of ViT, see model.variants.vit_config.
      precision: dtype of activations, "float32", "bfloat16" or "float16".
      seed: decides the initial weights.
      head_bias, posemb_stddev: numbers of the initial weights; see model.vit.build_vit.
      auto_remat: whether the devices decide `network["remat"]`, see planning.Planner.
    """

    network: Mapping[str, Any]
    precision: str
    seed: int
    head_bias: float
    posemb_stddev: float
    auto_remat: bool = False


@dataclasses.dataclass(frozen=True)
class WeightsOptions:
    """How weights from elsewhere are fitted to the model.

    Attributes:
      posemb_method: how position embeddings are resampled; see model.posemb.
      patch_method: what to do about a patch kernel of another size; see model.weights.
      ignore: regex; tensors of the file whose names it matches may be left out.
      image_size: pixels, (height, width) or one number for both, of the images that the weights
        were trained on, where the file does not tell.
    """

    posemb_method: str = "align_corners"
    patch_method: str = "refuse"
    ignore: str = ""
    image_size: tuple[int, int] | int | None = None


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """One of config.evals.

    Attributes:
      name: before its metrics: "NAME/metric".
      kind: what it judges, and whether it needs training examples.
      evaluate: made by the kind with the options of the config.
      split: key of Data.sources: the examples that are judged; for a kind that averages other
        evaluations that of the first of them, and so are the entries below.
      train: key of Data.sources: the examples to learn from; "" for kinds that need none.
      pipe: prepares the images of both.
      where: the config key that gave the pipe, for messages.
      every: steps between two evaluations of a training; 0 for at its end alone.
      image_size: (height, width) that the network is judged at, pixels.
      present: whether logits of classes without examples are left out.
      metrics: names of what it can find; None where the kind does not tell.
      columns: the place among the model's classes of each class of the split, for kinds that judge
        logits; () where the classes are the same.
    """

    name: str
    kind: Kind
    evaluate: Callable[..., Mapping[str, float]]
    split: str
    train: str
    pipe: Pipe
    where: str
    every: int
    image_size: tuple[int, int]
    present: bool
    metrics: tuple[str, ...] | None
    columns: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What it takes to judge a model.

    Attributes:
      model: how it is built.
      strategy: arguments of cluster.strategy.make_strategy.
      pipe: prepares the images of val and test.
      batch_size: over all replicas.
      num_threads: threads that make batches; None for as many as tf.data finds useful.
      loss: the training's kind of loss, without label smoothing.
      labels_sum_to_one: whether a label given as a row must sum to 1; not for a sigmoid loss.
      jit: "auto", "whole", "split" or "off"; see training.step.choose_jit.
      weights: how weights from elsewhere are fitted.
      evals: further evaluations by name, in the order of the config.
      verdicts: whether evaluations tell what the model said of each example, for pictures.
      imports: the user's own modules, imported already.
    """

    model: ModelOptions
    strategy: Mapping[str, Any]
    pipe: Pipe
    batch_size: int
    num_threads: int | None
    loss: Loss
    labels_sum_to_one: bool
    jit: str
    weights: WeightsOptions
    evals: Mapping[str, EvalOptions] = dataclasses.field(default_factory=dict)
    verdicts: bool = False
    imports: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """What it takes to make the batches of a training.

    Attributes:
      pipe: prepares the images.
      batch_size: examples per optimizer step, over all replicas.
      num_threads: threads that make batches; None for as many as tf.data finds useful.
      prefetch: batches per replica that are kept ready.
      repeats: copies of each example in a batch.
      mixing: mixup and CutMix; None for none.
      services: addresses of data services; empty where this process makes the batches.
      service_timeout: seconds that a service may send nothing before the run ends.
    """

    pipe: Pipe
    batch_size: int
    num_threads: int | None
    prefetch: int
    repeats: int
    mixing: Mixing | None
    services: tuple[str, ...]
    service_timeout: float


@dataclasses.dataclass(frozen=True)
class BestOptions:
    """Which checkpoint is kept as the best, and how long a better one is waited for.

    Attributes:
      metric: "NAME/METRIC", NAME being "val" or one of config.evals.
      mode: "max" or "min".
      patience: steps without a better value after which the run ends; 0 for never.
    """

    metric: str
    mode: str
    patience: int


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """Which steps are profiled.

    Attributes:
      start_step: the first one, from 0; None for no profile.
      num_steps: how many.
    """

    start_step: int | None = None
    num_steps: int = 5


@dataclasses.dataclass(frozen=True)
class MonitorOptions:
    """What a training shows of itself beyond what costs nothing.

    Attributes:
      devices: the table of what devices can do, by which MFU is computed.
      watch: which norms and histograms the step computes.
      profile: which steps are profiled.
      batch_images: how many of the first batch; 0 for none.
      judged_images: how many of the worst and of the best images of an evaluation; 0 for none.
    """

    devices: tuple[Device, ...]
    watch: WatchOptions
    profile: ProfileOptions
    batch_images: int
    judged_images: int


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """All that a training does.

    Attributes:
      evaluation: model, devices, and how val and test are judged.
      input: how batches are made.
      optimizer, step, schedule, loss: what a step does with them.
      seed: decides data order, augmentation and dropout.
      total_steps: steps of the whole run.
      log_steps, eval_steps, save_steps: how often; 0 for never before the end.
      figures_steps: how often the model's inside is drawn; 0 for never.
      save_minutes: how often by the clock, beside save_steps; 0 for never.
      monitor: what it shows of itself.
      keep_checkpoints: how many of the newest stay.
      best: the one to keep beside them; None for none.
      resume_from, init_from: where a run in an empty workdir takes its state or its weights from;
        "" for none.
      record: the resolved config as JSON values, which is saved with the run and its checkpoints.
    """

    evaluation: EvaluationOptions
    input: InputOptions
    optimizer: OptimizerOptions
    step: StepOptions
    schedule: Schedule
    loss: Loss
    seed: int
    total_steps: int
    log_steps: int
    eval_steps: int
    save_steps: int
    figures_steps: int
    save_minutes: float
    monitor: MonitorOptions
    keep_checkpoints: int
    best: BestOptions | None
    resume_from: str
    init_from: str
    record: Mapping[str, Any]

    @property
    def model(self) -> ModelOptions:
        """How the model is built."""
        return self.evaluation.model

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what the model takes, pixels."""
        return self.model.network["image_size"]
