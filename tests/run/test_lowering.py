"""The step of every config as a TPU would get it: one program of static shapes, and no host."""

import importlib.util
import re
from pathlib import Path

import pytest
import tensorflow as tf

from vit_dist.run.check import check
from vit_dist.run.lowering import lower_step

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
    return lower_step(options, data, share=options.input.batch_size, kind="TPU").text()


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
def test_a_recipes_step_is_one_program(path):
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
