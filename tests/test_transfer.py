"""configs/transfer.py: every recipe, data set and origin of weights is a config that is whole."""

import importlib.util
import itertools
from pathlib import Path

import pytest
from tiny import make_folder

from vit_dist.config import finalize
from vit_dist.model.variants import vit_config
from vit_dist.wiring import check

FILE = Path(__file__).resolve().parents[1] / "configs" / "transfer.py"
_SPEC = importlib.util.spec_from_file_location("transfer", FILE)
transfer = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(transfer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize(
    ("weights", "recipe"), list(itertools.product(transfer.WEIGHTS, transfer.RECIPES))
)
def test_every_recipe_on_a_folder(folder, weights, recipe):
    """Bound to what it feeds: model, optimiser, schedule, pipes."""
    arg = f"model=mu/8,dataset=folder,res=48,weights={weights},recipe={recipe}"
    config = transfer.get_config(arg)
    config.data.data_dir = str(folder)
    config.input.batch_size = 8
    config.schedule.warmup_epochs = None
    run = check(finalize(config))
    assert run.model["image_size"] == (48, 48)
    settings, scale = transfer.WEIGHTS[weights]
    assert all(run.model[key] == value for key, value in settings.items())
    assert str(run.train_pipe).endswith(scale) and str(run.eval_pipe).endswith(scale)
    if recipe == "linear":
        assert run.optimizer["lr_multipliers"] == (("^head/", 1.0), (".", 0.0))


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
    assert "resize_small(448)" in config.input.eval_ops
    assert vit_config(config.model.variant, image_size=384, num_classes=10, pool="tok")


def test_unknown_arguments():
    with pytest.raises(ValueError, match="did you mean 'dataset'"):
        transfer.get_config("data=cifar10")
    with pytest.raises(ValueError, match="allowed: cifar10, "):
        transfer.get_config("dataset=mnist")
