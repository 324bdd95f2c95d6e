"""What a training would need of a machine, from its checked options: memory, time, input, money.

Nothing here runs a step: each figure says whether it is exact (counted from shapes), measured on
this machine, or estimated.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vit_dist.config.errors import ConfigError
from vit_dist.costs.flops import layer_flops, remat_flops
from vit_dist.costs.memory import State, StepMemory, count_state, step_memory
from vit_dist.costs.step_time import StepTime, step_time
from vit_dist.costs.targets import Target
from vit_dist.model.memory import POLICIES
from vit_dist.run.check import check_parts
from vit_dist.run.options import RunOptions
from vit_dist.training.sharding import NOT_ON_TPUS

# Of a device's memory a program gets so much: the rest is the runtime's, and lost between buffers.
USABLE = 0.92
# Batches are tried in multiples of it, which is what matrix units like.
_BATCH_UNIT = 8
_LARGEST_BATCH = 65536


class Row(NamedTuple):
    """One figure of a plan.

    Attributes:
      section, name: where it stands.
      value: a number in `unit`, or a word.
      unit: "" for counts and words.
      how: "exact", "measured", "estimated" or "given".
      note: what to know of it; "" for nothing.
    """

    section: str
    name: str
    value: float | str
    unit: str
    how: str
    note: str = ""


class Change(NamedTuple):
    """Keys of the config that would be set to make it fit, and what comes of it.

    Attributes:
      flags: to paste behind the command.
      need: bytes of a device then.
      flops: operations of a step over those of the config's.
      choice: all keys that decide the memory.
    """

    flags: str
    need: int
    flops: float
    choice: "Choice"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The keys of a config that decide a device's memory and that may be changed to save some."""

    accumulation: int
    remat: str
    momentum_dtype: str
    shard_state: bool
    precision: str

    @property
    def whole(self) -> "Choice":
        """Without micro-batches."""
        return dataclasses.replace(self, accumulation=1)

    def flags(self, before: "Choice") -> str:
        """What has to be set to come here from `before`."""
        keys = {
            "accumulation": "step.accumulation",
            "remat": "model.remat",
            "momentum_dtype": "optimizer.momentum_dtype",
            "shard_state": "optimizer.shard_state",
            "precision": "precision",
        }
        return " ".join(
            f"--config.{key}={getattr(self, field)}"
            for field, key in keys.items()
            if getattr(self, field) != getattr(before, field)
        )


def with_choice(options: RunOptions, choice: Choice, *, batch_size: int) -> RunOptions:
    """The options of a run with other keys, and another global batch."""
    model = dataclasses.replace(
        options.model,
        network={**options.model.network, "remat": choice.remat},
        precision=choice.precision,
        auto_remat=False,
    )
    return dataclasses.replace(
        options,
        evaluation=dataclasses.replace(options.evaluation, model=model),
        input=dataclasses.replace(options.input, batch_size=batch_size),
        optimizer=dataclasses.replace(
            options.optimizer,
            momentum_dtype=choice.momentum_dtype,
            shard_state=choice.shard_state,
        ),
        step=dataclasses.replace(options.step, accumulation=choice.accumulation),
    )


