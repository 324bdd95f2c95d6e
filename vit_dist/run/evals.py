"""The evaluations that config.evals names, under the strategy of a run."""

import collections
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
from vit_dist.evaluators.corruption import CorruptionError
from vit_dist.evaluators.outputs import Outputs, make_collector, without_absent
from vit_dist.evaluators.registry import FEATURES, LOGITS, METRICS
from vit_dist.evaluators.verdicts import Verdicts, verdicts_of
from vit_dist.model.vit import ViT, named_weights
from vit_dist.model.weights import adapt_weights
from vit_dist.run.build import check_counted, compiles, explained, make_model
from vit_dist.run.explain import Reading
from vit_dist.run.facts import code_facts
from vit_dist.run.input import eval_data
from vit_dist.run.options import Data, EvalOptions, EvaluationOptions, ModelOptions

# Names of variables that features do not depend on.
_HEAD = "head/"
# What is computed once: the key of a source, the pipe, what the model gives, the image size.
_Read = tuple[str, str, str, tuple[int, int]]


class Evals:
    """Judges a model as config.evals says.

    What a model gives for a split is computed once for all evaluations that want it, and again
    only when the weights have changed: a frozen network's features stay, whatever its head does.

    Args:
      options, data: checked; see check.check_evaluation.
      model: its weights are read at each call.
      strategy: its replicas share the work.
      folder: keeps what was computed for later; "" for nowhere.
      fill: gives a model of another image size, for the evaluations that have one, the weights of
        `model`; None to resample its positions.

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
        fill: Callable[[ViT], object] | None = None,
    ):
        self._options, self._data, self._strategy = options, data, strategy
        self._model, self._fill = model, fill or self._resample
        entries = options.evals.values()
        # Further models by image size, each with the digest of the weights that it was filled from.
        # Made now, so that memory runs out before a training begins.
        self._others = {
            size: make_model(_at(options.model, size), strategy)
            for size in dict.fromkeys(entry.image_size for entry in entries)
            if size != model.image_size
        }
        self._filled: dict[tuple[int, int], str] = {}
        # One for each kind of values and size: logits change with the head alone, features do not.
        self._caches: dict[Any, OutputCache] = collections.defaultdict(lambda: OutputCache(folder))
        self._jit = compiles(options, strategy)
        # A tf.function is traced, and tf.data sets up its threads, once for each object.
        self._collectors: dict[tuple[str, str, tuple[int, int]], Callable[..., Any]] = {}
        self._datasets: dict[tuple[str, str, tuple[int, int]], Any] = {}
        # How many evaluations want the same. Logits that one alone wants are not kept in memory:
        # those of ImageNet-C's 75 sets would take 15 GB.
        self._readers = collections.Counter(
            _read(entry, key)
            for entry in entries
            if entry.kind.values != METRICS
            for key in filter(None, (entry.split, entry.train))
        )
        # Of evaluations that others average: the digest of the weights, and what was found.
        averages = [entry for entry in entries if entry.kind.values == METRICS]
        self._averaged = {member for entry in averages for member in _members(entry)}
        self._found: dict[str, tuple[str, dict[str, float]]] = {}

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
        if entry.kind.values == METRICS:
            return self._average(entry, stop)
        model = self._model_of(entry)
        weights = _weights_digest(model, head=entry.kind.values != FEATURES)
        arguments, indices = [], []
        for key in (entry.split, entry.train) if entry.train else (entry.split,):
            found = self._outputs(entry, model, key, weights, stop)
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
        # A kind that leaves examples out says how many it has counted.
        examples = metrics.pop("examples", float(len(arguments[0].labels)))
        metrics = {**metrics, "examples": examples}
        if name in self._averaged:
            self._found[name] = (_weights_digest(self._model), metrics)
        return metrics

    def _average(self, entry: EvalOptions, stop: Callable[[], bool]) -> dict[str, float] | None:
        """What a kind finds that averages other evaluations; these are judged where they were not.

        None if that was given up.
        """
        weights, members = _weights_digest(self._model), {}
        for name in _members(entry):
            known, metrics = self._found.get(name, ("", {}))
            if known != weights:
                judged = self(name, stop=stop)
                if judged is None:
                    return None
                metrics = judged
            members[name] = metrics
        self.verdicts = None
        found = {k: float(v) for k, v in entry.evaluate(members).items()}
        return {**found, "examples": sum(metrics["examples"] for metrics in members.values())}

    def _model_of(self, entry: EvalOptions) -> ViT:
        """The model at an evaluation's resolution, with the weights of now."""
        if entry.image_size == self._model.image_size:
            return self._model
        other, weights = self._others[entry.image_size], _weights_digest(self._model)
        if self._filled.get(entry.image_size) != weights:
            self._fill(other)
            self._filled[entry.image_size] = weights
        return other

    def _resample(self, other: ViT) -> None:
        """As config.init_from takes the weights of a run at another resolution."""
        arrays = {
            name: tf.convert_to_tensor(variable.value).numpy()
            for name, variable in named_weights(self._model).items()
        }
        method = self._options.weights.posemb_method
        adapt_weights(other, arrays, source=self._model.get_config(), method=method)

    def _outputs(
        self,
        entry: EvalOptions,
        model: ViT,
        key: str,
        weights: str,
        stop: Callable[[], bool],
    ) -> tuple[Outputs, np.ndarray] | None:
        """What the model gives for a split, from the cache or computed, and each example's place.

        None if the computation was given up.
        """
        source = self._data.sources[key]
        facts = self._facts(entry, model, key, weights)
        digest = _digest(json.dumps(facts, sort_keys=True, default=str).encode())
        cache = self._caches[entry.kind.values, entry.image_size]
        keep = entry.kind.values == FEATURES or self._readers[_read(entry, key)] > 1
        found = cache.get(weights, digest, keep=keep)
        # A host that computed alone would wait for ever for the others' shares.
        if not all(all_hosts(self._strategy, int(found is not None))):
            found = self._collect(entry, model, key, stop)
            if found is None:
                return None
            cache.put(digest, found, facts=facts, keep=keep)
        assert found is not None, "all hosts have it"
        values, labels, indices = found
        check_counted(self._data, key, len(labels))
        if entry.columns:
            values = values[:, list(entry.columns)]
        if entry.present:
            values = without_absent(values, labels)
        return Outputs(values, labels, source.class_names), indices

    def _collect(self, entry: EvalOptions, model: ViT, key: str, stop: Callable[[], bool]) -> Any:
        pipe, size = str(entry.pipe), entry.image_size
        made = (pipe, entry.kind.values, size)
        if made not in self._collectors:
            features = entry.kind.values == FEATURES
            function: Callable[..., Any] = model.features if features else model
            self._collectors[made] = make_collector(
                functools.partial(function, training=False),
                strategy=self._strategy,
                preprocess=entry.pipe.device,
                jit=self._jit,
            )
        with explained(Reading(key, pipe=entry.pipe), self._data):
            if (key, pipe, size) not in self._datasets:
                # A set of labels is no distribution.
                one = self._options.labels_sum_to_one and not entry.kind.sets
                options = dataclasses.replace(self._options, pipe=entry.pipe, labels_sum_to_one=one)
                data = eval_data(options, self._data, self._strategy, key)
                self._datasets[key, pipe, size] = data
            return self._collectors[made](self._datasets[key, pipe, size], stop=stop)

    def _facts(self, entry: EvalOptions, model: ViT, key: str, weights: str) -> dict[str, Any]:
        """All that decides the values: what a cached file is found by."""
        network = model.get_config()
        if entry.kind.values == FEATURES:
            network.pop("num_classes")
        return {
            "weights": weights,
            "network": network,
            "precision": self._options.model.precision,
            "values": entry.kind.values,
            "data": self._data.sources[key].fingerprint(),
            "pipe": str(entry.pipe),
            "code": code_facts(self._options.imports),
        }


def _at(options: ModelOptions, size: tuple[int, int]) -> ModelOptions:
    return dataclasses.replace(options, network={**options.network, "image_size": size})


def _members(average: EvalOptions) -> tuple[str, ...]:
    assert isinstance(average.evaluate, CorruptionError), "the registry says so"
    return average.evaluate.members


def _read(entry: EvalOptions, key: str) -> _Read:
    return key, str(entry.pipe), entry.kind.values, entry.image_size


def _weights_digest(model: ViT, *, head: bool = True) -> str:
    """A digest of all weights; without the head's, of those that features depend on."""
    digest = hashlib.sha256()
    for name, variable in sorted(named_weights(model).items()):
        if not head and name.startswith(_HEAD):
            continue
        value = np.ascontiguousarray(tf.convert_to_tensor(variable.value))
        digest.update(f"{name} {value.shape} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]
