"""The step of every config as a TPU would get it: one program of static shapes, and no host."""

import importlib.util
import re
from pathlib import Path

import pytest
import tensorflow as tf

from vit_dist.run import build
from vit_dist.run.check import check
from vit_dist.training.step import make_gradients
from vit_dist.training.update import make_update

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.py"))
# Instructions that leave the device, or call what only this machine has.
HOST = {"custom-call", "infeed", "outfeed", "send", "recv", "send-done", "recv-done"}


def small(path):
    """The config with another size of network, on made-up images."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.image_size = 32
    config.model.update({"width": 16, "mlp_dim": 16, "num_heads": 2, "depth": 1})
    # Tracing a recipe's own pipes takes seconds, and the step begins behind them.
    config.input.train_ops = config.input.eval_ops = "decode|resize(size)|value_range(-1, 1)"
    config.input.batch_size = 8 * config.step.accumulation
    made_up = {"source": "synthetic", "name": None, "data_dir": None, "height": 32, "width": 32}
    made_up |= {"num_examples": 1000, "num_classes": 10, "val_split": "", "test_split": ""}
    made_up |= {"file_format": None}
    config.data.update(made_up)
    return config


def hlo_of(config):
    """The whole step on one replica, with the layers' form for TPUs."""
    options, data = check(config)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    state = build.make_state(options, strategy)
    assert state.model.get_config()["form"] == "tensor"
    gradients = make_gradients(
        state,
        options.loss,
        preprocess=options.input.pipe.device,
        batch_size=options.input.batch_size,
        accumulation=options.step.accumulation,
        seed=options.seed,
        mixing=options.input.mixing,
        masked=bool(data.damage),
    )
    update = make_update(
        state,
        schedule=options.schedule,
        clip_norm=options.step.clip_norm,
        ema_decay=options.step.ema_decay,
    )

    @tf.function(jit_compile=True, autograph=False)
    def step(*values):
        return update(*gradients(dict(zip(batch, values, strict=True)), tf.constant(0))).metrics

    count = options.input.batch_size
    batch = {
        "image": tf.TensorSpec((count, 32, 32, 3), tf.uint8),
        "label": tf.TensorSpec((count,), tf.int32),
    }
    if options.input.mixing is not None:
        batch["mix"] = tf.TensorSpec((count, 6), tf.float32)
    if data.damage:
        batch["mask"] = tf.TensorSpec((count,), tf.float32)
    return step.experimental_get_compiler_ir(*batch.values())(stage="hlo")


def unfit(hlo):
    """What in a program a TPU's replica could not run by itself."""
    kinds = set(re.findall(r"^.*? = .*? ([\w-]+)\(", hlo, re.M))
    # A bound in place of a length, f32[<=8]: a shape that only the data decides.
    return kinds & HOST | set(re.findall(r"\w+\[[^\]]*<=\d+[^\]]*\]", hlo))


# Between them: each optimizer, loss, precision and kind of mixing; dropout, averages, clipping.
COVERING = ("deit3", "transfer", "vit_i21k")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[pytest.mark.exhaustive] * (p.stem not in COVERING))
        for p in CONFIGS
    ],
)
def test_a_recipes_step_is_one_program(path, monkeypatch):
    monkeypatch.setattr(build, "device_kind", lambda strategy: "TPU")
    config = small(path)
    hlo = hlo_of(config)
    assert " dot(" in hlo and not unfit(hlo)
    # The masks of dropout come from the generator that a TPU has in hardware.
    dropout = config.model.dropout or config.model.attention_dropout
    assert ("algorithm=rng_default" in hlo) == bool(dropout)


def test_a_shape_that_the_data_decides_is_found():
    @tf.function(jit_compile=True, autograph=False)
    def positive(x):
        return tf.reduce_sum(tf.gather(x, tf.where(x > 0)[:, 0]))

    hlo = positive.experimental_get_compiler_ir(tf.TensorSpec((8,), tf.float32))(stage="hlo")
    assert unfit(hlo)
