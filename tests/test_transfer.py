"""configs/transfer.py: every recipe, data set and origin of weights is a config that is whole."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest

from tests.support.tiny import make_folder
from vit_dist.config import finalize
from vit_dist.config.defaults import changes, to_json
from vit_dist.config.recipe import TRANSFER_TASKS
from vit_dist.data.pipeline import check_pipe
from vit_dist.model.variants import vit_config
from vit_dist.run.check import check

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


transfer = module_of("transfer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module", autouse=True)
def each_pipe_is_traced_once():
    """That takes a second where it augments, and the origins of weights share a few pipes."""
    known = {}

    def once(source, pipe):
        key = (str(pipe), repr(source.element_spec), source.num_classes)
        if key not in known:
            known[key] = check_pipe(source, pipe)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vit_dist.run.check.check_pipe", once)
        yield


def pairs():
    """All of them; exhaustive but for one of each row, which take turns with the recipes."""
    recipes = list(transfer.RECIPES)
    assert len(transfer.WEIGHTS) >= len(recipes)
    for row, weights in enumerate(transfer.WEIGHTS):
        for recipe in recipes:
            further = recipe != recipes[row % len(recipes)]
            yield pytest.param(weights, recipe, marks=[pytest.mark.exhaustive] * further)


@pytest.mark.parametrize(("weights", "recipe"), list(pairs()))
def test_every_recipe_on_a_folder(folder, weights, recipe):
    """Bound to what it feeds: model, optimizer, schedule, pipes."""
    arg = f"model=mu/8,dataset=folder:{folder},res=48,weights={weights},recipe={recipe}"
    config = transfer.get_config(arg)
    config.input.batch_size = 8
    config.total_epochs, config.total_steps = None, 500
    run, _ = check(finalize(config))
    assert run.image_size == (48, 48)
    settings, scale = transfer.WEIGHTS[weights]
    expected = {k: run.model.network["width"] if v == -1 else v for k, v in settings.items()}
    assert expected.items() <= run.model.network.items()
    assert str(run.input.pipe).endswith(scale) and str(run.evaluation.pipe).endswith(scale)
    if recipe == "linear":
        assert run.optimizer.lr_multipliers == (("^head/", 1.0), (".", 0.0))
    if recipe in ("deit", "deit3"):
        assert run.schedule.hold_steps * 5 == run.schedule.warmup_steps > 0


@pytest.mark.parametrize(
    ("arg", "steps", "lr"),
    [
        ("model=B/16,dataset=cifar10,res=384", 10_000, 0.01),
        ("dataset=imagenet2012,recipe=vision_transformer", 20_000, 0.03),
        ("dataset=cifar10,recipe=vision_transformer", 10_000, 0.01),
        ("dataset=oxford_iiit_pet", 500, 0.01),
    ],
)
def test_published_numbers(arg, steps, lr):
    config = transfer.get_config(arg)
    assert (config.total_steps, config.optimizer.learning_rate) == (steps, lr)
    assert (config.image_size, config.input.batch_size, config.step.clip_norm) == (384, 512, 1.0)
    assert config.optimizer.momentum == 0.9 and config.optimizer.weight_decay == 0.0
    assert ("resize_small(448)" in config.input.eval_ops) == ("recipe" not in arg)
    assert vit_config(config.model.variant, image_size=384, num_classes=10, pool="tok")


# README of facebookresearch/deit: --lr 5e-6 --min-lr 5e-6 --weight-decay 1e-8 --epochs 30, batches
# of 2 x 8 x 32; README_revenge.md for DeiT III. The rest are the defaults of its main.py.
DEIT = {
    "total_epochs": 30.0, "image_size": 384, "input.batch_size": 512, "input.repeats": 3,
    "optimizer.name": "adamw", "optimizer.learning_rate": 5e-6, "optimizer.weight_decay": 1e-8,
    "optimizer.epsilon": None, "schedule.name": "cosine", "schedule.warmup_epochs": 5.0,
    "schedule.hold_epochs": 1.0, "schedule.start_factor": 1e-6 / 5e-6, "schedule.end_factor": 1.0,
    "mixing.mixup_alpha": 0.8, "mixing.cutmix_alpha": 1.0, "mixing.switch_probability": 0.5,
    "loss.name": "softmax", "loss.label_smoothing": 0.1, "model.drop_path": 0.1,
    "model.drop_path_growth": "linear", "model.gelu": "erf", "posemb_method": "bicubic",
    "step.clip_norm": None, "step.ema_decay": 0.99996, "step.accumulation": 1,
    "input.train_ops":
        "decode_jpeg_and_inception_crop(size, area_min=8, method='bicubic', antialias=True)"
        "|flip_lr|rand_augment_timm('rand-m9-mstd0.5-inc1')|random_erasing(0.25)"
        "|normalize('imagenet')",
    "input.eval_ops":
        "decode|resize_small(438, 'bicubic', True)|central_crop(size)|normalize('imagenet')",
}  # fmt: skip


def test_deit_at_384():
    config = transfer.get_config("dataset=imagenet2012,weights=deit,recipe=deit")
    for key, expected in DEIT.items():
        assert functools.reduce(getattr, key.split("."), config) == expected, key


@pytest.mark.parametrize(
    ("name", "model"), [("deit", "B/16"), ("deit3", "S/16"), ("deit3", "B/16")]
)
def test_deit_is_that_of_its_own_config(name, model):
    """But for the validation split, steps in place of epochs, and DeiT III's cls token."""
    mine = transfer.get_config(f"model={model},dataset=imagenet2012,weights={name},recipe={name}")
    own = module_of(name).get_config(f"{model},stage=384")
    steps = round(mine.total_epochs * 1_281_167) // 512  # the reference drops the rest of each
    assert 0 <= steps - own.total_steps <= mine.total_epochs
    assert own.schedule.warmup_steps == 5 * own.schedule.hold_steps == 5 * 2502
    changed = {line.split(":")[0] for line in changes(plain(own), plain(mine))}
    expected = {f"data.{split}_split" for split in ("train", "val", "test")}
    expected |= {f"schedule.{part}_{unit}" for part in ("warmup", "hold") for unit in UNITS}
    expected |= {f"total_{unit}" for unit in UNITS}
    expected |= {"model.prefix_posemb"} if name == "deit3" else set()
    assert changed == expected


UNITS = ("steps", "epochs")


def plain(config):
    return json.loads(to_json(config))


@pytest.mark.parametrize("dataset", TRANSFER_TASKS)
@pytest.mark.parametrize("model", ["B/16", "Ti/16", "S/32", "L/16"])
def test_finetune_384_is_the_recipe_of_vision_transformer(dataset, model):
    short = module_of("finetune_384").get_config(f"{dataset},model={model}")
    long = transfer.get_config(f"model={model},dataset={dataset},recipe=vision_transformer")
    assert plain(short) == plain(long)


def test_unknown_arguments():
    with pytest.raises(ValueError, match="did you mean 'dataset'"):
        transfer.get_config("data=cifar10")
    with pytest.raises(ValueError, match="allowed: cifar10, "):
        transfer.get_config("dataset=mnist")