class Planner:
    """The sums for one training on one machine.

    Args:
      options: checked.
      num_examples: of an epoch.
      target: the machine.
      state: the variables, where they have been made; counting them takes seconds.

    Attributes:
      correction: how many times the estimate activations take; 1 until something is compiled.
      limit: bytes that a compiler says a program gets at most; inf until it does.

    Raises:
      ConfigError: the batch cannot be divided among the machine's devices.
    """

    def __init__(
        self,
        options: RunOptions,
        num_examples: int,
        target: Target,
        *,
        state: State | None = None,
    ):
        self.options, self.num_examples, self.target = options, num_examples, target
        if options.optimizer.shard_state and target.kind == "TPU":
            raise ConfigError(NOT_ON_TPUS)
        check_parts(
            options.input.batch_size,
            options.step,
            options.input.mixing,
            num_replicas=target.num_devices,
            shard_state=options.optimizer.shard_state,
        )
        self.network: Mapping[str, Any] = options.model.network
        self.share = options.input.batch_size // target.num_devices
        self.choice = Choice(
            options.step.accumulation,
            self.network["remat"],
            options.optimizer.momentum_dtype,
            options.optimizer.shard_state,
            options.model.precision,
        )
        self.correction = 1.0
        self.limit = math.inf
        self._states: dict[str, State] = {}
        if state is not None:
            self._states[self.choice.momentum_dtype] = state
        if options.model.auto_remat:
            self.choice = dataclasses.replace(self.choice, remat=self._fastest_remat())
            self.network = {**self.network, "remat": self.choice.remat}

    def state(self, choice: Choice | None = None) -> State:
        """The variables of the training; counted once for each dtype of momentum."""
        dtype = (choice or self.choice).momentum_dtype
        if dtype not in self._states:
            optimizer = dataclasses.replace(self.options.optimizer, momentum_dtype=dtype)
            ema = bool(self.options.step.ema_decay)
            self._states[dtype] = count_state(self.network, optimizer, ema=ema)
        return self._states[dtype]

    def memory(self, choice: Choice | None = None, *, batch_size: int | None = None) -> StepMemory:
        """Bytes of one device with `batch_size` images; its share of the global batch for None."""
        choice = choice or self.choice
        return step_memory(
            {**self.network, "remat": choice.remat},
            self.state(choice),
            batch_size=self.share if batch_size is None else batch_size,
            precision=choice.precision,
            accumulation=choice.accumulation,
            num_devices=self.target.num_devices,
            shard_state=choice.shard_state,
            kind=self.target.kind,
        )

    def need(self, choice: Choice | None = None, *, batch_size: int | None = None) -> int:
        """Bytes of `memory` at one time, corrected."""
        memory = self.memory(choice, batch_size=batch_size)
        grown = (self.correction - 1) * max(memory.activations, memory.gradients)
        return memory.total + int(grown)

    @property
    def available(self) -> float:
        """Bytes that a program gets of one device; inf where the table does not tell."""
        return min(USABLE * self.device_memory, self.limit)

    @property
    def device_memory(self) -> float:
        """Bytes of one device; inf where the table does not tell."""
        memory = self.target.device.memory
        return math.inf if memory is None else memory * 1e9

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint, which holds bfloat16 moments as float32."""
        whole = self.state(dataclasses.replace(self.choice, momentum_dtype="float32"))
        return whole.weights + whole.optimizer + whole.average

    @property
    def fits(self) -> bool:
        return self.need() <= self.available

    def largest_batch(
        self, choice: Choice, *, limit: float | None = None, unit: int = _BATCH_UNIT
    ) -> int:
        """Images that a device has room for; 0 if not even its state fits.

        Args:
          choice: the other keys.
          limit: bytes of a device; None for `available`.
          unit: that batches are multiples of.
        """
        # Memory grows with the batch, so the sizes that fit are those before a place in the list.
        sizes = range(unit, _LARGEST_BATCH + 1, unit)
        count = bisect.bisect_right(
            sizes,
            self.available if limit is None else limit,
            key=lambda b: self.need(choice, batch_size=b),
        )
        return count * unit

    def time(self, choice: Choice | None = None) -> StepTime | None:
        """Of one step; None where the table of devices lacks a number."""
        choice = choice or self.choice
        return step_time(
            {**self.network, "remat": choice.remat},
            self.state(choice),
            self.target,
            batch_size=self.share,
            precision=choice.precision,
            accumulation=choice.accumulation,
            sent_as=self.options.step.all_reduce_dtype,
            shard_state=choice.shard_state,
        )

    def _fastest_remat(self) -> str:
        """What model.remat=auto takes: the fastest policy that has room; if none has, the last."""
        choices = [dataclasses.replace(self.choice, remat=remat) for remat in self.policies]
        # Each policy computes more again than the one before it, so the first that fits is the
        # fastest: in cycles of a v5e Ti/16 takes 1.00, 1.07, 1.16, 1.21 (docs/tpu_options.md).
        fits = (choice for choice in choices if self.need(choice) <= self.available)
        return next(fits, choices[-1]).remat

    @property
    def policies(self) -> list[str]:
        """Policies of `model.remat` that the network can have, each saving more than the last."""
        # In blocks of keys attention's weights are computed again in any case.
        blockwise = self.network["attention_block"] is not None
        return [name for name in POLICIES if not (blockwise and name == "attention")]

    def changes(self) -> list[Change]:
        """Ways to make the training fit that keep its global batch; those with few keys first."""
        before = self.flops(self.choice.remat)
        found = [
            Change(
                choice.flags(self.choice),
                self.need(choice),
                self.flops(choice.remat) / before,
                choice,
            )
            for choice in self._cheaper()
        ]
        # A way that changes all the keys of a shorter one, and others besides, adds something only
        # if its micro-batches are larger.
        kept: list[Change] = []
        for change in sorted(found, key=lambda x: (len(_keys(x.flags)), x.flops)):
            if not any(
                _keys(change.flags) >= _keys(other.flags)
                and change.choice.accumulation >= other.choice.accumulation
                for other in kept
            ):
                kept.append(change)
        return kept

    def _cheaper(self) -> Iterator[Choice]:
        """Every combination of what saves memory, with as few micro-batches as make it fit."""
        group = self.options.input.mixing.group_size if self.options.input.mixing else 1
        parts = [
            n
            for n in range(self.choice.accumulation, self.share // group + 1)
            if self.share % (n * group) == 0
        ]
        # What is computed again already stays so.
        remats = self.policies
        shardable = self.target.kind != "TPU" and self.target.num_devices > 1
        precision = self.choice.precision
        for remat, dtype, sharded, dtype_of_activations in itertools.product(
            remats[remats.index(self.choice.remat) :],
            dict.fromkeys((self.choice.momentum_dtype, "bfloat16")),
            dict.fromkeys((self.choice.shard_state, self.choice.shard_state or shardable)),
            dict.fromkeys((precision, "bfloat16" if precision == "float32" else precision)),
        ):
            fits = (
                choice
                for n in parts
                if (choice := Choice(n, remat, dtype, sharded, dtype_of_activations)) != self.choice
                and self.need(choice) <= self.available
            )
            yield from itertools.islice(fits, 1)

    def flops(self, remat: str) -> int:
        """Operations of a training step for each image."""
        return remat_flops({**self.network, "remat": remat}, self.state().trained)


def _keys(flags: str) -> set[str]:
    return {word.partition("=")[0] for word in flags.split()}


def rows_of(planner: Planner, *, price: float | None) -> list[Row]:
    """The figures that need nothing but the config and the machine's name."""
    return [
        *_model_rows(planner),
        *_memory_rows(planner),
        *_batch_rows(planner),
        *_time_rows(planner, price),
        *_storage_rows(planner),
    ]


