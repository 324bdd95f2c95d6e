"""A whole training step as HLO, and what a TPU's compiler says of it, without a TPU."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

from vit_dist.config.errors import UserError
from vit_dist.costs.compiled import TOPOLOGIES, Compiled, Compiler, TooLarge
from vit_dist.data.mixing import ROW_SPEC, make_mixing
from vit_dist.model.variants import choose_form, vit_config
from vit_dist.model.vit import ViT, build_vit, named_weights
from vit_dist.run.lowering import Lowered
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import make_gradients
from vit_dist.training.update import make_update

HERE = Path(__file__).resolve().parent
TOPOLOGY = TOPOLOGIES["TPU v5e"]


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
    kind: str = "TPU"  # of device, though nothing runs here: layers have another form on each

    def make_model(self) -> ViT:
        config = vit_config(
            self.variant, image_size=self.image_size, num_classes=1000, **self.model
        )
        return build_vit(config, precision=self.precision, form=choose_form(self.kind))


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

    batch_size, side = setting.batch_size, setting.image_size
    batch = {
        "image": tf.TensorSpec((batch_size, side, side, 3), tf.uint8),
        "label": tf.TensorSpec((batch_size,), tf.int32),
    }
    if mixing is not None:
        batch["mix"] = tf.TensorSpec((batch_size, *ROW_SPEC.shape), ROW_SPEC.dtype)
    # One replica without a strategy: gradients and update follow each other in one program.
    lowered = Lowered(lambda batch: update(*gradients(batch, tf.constant(0))).metrics, batch)
    return lowered.module(), network.count_params()


def open_compiler(python: str, cache: str | None = None) -> Compiler:
    """The compiler of an environment; ends this program where there is none."""
    try:
        return Compiler(python, cache=cache)
    except UserError as error:
        sys.exit(str(error))


def compile_step(compiler: Compiler, step: bytes, topology: str) -> Compiled:
    """What the compiler says of a program; ends this program where it does not compile."""
    try:
        found = compiler.compile(step, topology)
    except UserError as error:
        sys.exit(str(error))
    if isinstance(found, TooLarge):
        sys.exit(f"it needs {found.needed / 1e9:.1f} GB of {found.limit / 1e9:.1f}")
    return found


def compile_peer(python: str, topology: str, *what: str) -> Compiled:
    """What the compiler says of the peer: see _tpu_peer.py."""
    command = [python, str(HERE / "_tpu_peer.py"), topology, *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))
