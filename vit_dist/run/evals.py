"""The evaluations that config.evals names, under the strategy of a run."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.cluster.hosts import all_hosts
from vit_dist.evaluators.cache import OutputCache
from vit_dist.evaluators.outputs import Outputs, make_collector
from vit_dist.evaluators.registry import FEATURES, LOGITS
from vit_dist.evaluators.verdicts import Verdicts, verdicts_of
from vit_dist.model.vit import ViT, named_weights
from vit_dist.run.build import check_counted, compiles, explained
from vit_dist.run.explain import Reading
from vit_dist.run.facts import code_facts
from vit_dist.run.input import eval_data
from vit_dist.run.options import Data, EvalOptions, EvaluationOptions

# Names of variables that features do not depend on.
_HEAD = "head/"


class Evals:
    """Judges a model as config.evals says.

    What a model gives for a split is computed once for all evaluations that want it, and again
    only when the weights have changed: a frozen network's features stay, whatever its head does.

    Args:
      options, data: checked; see check.check_evaluation.
      model: its weights are read at each call.
      strategy: its replicas share the work.
      folder: keeps what was computed for later; "" for nowhere.

    Attributes:
      verdicts: what the model said of each example at the last call that was not given up; None
        where the options do not ask for it, and for kinds that judge features.
    """

    verdicts: Verdicts | None = None

    def __init__(
        self,
        options: EvaluationOptions,
        data: Data,
        model: ViT,
        strategy: tf.distribute.Strategy,
        *,
        folder: str = "",
    ):
        self._options, self._data, self._strategy = options, data, strategy
        self._model = model
        # One for each kind of values: logits change with the head alone, features do not.
        self._caches = {values: OutputCache(folder) for values in (FEATURES, LOGITS)}
        self._jit = compiles(options, strategy)
        # By pipe and values, and by split and pipe: a tf.function is traced, and tf.data sets up
        # its threads, once for each object.
        self._collectors: dict[tuple[str, str], Callable[..., Any]] = {}
        self._datasets: dict[tuple[str, str], Any] = {}

    def __call__(
        self, name: str, *, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Metrics of an evaluation, "examples" among them; None if `stop` became true.

        Args:
          name: in config.evals.
          stop: called on every host after each batch, and before the numbers are computed.

        Raises:
          DataError: an example cannot be read, or too many are masked.
        """
        entry = self._options.evals[name]
        weights = self._weights_digest(entry)
        arguments, indices = [], []
        for key in (entry.split, entry.train) if entry.train else (entry.split,):
            found = self._outputs(entry, key, weights, stop)
            if found is None:
                return None
            arguments.append(found[0])
            indices.append(found[1])
        # What follows runs on this host alone, without a look at signals.
        if stop():
            return None
        metrics = {k: float(v) for k, v in entry.evaluate(*arguments).items()}
        judges = self._options.verdicts and entry.kind.values == LOGITS
        self.verdicts = verdicts_of(arguments[0], indices[0]) if judges else None
        return {**metrics, "examples": float(len(arguments[0].labels))}

    def _outputs(
        self, entry: EvalOptions, key: str, weights: str, stop: Callable[[], bool]
    ) -> tuple[Outputs, np.ndarray] | None:
        """What the model gives for a split, from the cache or computed, and each example's place.

        None if the computation was given up.
        """
        source = self._data.sources[key]
        facts = self._facts(entry, key, weights)
        digest = _digest(json.dumps(facts, sort_keys=True, default=str).encode())
        cache = self._caches[entry.kind.values]
        found = cache.get(weights, digest)
        # A host that computed alone would wait for ever for the others' shares.
        if not all(all_hosts(self._strategy, int(found is not None))):
            found = self._collect(entry, key, stop)
            if found is None:
                return None
            cache.put(digest, found, facts=facts)
        assert found is not None, "all hosts have it"
        values, labels, indices = found
        check_counted(self._data, key, len(labels))
        if entry.columns:
            values = values[:, list(entry.columns)]
        return Outputs(values, labels, source.class_names), indices

    def _collect(self, entry: EvalOptions, key: str, stop: Callable[[], bool]) -> Any:
        pipe = str(entry.pipe)
        made = (pipe, entry.kind.values)
        if made not in self._collectors:
            features = entry.kind.values == FEATURES
            function: Callable[..., Any] = self._model.features if features else self._model
            self._collectors[made] = make_collector(
                functools.partial(function, training=False),
                strategy=self._strategy,
                preprocess=entry.pipe.device,
                jit=self._jit,
            )
        with explained(Reading(key, pipe=entry.pipe), self._data):
            if (key, pipe) not in self._datasets:
                options = dataclasses.replace(self._options, pipe=entry.pipe)
                self._datasets[key, pipe] = eval_data(options, self._data, self._strategy, key)
            return self._collectors[made](self._datasets[key, pipe], stop=stop)

    def _weights_digest(self, entry: EvalOptions) -> str:
        digest = hashlib.sha256()
        for name, variable in sorted(named_weights(self._model).items()):
            if entry.kind.values == FEATURES and name.startswith(_HEAD):
                continue
            value = np.ascontiguousarray(tf.convert_to_tensor(variable.value))
            digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
            digest.update(value.reshape(-1).view(np.uint8))
        return digest.hexdigest()

    def _facts(self, entry: EvalOptions, key: str, weights: str) -> dict[str, Any]:
        """All that decides the values: what a cached file is found by."""
        network = self._model.get_config()
        if entry.kind.values == FEATURES:
            network.pop("num_classes")
        return {
            "weights": weights,
            "network": network,
            "precision": self._options.model.precision,
            "values": entry.kind.values,
            "data": self._data.sources[key].fingerprint(),
            "pipe": str(entry.pipe),
            "code": code_facts(),
        }


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]
