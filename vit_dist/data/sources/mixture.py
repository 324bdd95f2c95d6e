"""A weighted mixture of sources, each read by index, in an order that (seed, position) decides."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data import order
from vit_dist.data.sources import labels
from vit_dist.data.sources import source as base
from vit_dist.data.sources.fingerprint import checksum
from vit_dist.data.tracing import switch

# In each block of so many positions every source has its exact share, at permuted places.
BLOCK = 1000
# Added to the seed for each source, so that sources of the same size get different permutations.
# Any large number would do: this is 2**64 divided by the golden ratio.
SEED_STEP = 0x9E3779B97F4A7C15 % order.MAX_SEED


class MixtureSource(base.Source):
    """Several sources as one; an example's number counts through them in their order.

    Classes are joined by name, in the order in which the sources bring them: two sources that both
    have a class "cat" share it. Of every 1000 positions each source has its weight's share, at
    places that are a permutation; within a source epochs are permutations as they are alone.

    Args:
      sources: Two or more, read by index, all with encoded images or all with arrays of one shape.
      weights: Share of each; any positive numbers, of which only the ratios count.

    Raises:
      ConfigError: What does not fit together, or a weight too small for a share of 1 in 1000.
    """

    name = "mixture"

    def __init__(self, sources: Sequence[base.Source], weights: Sequence[float]):
        for source in sources:
            if not source.indexable:
                raise ConfigError(f"a mixture reads by index, and {source} can only be streamed")
            if source.label_sets is not None:
                raise ConfigError(f"a mixture takes one label an example, and {source} has sets")
            if source.element_spec["image"] != sources[0].element_spec["image"]:
                raise ConfigError(
                    f"a mixture needs images of one kind; {sources[0]} has "
                    f"{sources[0].element_spec['image']}, {source} {source.element_spec['image']}"
                )
        self.sources, self.split = tuple(sources), sources[0].split
        self.encoded = sources[0].encoded
        self.portable = all(source.portable for source in sources)
        self.quotas = np.array(_quotas(weights), np.int64)
        sizes = [source.num_examples for source in sources]
        # Examples of part i have the numbers firsts[i] to firsts[i + 1].
        self._firsts = np.cumsum([0, *sizes])
        self.num_examples = int(self._firsts[-1])
        # dict.fromkeys keeps the first of equal names, in order.
        self.class_names = tuple(dict.fromkeys(n for s in sources for n in s.class_names))
        self._warn_of_strangers()
        numbers = {name: i for i, name in enumerate(self.class_names)}
        # A part's own label -> the mixture's.
        self._labels = [[numbers[name] for name in s.class_names] for s in sources]
        self.element_spec = {
            "image": sources[0].element_spec["image"],
            "label": tf.TensorSpec((), tf.int32),
        }

    def __str__(self) -> str:
        shares = (f"{q / BLOCK:.1%} {s}" for s, q in self._parts())
        return f"mixture of {', '.join(shares)}"

    def _warn_of_strangers(self) -> None:
        """Warns of a source that shares no class with the others, as where numbers meet words."""
        for source in self.sources:
            others = {n for s in self.sources if s is not source for n in s.class_names}
            if others.isdisjoint(source.class_names):
                logging.warning(
                    "classes of a mixture are joined by name, and no other part has one of %s "
                    "(%s, ...): the mixture has %d classes",
                    source,
                    source.class_names[0],
                    len(self.class_names),
                )

    def prepare(self) -> None:
        for source in self.sources:
            source.prepare()

    def place(self, positions: tf.Tensor, *, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
        # Each block of positions is an epoch of its own to make_order, which permutes 0..999 in it.
        # The quotas divide 0..999 among the parts: a position belongs to the part into whose range
        # its permuted number falls.
        block, slot = order.make_order(positions, num_examples=BLOCK, seed=seed)
        ends = np.cumsum(self.quotas)
        which = tf.searchsorted(tf.constant(ends), slot, side="right")
        # The number within that range, and so a number among the part's positions of this block;
        # with the blocks before, a position of the part's own run.
        rank = slot - tf.gather(tf.constant(ends - self.quotas), which)
        position = block * tf.gather(tf.constant(self.quotas), which) + rank
        epoch, index = tf.zeros_like(positions), tf.zeros_like(positions)
        for i, source in enumerate(self.sources):
            own = (seed + (i + 1) * SEED_STEP) % order.MAX_SEED
            # All parts are asked for all positions, and one answer is taken: the graph needs no
            # branches.
            its_epoch, its_index = source.place(position, seed=own)
            epoch = tf.where(which == i, its_epoch, epoch)
            index = tf.where(which == i, its_index + self._firsts[i], index)
        return epoch, index

    def fetch(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"number": indices}

    def decode_record(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        # The example is read here, and not in `fetch`, as records of different sources have
        # different entries.
        number = record["number"]

        def read(i: int) -> tuple[tf.Tensor, tf.Tensor]:
            example = self.sources[i].read(number - self._firsts[i])
            # Checked here: a label beyond one part's classes may be within the mixture's.
            label = labels.check(example["label"], self.sources[i].num_classes, number)
            return example["image"], tf.gather(tf.constant(self._labels[i]), label)

        which = tf.searchsorted(tf.constant(self._firsts[1:]), number[None], side="right")[0]
        image, label = switch(which, [lambda i=i: read(i) for i in range(len(self.sources))])
        return {"image": image, "label": label}

    def load(self, index: int) -> tuple[bytes | np.ndarray, int]:
        source, own = self._locate(index)
        image, label = self.sources[source].load(own)
        return image, self._renumber(source, label)

    def peek(self, index: int) -> tuple[bytes | np.ndarray, int]:
        source, own = self._locate(index)
        image, label = self.sources[source].peek(own)
        return image, self._renumber(source, label)

    def _renumber(self, source: int, label: int) -> int:
        """Returns the mixture's number of a class of one part."""
        problem = labels.problem(label, self.sources[source].num_classes)
        if problem:
            raise DataError(problem)
        return self._labels[source][label]

    def fingerprint(self) -> dict[str, Any]:
        found = super().fingerprint()
        # The parts' fingerprints, which hold their names, and their shares stand for the names.
        del found["names"]
        parts = [{**s.fingerprint(), "quota": int(q)} for s, q in self._parts()]
        seen = ("num_examples", "classes", "names", "order", "quota")
        text = [json.dumps({k: part.get(k) for k in seen}) for part in parts]
        sizes = [part.get("sizes") for part in parts]
        # One part that cannot tell its sizes makes those of the whole unknown.
        known = {} if None in sizes else {"sizes": checksum(map(str, sizes))}
        return {**found, "parts": checksum(text), **known}

    def locations(self) -> list[str]:
        return [path for source in self.sources for path in source.locations()]

    def _parts(self):
        return zip(self.sources, self.quotas, strict=True)

    def describe(self, index: int) -> str:
        source, own = self._locate(index)
        return self.sources[source].describe(own)

    def find_damage(self) -> str | None:
        return next(filter(None, (source.find_damage() for source in self.sources)), None)

    def _locate(self, index: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._firsts[1:], index, side="right"))
        return source, index - int(self._firsts[source])


def _quotas(weights: Sequence[float]) -> list[int]:
    """Returns how many of BLOCK positions each weight gets, by the largest-remainder method.

    Raises:
      ConfigError: Fewer than two weights, or one that is not positive or far too small.
    """
    if len(weights) < 2 or any(not 0 < w < float("inf") for w in weights):
        raise ConfigError(f"a mixture needs two or more weights above 0, got {list(weights)}")
    exact = [BLOCK * w / sum(weights) for w in weights]
    quotas = [int(x) for x in exact]
    # Rounded down, they sum to less than BLOCK. The positions that are left go to the largest
    # remainders.
    by_error = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for i in by_error[: BLOCK - sum(quotas)]:
        quotas[i] += 1
    if 0 in quotas:
        raise ConfigError(
            f"weight {weights[quotas.index(0)]} is less than 1 in {BLOCK} of the mixture "
            f"{list(weights)}: leave that source out, or raise its weight"
        )
    return quotas
