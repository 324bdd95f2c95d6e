"""The kinds of evaluations that config.evals names."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from vit_dist.evaluators.corruption import make_corruption_error
from vit_dist.evaluators.fewshot import make_fewshot
from vit_dist.evaluators.knn import make_knn
from vit_dist.evaluators.predictions import make_predictions
from vit_dist.evaluators.probe import make_linear_probe
from vit_dist.evaluators.real import make_real

FEATURES, LOGITS, METRICS = "features", "logits", "metrics"


class Kind(NamedTuple):
    """How a kind of evaluation is made and what it judges.

    Attributes:
      make: options -> a function of Outputs that returns name -> number; it raises ConfigError for
        an option that cannot be used. Its keyword arguments are the options of the kind. If the
        function is a Named, it tells the names of its metrics before.
      values: what Outputs.values are: FEATURES, what the model's head sees, or LOGITS. METRICS for
        a CorruptionError, a function of what other evaluations found.
      train: whether the function takes the Outputs of the training split as a second argument.
      sets: whether Outputs.labels are sets of labels.
    """

    make: Callable[..., Callable[..., Mapping[str, float]]]
    values: str
    train: bool
    sets: bool = False


# A module of the user's, named in config.imports, may add to this table.
KINDS: dict[str, Kind] = {
    "classification": Kind(make_predictions, LOGITS, train=False),
    "real": Kind(make_real, LOGITS, train=False, sets=True),
    "corruption_error": Kind(make_corruption_error, METRICS, train=False),
    "knn": Kind(make_knn, FEATURES, train=True),
    "fewshot": Kind(make_fewshot, FEATURES, train=True),
    "linear_probe": Kind(make_linear_probe, FEATURES, train=True),
}
