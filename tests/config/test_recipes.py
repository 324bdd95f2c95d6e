"""The published recipes in configs/: what each trains, to the number. No data set is opened."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.config.recipe import parse_arg
from vit_dist.data.ops.pipe import parse
from vit_dist.model.vit import weight_shapes
from vit_dist.run.check import check, check_parts
from vit_dist.training.multipliers import multiplier

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.py"))
# Images by data set and split, and classes.
SIZES = {
    ("imagenet2012", "train"): (1_281_167, 1000),
    ("imagenet2012", "train[:99%]"): (1_268_355, 1000),
    ("imagenet21k", "full[51200:]"): (14_197_122 - 51_200, 21_843),
    ("cifar10", "train[:98%]"): (49_000, 10),
    ("cifar100", "train[:98%]"): (49_000, 100),
    ("oxford_iiit_pet", "train[:90%]"): (3312, 37),
    ("oxford_flowers102", "train[:90%]"): (918, 102),
}
TPU_FLOPS = 0.35 * 8 * 197e12  # what the docstrings count on


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text()))


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(path, arg=None):
    get_config = module_of(path).get_config
    return get_config(arg) if arg else get_config()


def table(path):
    """Argument -> the row's other cells by the head of their column."""
    lines = [re.split(r" *\| *", x.strip("| ")) for x in docstring(path).splitlines() if "|" in x]
    head, _, *rows = lines
    return {row[0].strip("`:"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


RECIPES = {path.stem: path for path in CONFIGS if "Hours: not measured" in docstring(path)}
ROWS = [(name, arg) for name, path in RECIPES.items() for arg in table(path)]
recipes = pytest.mark.parametrize(("name", "arg"), ROWS, ids=lambda x: x)


@functools.cache
def run_of(name, arg, pipes=False):
    """The recipe checked on made-up images of the data set's number and classes.

    Its pipes are left out unless asked for: tracing them takes seconds.
    """
    config = load(RECIPES[name], arg)
    if not pipes:
        config.input.train_ops = config.input.eval_ops = "decode|resize(size)|value_range(-1, 1)"
    data = config.data
    assert data.source == "tfds"
    data.num_examples, data.num_classes = SIZES[data.name, data.train_split]
    data.source, data.name, data.height, data.width = "synthetic", None, 32, 32
    data.val_split, data.test_split = "val" if pipes else "", ""
    options, _ = check(config)
    return options


# Every config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_loads_and_says_what_it_is(path):
    config, text = load(path), docstring(path)
    assert f"vit_dist.train --config configs/{path.name}" in text and "Hardware: " in text
    size = (config.image_size,) * 2
    for ops in (config.input.train_ops, config.input.eval_ops):
        assert parse(ops, size=size, num_classes=10).steps
    if path.stem in RECIPES:
        assert re.search(r"Published: .*Not\s+run\s+here", text, re.S)


def test_there_is_every_recipe():
    assert set(RECIPES) == {"vit_s16_i1k", "augreg", "vit_i21k", "finetune_384", "deit", "deit3"}


@recipes
def test_steps_and_hours_are_those_of_the_table(name, arg):
    run, row = run_of(name, arg), table(RECIPES[name])[arg]
    assert f"{run.total_steps:,}" == row["Steps"]
    images = run.total_steps * run.input.batch_size
    # Three times the forward pass, two operations for each multiply-add.
    hours = images * 6 * multiply_adds(run.model.network) / TPU_FLOPS / 3600
    last_digit = 10.0 ** -len(row["Hours"].partition(".")[2])
    assert abs(hours - float(row["Hours"])) <= 0.51 * last_digit


def multiply_adds(config):
    """Of one image's forward pass."""
    width, pixels = config["width"], np.prod(np.broadcast_to(config["image_size"], 2))
    patches = pixels // config["patch_size"] ** 2
    tokens = patches + (config["pool"] == "tok")
    block = tokens * width * (4 * width + 2 * config["mlp_dim"]) + 2 * tokens**2 * width
    head = width * (config["rep_size"] + config["num_classes"])
    return float(pixels * 3 * width + config["depth"] * block + head)


# Golden values: schedule at five steps

SCHEDULES = [
    ("vit_s16_i1k", "90", [0, 1e-7, 1e-3, 5.77096e-4, 2.4e-13]),
    ("vit_s16_i1k", "150", [0, 1e-7, 1e-3, 5.44618e-4, 8e-14]),
    ("vit_s16_i1k", "300", [0, 1e-7, 1e-3, 5.21714e-4, 2e-14]),
    ("augreg", "data=i21k,model=B/16", [0, 1e-7, 1e-3, 5.07654e-4, 2e-15]),
    ("augreg", "data=i1k,model=B/16", [0, 1e-7, 1e-3, 5.94187e-4, 4e-13]),
    ("vit_i21k", "B/16", [0, 1e-7, 1e-3, 5.16623e-4, 3.32421e-9]),
    ("finetune_384", "imagenet2012", [0, 6e-5, 0.03, 0.015604, 1.9e-10]),
    ("finetune_384", "cifar10", [0, 2e-5, 0.01, 0.0054129, 2.7e-10]),
    ("deit", "S/16", [1e-6, 1e-6, 9.99322e-4, 5.05e-4, 1.00271e-5]),
    ("deit", "B/16,stage=384", [1e-6, 1e-6, 5e-6, 5e-6, 5e-6]),
    ("deit3", "S/16", [1e-6, 1e-6, 3.99962e-3, 2.005e-3, 1.00154e-5]),
    ("deit3", "B/16", [1e-6, 1e-6, 2.99971e-3, 1.505e-3, 1.00115e-5]),
    ("deit3", "B/16,stage=224", [1e-6, 1e-6, 1e-5, 1e-5, 1e-5]),
]


@pytest.mark.parametrize(("name", "arg", "expected"), SCHEDULES)
def test_schedule(name, arg, expected):
    """At the first step, the second, the end of the warmup, the middle and the last."""
    schedule = run_of(name, arg).schedule
    total = schedule.total_steps
    steps = [0, 1, schedule.warmup_steps, total // 2, total - 1]
    rates = schedule(tf.constant(steps, tf.int64))
    # Near 0 the cosine in float32 is only so good.
    np.testing.assert_allclose(
        rates, expected, rtol=2e-5, atol=1e-9 if expected[4] > 1e-9 else 1e-8
    )


@pytest.mark.parametrize(
    ("name", "arg", "second"),
    [("deit", "S/16", 2.008e-4), ("deit3", "S/16", 8.008e-4), ("deit3", "B/16", 6.008e-4)],
)
def test_rate_of_the_second_epoch(name, arg, second):
    schedule = run_of(name, arg).schedule
    epoch = schedule.hold_steps
    assert epoch == {"deit": 1_281_024 // 1024, "deit3": 1_281_024 // 2048}[name]
    rates = schedule(tf.constant([epoch - 1, epoch, 2 * epoch - 1], tf.int64))
    np.testing.assert_allclose(rates, [1e-6, second, second], rtol=1e-5)


# Golden values: the optimizer and what decays

OPTIMIZERS = [
    ("vit_s16_i1k", "90", "adamw", 1e-3, 1e-4, "schedule", "bfloat16", 1.0),
    ("augreg", "data=i21k,model=Ti/16", "adamw", 1e-3, 0.03, "learning_rate", "bfloat16", 1.0),
    ("augreg", "data=i1k,model=B/16", "adamw", 1e-3, 0.1, "learning_rate", "bfloat16", 1.0),
    ("vit_i21k", "B/16", "adamw", 1e-3, 0.03, "learning_rate", "float32", 1.0),
    ("finetune_384", "imagenet2012", "sgd", 0.03, 0.0, "learning_rate", "bfloat16", 1.0),
    ("deit", "S/16", "adamw", 1e-3, 0.05, "learning_rate", "float32", None),
    ("deit", "B/16,stage=384", "adamw", 5e-6, 1e-8, "learning_rate", "float32", None),
    ("deit3", "S/16", "lamb", 4e-3, 0.05, "learning_rate", "float32", 1.0),
    ("deit3", "B/16", "lamb", 3e-3, 0.05, "learning_rate", "float32", 1.0),
    ("deit3", "B/16,stage=384", "adamw", 1e-5, 0.1, "learning_rate", "float32", None),
]


@pytest.mark.parametrize(("name", "arg", *"orwsmc"), OPTIMIZERS)
def test_optimizer(name, arg, o, r, w, s, m, c):
    run = run_of(name, arg)
    keys = ("name", "learning_rate", "weight_decay", "decay_scale", "momentum_dtype")
    assert tuple(getattr(run.optimizer, key) for key in keys) == (o, r, w, s, m)
    assert run.step.clip_norm == c
    assert (run.optimizer.beta_1, run.optimizer.beta_2) == (0.9, None)  # 0.999
    assert run.optimizer.epsilon == (1e-8 if o == "lamb" else None)
    assert run.step.ema_decay == (0.99996 if "deit" in name else None)


@pytest.mark.parametrize("name", RECIPES)
def test_kernels_decay_and_nothing_else(name):
    run = run_of(name, next(iter(table(RECIPES[name]))))
    names = list(weight_shapes({**run.model.network, "depth": 2}))
    decayed = {n for n in names if multiplier(run.optimizer.decay_multipliers, n, 0.0)}
    inner = [f"attention/{part}" for part in ("query", "key", "value", "out")]
    inner += ["mlp/dense_0", "mlp/dense_1"]
    expected = {f"encoderblock_{i}/{part}/kernel" for i in range(2) for part in inner}
    expected |= {"embedding/kernel", "head/kernel"}
    expected |= {"pre_logits/kernel"} if run.model.network["rep_size"] else set()
    assert decayed == expected and len(names) > 2 * len(decayed)


# Golden values: model, loss, mixing, augmentation

TRAIN = "decode_jpeg_and_inception_crop(size)|flip_lr|"
BICUBIC = (
    "decode_jpeg_and_inception_crop(size, area_min=8, method='bicubic', antialias=True)|flip_lr|"
)
TIMM = "rand_augment_timm('rand-m9-mstd0.5-inc1')|"
RECIPE_VALUES = {
    ("vit_s16_i1k", "90"): {
        "input.batch_size": 1024, "model.variant": "S/16", "model.pool": "gap",
        "model.posemb": "sincos2d", "model.rep_size": -1, "model.head_bias": 0.0,
        "loss.name": "softmax", "mixing.mixup_alpha": 0.2, "mixing.fold_lambda": True,
        "input.train_ops": f"{TRAIN}randaug(2, 10)|value_range(-1, 1)",
        "input.eval_ops": "decode|resize_small(256)|central_crop(size)|value_range(-1, 1)",
    },
    ("augreg", "data=i21k,model=B/16"): {
        "input.batch_size": 4096, "model.pool": "tok", "model.rep_size": 0, "model.dropout": 0.0,
        "model.head_bias": -10.0, "loss.name": "sigmoid", "loss.reduction": "sum",
        "mixing.mixup_alpha": 0.2, "input.train_ops": f"{TRAIN}randaug(2, 15)|value_range(-1, 1)",
    },
    ("augreg", "data=i1k,model=B/16"): {
        "model.head_bias": -6.9, "model.rep_size": -1, "mixing.mixup_alpha": 0.5,
        "input.train_ops": f"{TRAIN}randaug(2, 15)|value_range(-1, 1)",
    },
    ("vit_i21k", "L/16"): {
        "input.batch_size": 4096, "model.rep_size": -1, "model.dropout": 0.1, "model.pool": "tok",
        "loss.name": "softmax", "mixing.mixup_alpha": 0.0,
        "input.train_ops": f"{TRAIN}value_range(-1, 1)",
    },
    ("finetune_384", "imagenet2012"): {
        "input.batch_size": 512, "step.accumulation": 8, "image_size": 384,
        "optimizer.momentum": 0.9, "model.rep_size": 0, "posemb_method": "align_corners",
    },
    ("deit", "S/16"): {
        "input.batch_size": 1024, "input.repeats": 3, "model.drop_path": 0.1, "model.gelu": "erf",
        "model.drop_path_growth": "linear", "loss.label_smoothing": 0.1, "loss.name": "softmax",
        "mixing.mixup_alpha": 0.8, "mixing.cutmix_alpha": 1.0, "mixing.switch_probability": 0.5,
        "mixing.mode": "batch", "mixing.fold_lambda": False,
        "input.train_ops": f"{BICUBIC}{TIMM}random_erasing(0.25)|normalize('imagenet')",
        "input.eval_ops":
            "decode|resize_small(256, 'bicubic', True)|central_crop(size)|normalize('imagenet')",
    },
    ("deit3", "B/16"): {
        "input.batch_size": 2048, "input.repeats": 3, "image_size": 192, "loss.name": "sigmoid",
        "loss.reduction": "mean", "loss.threshold": 0.0, "loss.label_smoothing": 0.0,
        "model.layer_scale": 1e-4, "model.drop_path": 0.2, "model.drop_path_growth": "constant",
        "mixing.mixup_alpha": 0.8, "mixing.cutmix_alpha": 1.0,
        "input.train_ops":
            f"{BICUBIC}three_augment()|color_jitter(0.3, 0.3, 0.3)|normalize('imagenet')",
        "input.eval_ops":
            "decode|resize_small(192, 'bicubic', True)|central_crop(size)|normalize('imagenet')",
    },
    ("deit3", "S/16,stage=384"): {
        "input.batch_size": 512, "input.repeats": 1, "image_size": 384, "model.drop_path": 0.0,
        "loss.name": "softmax", "loss.label_smoothing": 0.1,
        "input.train_ops": f"{BICUBIC}{TIMM}normalize('imagenet')",
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "arg"), RECIPE_VALUES)
def test_values(name, arg):
    config = load(RECIPES[name], arg)
    for key, expected in RECIPE_VALUES[name, arg].items():
        value = functools.reduce(getattr, key.split("."), config)
        assert value == expected, key


@pytest.mark.parametrize(
    ("level", "randaug", "alpha"),
    [
        ("none", None, 0.0),
        ("light1", (2, 0), 0.0),
        ("light2", (2, 10), 0.2),
        ("medium1", (2, 15), 0.2),
        ("medium2", (2, 15), 0.5),
        ("strong1", (2, 20), 0.5),
        ("strong2", (2, 20), 0.8),
    ],
)
def test_levels_of_augreg(level, randaug, alpha):
    config = load(RECIPES["augreg"], f"data=i1k,model=S/16,aug={level},decay=0.03")
    found = re.search(r"randaug\((\d+), (\d+)\)", config.input.train_ops)
    assert (found and tuple(map(int, found.groups()))) == randaug
    assert config.mixing.mixup_alpha == alpha and config.optimizer.weight_decay == 0.03


def test_default_levels_are_those_of_the_table():
    module = module_of(RECIPES["augreg"])
    for arg, row in table(RECIPES["augreg"]).items():
        chosen = parse_arg(arg, model="", data="")
        level, decay = module.CHOSEN[chosen.data, chosen.model]
        assert row["Default level"] == f"{level}, decay {decay}"


# Lambda, weight and box of the first steps with seed 0.
FIRST_DRAWS = {
    "vit_s16_i1k": [(x, x, 0, 0, 0, 0) for x in (0.807364, 0.788633, 0.754829)],
    "deit": [(0.557557, 1, 76, 224, 18, 168), (0.883167, 0.883167, 0, 0, 0, 0)],
}


@pytest.mark.parametrize(("name", "arg"), [("vit_s16_i1k", "90"), ("deit", "S/16")])
def test_mixing_draws(name, arg):
    """One draw for the whole batch; big_vision's favours the example itself, DeiT's cuts half."""
    run = run_of(name, arg)
    draw = functools.partial(run.input.mixing.draw, seed=0, batch_size=4, size=(224, 224))
    rows = np.stack([draw(tf.constant(step, tf.int64)) for step in range(60)])
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :1], rows.shape))
    np.testing.assert_allclose(rows[: len(FIRST_DRAWS[name]), 0], FIRST_DRAWS[name], atol=1e-5)
    own, cut = rows[:, 0, 0], rows[:, 0, 2:].any(-1)
    if name == "deit":
        assert 0.3 < cut.mean() < 0.7 and own.min() < 0.3
    else:
        # The median of Beta(0.2, 0.2) folded is 0.976, by scipy; of 60 draws within these bounds.
        assert not cut.any() and own.min() >= 0.5 and 0.88 < np.median(own) < 0.998


@pytest.mark.parametrize("name", RECIPES)
def test_pipes_give_what_the_model_takes(name):
    run = run_of(name, next(iter(table(RECIPES[name]))), pipes=True)
    assert run.input.pipe.steps and run.evaluation.pipe.steps


@recipes
def test_batches_can_be_cut_for_many_devices(name, arg):
    run = run_of(name, arg)
    for replicas in (1, 8, 32):
        check_parts(run.input.batch_size, run.step, run.input.mixing, num_replicas=replicas)


# Arguments


def test_arguments():
    spec = {"model": ("S/16", "B/16"), "epochs": 300, "decay": 0.0}
    assert vars(parse_arg(None, **spec)) == {"model": "S/16", "epochs": 300, "decay": 0.0}
    assert parse_arg("B/16,epochs=90", **spec).model == "B/16"
    assert parse_arg("decay=1e-2", **spec).decay == 0.01
    for arg, message in [
        ("modle=B/16", "no argument 'modle'; did you mean 'model'"),
        ("model=L/16", "model 'L/16' is unknown; allowed: S/16, B/16"),
        ("epochs=x", "epochs must be int, got 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_arg(arg, **spec)
    with pytest.raises(ValueError, match="S/16 trains at 224 px already"):
        load(RECIPES["deit3"], "S/16,stage=224")
