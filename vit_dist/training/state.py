"""Everything that a step changes and a resume needs (law 6)."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from vit_dist.config.errors import ConfigError
from vit_dist.model.vit import named_weights
from vit_dist.training.optimizer import Optimizer
from vit_dist.training.sharding import Remote
from vit_dist.training.state_file import StateFile

INITIAL_LOSS_SCALE = 2.0**15  # as in Keras's and NVIDIA Apex's dynamic loss scaling


class TrainState:
    """Model, optimizer, moving average and counters; make it under the strategy's scope.

    Attributes:
      model: what is trained.
      optimizer: its Optimizer.
      ema: a second model that holds the exponential moving average of the weights, or None.
      step: int64, the number of steps done; times the batch size the position in the data.
      updates: int64, the number of steps whose update was applied (float16 skips overflows).
      first_bad_step: int64, the step whose loss or gradient was not finite; -1 while all were.
        From it on no step changes the weights.
      loss_scale, good_steps: float16's dynamic loss scale, and steps since it last changed.
    """

    def __init__(self, model: keras.Model, optimizer: Optimizer, ema: keras.Model | None = None):
        self.model, self.optimizer, self.ema = model, optimizer, ema
        scaled = model.compute_dtype == "float16"
        self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
        self.updates = tf.Variable(0, dtype=tf.int64, trainable=False, name="updates")
        self.first_bad_step = tf.Variable(-1, dtype=tf.int64, trainable=False, name="bad")
        self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="good_steps")
        self.loss_scale = tf.Variable(
            INITIAL_LOSS_SCALE if scaled else 1.0, trainable=False, name="loss_scale"
        )
        # The average starts as a copy of the weights. Zeros would need a bias correction.
        if ema is not None:
            for average, weight in zip(ema.weights, model.weights, strict=True):
                average.assign(weight)

    @property
    def eval_model(self) -> keras.Model:
        """The model to judge: the moving average where there is one."""
        return self.model if self.ema is None else self.ema

    def variables(self) -> dict[str, keras.Variable | tf.Variable | Remote]:
        """All state by name: "model/...", "optimizer/...", "ema/...", and the counters."""
        # These names are in every checkpoint: to rename one is to refuse older runs' state.
        named: dict[str, keras.Variable | tf.Variable | Remote] = {
            f"model/{k}": v for k, v in named_weights(self.model).items()
        }
        named |= {f"optimizer/{k}": v for k, v in self.optimizer.slots.items()}
        if self.ema is not None:
            named |= {f"ema/{k}": v for k, v in named_weights(self.ema).items()}
        for name in ("step", "updates", "first_bad_step", "good_steps", "loss_scale"):
            named[name] = getattr(self, name)
        return named

    @property
    def read_by_all_hosts(self) -> bool:
        """Whether all hosts have to call to_arrays together: some slots are on other hosts."""
        return self.optimizer.shards is not None and self.optimizer.shards.on_several_hosts

    def to_arrays(self) -> dict[str, np.ndarray]:
        """A copy of all state on the host, bfloat16 as float32; waits for the device."""
        shards, arrays = self.optimizer.shards, {}
        for name, variable in self.variables().items():
            if shards is not None and name.startswith("optimizer/"):
                # "optimizer/encoderblock_0/norm_0/gamma/momentum" is a slot of the variable
                # "encoderblock_0/norm_0/gamma". All hosts loop in the same order, as reading is a
                # collective.
                owner = name.removeprefix("optimizer/").rpartition("/")[0]
                arrays[name] = shards.read(owner, _raw(variable))
            else:
                # numpy() may show the variable's own memory, which the next step changes while the
                # background thread still writes the checkpoint.
                arrays[name] = np.array(_raw(variable).numpy())
        # NumPy has no bfloat16 of its own, and float32 holds each of its values exactly.
        return {n: a if a.dtype != "bfloat16" else a.astype("float32") for n, a in arrays.items()}

    def from_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes over all state.

        Raises:
          ConfigError: `arrays` has other names or shapes than this state; nothing has changed then.
        """
        variables = self.variables()
        # Of a checkpoint only the header is read here: a StateFile reads an array each time it is
        # asked for, so a loop over its items would read the whole file.
        if isinstance(arrays, StateFile):
            shapes = arrays.shapes
        else:
            shapes = {name: tuple(array.shape) for name, array in arrays.items()}
        wrong = [f"{n}: only in the checkpoint" for n in sorted(set(arrays) - set(variables))]
        wrong += [f"{n}: not in the checkpoint" for n in sorted(set(variables) - set(arrays))]
        for name in sorted(set(arrays) & set(variables)):
            have, want = shapes[name], tuple(variables[name].shape)
            if have != want:
                wrong.append(f"{name}: {have} in the checkpoint, {want} in this config")
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ConfigError(
                f"the checkpoint does not fit the config: {'; '.join(wrong[:5])}{more}. Use the "
                "config it was trained with, or config.init_from to take over the weights only."
            )
        # Only now, after all names and shapes have been compared: a state that is refused must not
        # be half replaced.
        for name, variable in variables.items():
            raw = _raw(variable)
            # The host that has the slot takes it over.
            if isinstance(raw, Remote):
                continue
            raw.assign(arrays[name].astype(raw.dtype.as_numpy_dtype))


def _raw(variable: keras.Variable | tf.Variable | Remote) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable
