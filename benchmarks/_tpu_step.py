"""A whole training step as HLO, and what a TPU's compiler says of it, without a TPU."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2

from vit_dist.data.mixing import ROW_SPEC, make_mixing
from vit_dist.model.variants import choose_form, vit_config
from vit_dist.model.vit import ViT, build_vit, named_weights
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import make_gradients, make_update

HERE = Path(__file__).resolve().parent
COMPILER = HERE.parent / ".venv-tpu-compile" / "bin" / "python"
TOPOLOGY = "v5e:1x1"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A training step on one device; `model`, `optimizer` and `mixing` as in the config."""

    variant: str = "Ti/16"
    image_size: int = 224
    batch_size: int = 32
    precision: str = "bfloat16"
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mixing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    accumulation: int = 1
    ema: bool = False

    def make_model(self) -> ViT:
        # "TPU" here, though nothing of it runs: layers have another form on TPUs.
        config = vit_config(
            self.variant, image_size=self.image_size, num_classes=1000, **self.model
        )
        return build_vit(config, precision=self.precision, form=choose_form("TPU"))


def export_step(setting: Setting) -> tuple[bytes, int]:
    """The step (forward, backward, clip, update) as an HloModuleProto, and the parameters' count.

    The bytes are the same at each export of one step: nothing in them counts what TensorFlow has
    traced before.
    """
    network = setting.make_model()
    optimizer = make_optimizer(
        named_weights(network),
        OptimizerOptions(**{"weight_decay": 0.1, **setting.optimizer}),
        num_heads=network.get_config()["num_heads"],
    )
    state = TrainState(network, optimizer, setting.make_model() if setting.ema else None)
    mixing = make_mixing(**setting.mixing)
    gradients = make_gradients(
        state,
        make_loss(),
        preprocess=lambda images: tf.cast(images, tf.float32) / 127.5 - 1,
        batch_size=setting.batch_size,
        accumulation=setting.accumulation,
        seed=0,
        mixing=mixing,
    )
    update = make_update(
        state,
        schedule=Schedule(1e-3, total_steps=100_000, warmup_steps=10_000),
        clip_norm=1.0,
        ema_decay=0.9999 if setting.ema else None,
    )

    # One replica without a strategy: gradients and update follow each other in one program.
    @tf.function(jit_compile=True, autograph=False)
    def step(*values):
        return update(*gradients(dict(zip(batch, values, strict=True)), tf.constant(0))).metrics

    batch_size, side = setting.batch_size, setting.image_size
    batch = {
        "image": tf.TensorSpec((batch_size, side, side, 3), tf.uint8),
        "label": tf.TensorSpec((batch_size,), tf.int32),
    }
    if mixing is not None:
        batch["mix"] = tf.TensorSpec((batch_size, *ROW_SPEC.shape), ROW_SPEC.dtype)
    serialized = step.experimental_get_compiler_ir(*batch.values())(stage="hlo_serialized")
    return _without_counters(serialized), network.count_params()


def _without_counters(serialized: bytes) -> bytes:
    """The same module; numbers, names and origins of what TensorFlow has traced before are gone."""
    module = hlo_pb2.HloModuleProto.FromString(serialized)
    # Computations and instructions refer to each other by numbers that count on in the process.
    places = {c.id: i for i, c in enumerate(module.computations, 1)}
    module.name, module.id = "step", 0
    module.entry_computation_id = places[module.entry_computation_id]
    for computation in module.computations:
        computation.id = places[computation.id]
        computation.name = f"computation.{computation.id}"
        first = computation.id << 32  # a number says which computation the instruction is in
        numbers = {x.id: first + i for i, x in enumerate(computation.instructions)}
        computation.root_id = numbers[computation.root_id]
        for instruction in computation.instructions:
            instruction.ClearField("metadata")
            instruction.id = numbers[instruction.id]
            instruction.name = f"{instruction.opcode}.{instruction.id}"
            lists = (
                (instruction.operand_ids, numbers),
                (instruction.control_predecessor_ids, numbers),
                (instruction.called_computation_ids, places),
            )
            for ids, new in lists:
                ids[:] = [new[i] for i in ids]
    module.entry_computation_name = f"computation.{module.entry_computation_id}"
    return module.SerializeToString(deterministic=True)


def compile_for_tpu(python: str, topology: str, *what: str) -> dict[str, float]:
    """What the compiler says of a program: see _tpu_compiler.py."""
    # In another interpreter, whose environment has JAX and libtpu.
    command = [python, str(HERE / "_tpu_compiler.py"), topology, *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])