def _model_rows(planner: Planner) -> list[Row]:
    state, network = planner.state(), planner.network
    layers = layer_flops(network, trained=state.trained)
    rows = [
        Row("model", "parameters", state.parameters, "", "exact"),
        Row("model", "parameters that train", state.trained_parameters, "", "exact"),
    ]
    groups: dict[str, list[int]] = {}
    for layer in layers:
        block, _, rest = layer.name.partition("/")
        name = block if not block.startswith("encoderblock") else f"blocks, {rest.split('/')[0]}"
        sums = groups.setdefault(name, [0, 0])
        sums[0] += layer.forward
        sums[1] += layer.backward
    forward, backward = (sum(x[i] for x in groups.values()) for i in (0, 1))
    for name, (ahead, back) in {"all": (forward, backward), **groups}.items():
        rows.append(Row("operations per image", f"{name}, forward", ahead / 1e9, "GFLOP", "exact"))
        rows.append(Row("operations per image", f"{name}, backward", back / 1e9, "GFLOP", "exact"))
    return rows


def _memory_rows(planner: Planner) -> list[Row]:
    memory, available = planner.memory(), planner.available
    exact = ("weights", "optimizer", "average", "batch", "gradients")
    rows = [
        Row(
            "memory of a device",
            name,
            value / 1e9,
            "GB",
            "exact" if name in exact else "estimated",
            "given back as activations go" if name == "gradients" else "",
        )
        for name, value in memory._asdict().items()
    ]
    rows.append(
        Row("memory of a device", "most at one time", memory.total / 1e9, "GB", "estimated")
    )
    if planner.options.model.auto_remat:
        note = "what model.remat=auto takes"
        rows.append(Row("memory of a device", "remat", planner.choice.remat, "", "estimated", note))
    if available != math.inf:
        note = f"{USABLE:.0%} of its memory"
        rows.append(Row("memory of a device", "there is", available / 1e9, "GB", "given", note))
    return rows


