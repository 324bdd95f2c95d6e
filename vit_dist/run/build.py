"""From checked options to the parts of a run, made under its strategy."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from vit_dist.cluster.hosts import device_kind
from vit_dist.evaluators.classification import make_evaluator
from vit_dist.evaluators.verdicts import Verdicts
from vit_dist.model.variants import choose_form
from vit_dist.model.vit import ViT, build_vit, named_weights
from vit_dist.run.explain import Reading, explain_reading
from vit_dist.run.input import eval_data
from vit_dist.run.options import Data, EvaluationOptions, ModelOptions, RunOptions
from vit_dist.training.optimizer import make_optimizer
from vit_dist.training.state import TrainState
from vit_dist.training.step import choose_jit, make_train_step


def make_model(
    options: ModelOptions, strategy: tf.distribute.Strategy, *, kind: str | None = None
) -> ViT:
    """The model with new weights, made under the strategy's scope.

    Args:
      options: how it is built.
      strategy: its replicas hold the variables.
      kind: of device whose form the layers have: "CPU", "GPU" or "TPU"; None for the strategy's.
    """
    # Under the scope each variable becomes a copy on every replica, with the same initial values.
    with strategy.scope():
        return build_vit(
            dict(options.network),
            seed=options.seed,
            precision=options.precision,
            head_bias=options.head_bias,
            posemb_stddev=options.posemb_stddev,
            form=choose_form(kind or device_kind(strategy)),
        )


def make_state(
    options: RunOptions, strategy: tf.distribute.Strategy, *, kind: str | None = None
) -> TrainState:
    """A new model, optimizer and average, made under the strategy's scope; see make_model."""
    model = make_model(options.model, strategy, kind=kind)
    # The same seed again: TrainState copies the model's weights into the average in any case.
    ema = make_model(options.model, strategy, kind=kind) if options.step.ema_decay else None
    # A slot of sharded state is on its owner's device; the scope would put it on all devices.
    sharded = options.optimizer.shard_state
    with contextlib.nullcontext() if sharded else strategy.scope():
        optimizer = make_optimizer(
            named_weights(model),
            options.optimizer,
            strategy=strategy,
            num_heads=options.model.network["num_heads"],
        )
    with strategy.scope():
        return TrainState(model, optimizer, ema)


def make_step(
    options: RunOptions, data: Data, state: TrainState, strategy: tf.distribute.Strategy
) -> Callable[[Iterator[Any], tf.Tensor], dict[str, tf.Tensor]]:
    """The compiled step of a training; see training.step.make_train_step."""
    return make_train_step(
        state,
        options.loss,
        strategy=strategy,
        schedule=options.schedule,
        preprocess=options.input.pipe.device,
        batch_size=options.input.batch_size,
        seed=options.seed,
        options=options.step,
        mixing=options.input.mixing,
        masked=bool(data.damage),
        watch=options.monitor.watch,
    )


def compiles(options: EvaluationOptions, strategy: tf.distribute.Strategy) -> bool:
    """Whether XLA compiles what an evaluation runs on the devices."""
    replicas = strategy.num_replicas_in_sync
    return choose_jit(options.jit, kind=device_kind(strategy), num_replicas=replicas) != "off"


class Evaluation:
    """Judges a model on the splits of a run; a split's data set is made at its first use.

    Args:
      options, data: checked; see check.check_evaluation.
      model: its weights are read at each call.
      strategy: its replicas share the work.

    Attributes:
      verdicts: what the model said of each example at the last call that was not given up; None
        where the options do not ask for it.
    """

    verdicts: Verdicts | None = None

    def __init__(
        self,
        options: EvaluationOptions,
        data: Data,
        model: ViT,
        strategy: tf.distribute.Strategy,
    ):
        self._options, self._data, self._strategy = options, data, strategy
        self._evaluate = make_evaluator(
            model,
            options.loss,
            strategy=strategy,
            preprocess=options.pipe.device,
            jit=compiles(options, strategy),
            verdicts=options.verdicts,
        )
        # Split -> data set, kept: tf.data sets up its threads for each data set, not for each pass.
        self._datasets: dict[str, Any] = {}

    def __call__(
        self, split: str, *, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Metrics of a split, see make_evaluator; None if `stop` became true between batches.

        Raises:
          DataError: an example cannot be read, or too many are masked.
        """
        with explained(Reading(split, pipe=self._options.pipe), self._data):
            if split not in self._datasets:
                self._datasets[split] = eval_data(self._options, self._data, self._strategy, split)
            metrics = self._evaluate(self._datasets[split], stop=stop, look=self._keep)
        # None means that it was given up midway.
        if metrics is not None:
            check_counted(self._data, split, round(metrics["examples"]))
        return metrics

    def _keep(self, verdicts: Verdicts) -> None:
        self.verdicts = verdicts


@contextlib.contextmanager
def explained(reading: Reading, data: Data) -> Iterator[None]:
    """Within it an error of an input pipeline becomes one that names the damaged example."""
    try:
        yield
    except tf.errors.OpError as error:
        raise explain_reading(error, reading, data) or error from error


def check_counted(data: Data, split: str, examples: int) -> None:
    """Checks how many examples of a split were masked: those that an evaluation did not count.

    Raises:
      DataError: more than config.input.max_bad_share.
    """
    if split in data.damage:
        count = data.sources[split].num_examples
        data.damage[split].check_share(count - examples, seen=count)
