"""What a run does, decided: a config turned into typed values, every one of them checked.

`run/check.py` makes these from a config; nothing behind it reads the config again. Durations are in
steps, names are resolved, what can be built without a device (loss, schedule, pipes) is built.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit_dist.data.damage import Damage
from vit_dist.data.mixing import Mixing
from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.sources.source import Source
from vit_dist.training.losses import Loss
from vit_dist.training.optimizer import OptimizerOptions
from vit_dist.training.schedules import Schedule
from vit_dist.training.step import StepOptions


@dataclasses.dataclass(frozen=True)
class Data:
    """The opened splits of a run, and what was found damaged in them. These live, and count.

    Attributes:
      sources: split -> source: "train", "val", "test", as far as the config names them.
      damage: the same keys where damaged examples are masked; else empty.
    """

    sources: Mapping[str, Source]
    damage: Mapping[str, Damage]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How the model is built.

    Attributes:
      network: the arguments of ViT, see model.variants.vit_config.
      precision: of activations: "float32", "bfloat16" or "float16".
      seed: of the initial weights.
      head_bias, posemb_stddev: of the initial weights; see model.vit.build_vit.
    """

    network: Mapping[str, Any]
    precision: str
    seed: int
    head_bias: float
    posemb_stddev: float


@dataclasses.dataclass(frozen=True)
class WeightsOptions:
    """How weights from elsewhere are fitted to the model.

    Attributes:
      posemb_method: how position embeddings are resampled; see model.posemb.
      patch_method: what to do about a patch kernel of another size; see model.weights.
      ignore: regex of tensors of the file that may be left out.
      image_size: (height, width) that the weights were trained at, where the file does not tell.
    """

    posemb_method: str = "align_corners"
    patch_method: str = "refuse"
    ignore: str = ""
    image_size: tuple[int, int] | int | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What it takes to judge a model.

    Attributes:
      model: how it is built.
      strategy: arguments of cluster.strategy.make_strategy.
      pipe: prepares the images of val and test.
      batch_size: over all replicas.
      num_threads: that make batches; None for as many as tf.data finds useful.
      loss: the training's, without label smoothing.
      labels_sum_to_one: whether labels that are rows must be distributions; not for a sigmoid loss.
      jit: "auto", "whole", "split" or "off"; see training.step.choose_jit.
      weights: how weights from elsewhere are fitted.
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


@dataclasses.dataclass(frozen=True)
class InputOptions:
    """What it takes to make the batches of a training.

    Attributes:
      pipe: prepares the images.
      batch_size: examples per optimizer step, over all replicas.
      num_threads: that make batches; None for as many as tf.data finds useful.
      prefetch: batches per replica that are kept ready.
      repeats: copies of each example in a batch.
      mixing: mixup and CutMix; None for none.
      services: addresses of data services; empty where this process makes the batches.
      service_timeout: seconds.
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
class RunOptions:
    """All that a training does.

    Attributes:
      evaluation: model, devices, and how val and test are judged.
      input: how batches are made.
      optimizer, step, schedule, loss: what a step does with them.
      seed: of data order, augmentation and dropout.
      total_steps: of the whole run.
      log_steps, eval_steps, save_steps: how often; 0 for never before the end.
      save_minutes: how often by the clock, beside save_steps; 0 for never.
      keep_checkpoints: how many of the newest stay.
      resume_from, init_from: where an empty workdir takes its state or weights from; "" for none.
      record: the resolved config as JSON values, to be written beside what the run leaves.
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
    save_minutes: float
    keep_checkpoints: int
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