def _batch_rows(planner: Planner) -> list[Row]:
    rows = [Row("batch", "images of a device", planner.share, "", "exact")]
    if planner.available == math.inf:
        return rows
    for remat in planner.policies:
        choice = dataclasses.replace(planner.choice.whole, remat=remat)
        name = f"largest of a device in one piece, model.remat={remat}"
        rows.append(Row("batch", name, planner.largest_batch(choice), "", "estimated"))
    return rows


def _time_rows(planner: Planner, price: float | None) -> list[Row]:
    options, time = planner.options, planner.time()
    epochs = options.total_steps * options.input.batch_size / planner.num_examples
    rows = [
        Row("time", "steps", options.total_steps, "", "exact"),
        Row("time", "epochs", epochs, "", "exact"),
    ]
    if time is None:
        note = f"the table of devices has not all numbers of {planner.target.device.name}"
        if planner.target.kind == "GPU" and planner.target.hosts > 1 and not planner.target.network:
            note = "give --network, Gbit/s of a host to the others"
        return [*rows, Row("time", "step", "unknown", "", "estimated", note)]
    batch = options.input.batch_size
    parts = (
        ("operations at the peak", time.compute),
        ("memory traffic, at least", time.least_traffic),
        ("operations, expected", time.operations),
        ("passes over activations and state, expected", time.passes),
    )
    rows += [Row("time", name, value * 1e3, "ms", "estimated") for name, value in parts]
    rows.append(_all_reduce_row(planner, time))
    if time.all_gather:
        note = "of the weights, for optimizer.shard_state"
        name = "all-gather by itself"
        rows.append(Row("time", name, time.all_gather * 1e3, "ms", "estimated", note))
    for name, seconds in (("floor", time.floor), ("expected", time.expected)):
        hours = seconds * options.total_steps / 3600
        note = f"bound by {time.binds}" if name == "expected" else "nothing can be faster"
        rows.append(Row("time", f"step, {name}", seconds * 1e3, "ms", "estimated", note))
        rows.append(Row("time", f"images per second, {name}", batch / seconds, "", "estimated"))
        rows.append(Row("time", f"run, {name}", hours, "hours", "estimated", "steps alone"))
        if price is not None:
            cost = hours * price
            rows.append(Row("time", f"cost, {name}", cost, "", "estimated", "hours x --price"))
    return rows


def _all_reduce_row(planner: Planner, time: StepTime) -> Row:
    target, note = planner.target, ""
    if target.num_devices > 1:
        note = f"a ring of {target.num_devices} devices at {target.link:.4g} GB/s"
        if target.network is not None:
            note += f", {target.hosts} hosts with --network between them"
    return Row("time", "all-reduce by itself", time.all_reduce * 1e3, "ms", "estimated", note)


def _storage_rows(planner: Planner) -> list[Row]:
    options, size = planner.options, planner.checkpoint / 1e9
    kept = options.keep_checkpoints + (1 if options.best else 0)
    return [
        Row("storage", "checkpoint", size, "GB", "exact"),
        Row("storage", "checkpoints that are kept", kept * size, "GB", "exact", f"{kept} of them"),
    ]
