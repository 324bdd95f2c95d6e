"""A config for tests that train: the demo's digits at their own 8 px, the smallest ViT, no XLA."""

import json

import numpy as np
from PIL import Image

from vit_dist.config import finalize, get_defaults
from vit_dist.training.checkpoint import open_checkpoint

OPS = "value_range(-1, 1)|keep('image', 'label')"
ANY_SIZE = f"resize(size)|{OPS}"


def get_config():
    config = get_defaults()
    config.image_size = 8
    config.total_steps = 12
    config.log_steps = 4
    config.eval_steps = 100
    config.save_steps = 100
    config.input.batch_size = 16
    config.input.eval_batch_size = 180
    config.input.train_ops = f"random_shift(1)|{OPS}"
    config.input.eval_ops = OPS
    config.input.num_threads = 1
    config.data.test_split = ""
    config.monitor.batch_images = 0  # a pipeline of their own, an eighth of such a run's time
    config.model.variant = "mu/4"
    config.model.width = 16
    config.model.mlp_dim = 16
    config.model.dropout = 0.0
    config.schedule.name = "constant"
    config.step.jit = "off"
    config.strategy.name = "single"
    return config


def make(**changed):
    """The config with keys changed; a dot is written as __."""
    config = get_config()
    for key, value in changed.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    return finalize(config)


def without_evaluation(**changed):
    return make(data__val_split="", data__test_split="", **changed)


def make_folder(folder):
    """Eight images each of two classes, for training and again for evaluation."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (folder / split / name).mkdir(parents=True)
            for i in range(8):
                image = Image.fromarray(random.integers(0, 255, (20, 20, 3), np.uint8))
                image.save(folder / split / name / f"{i}.jpg")
    return folder


def of_folder(folder, *, total_steps=2, **changed):
    ops = f"decode|{ANY_SIZE}"
    data = {"data__source": "folder", "data__data_dir": str(folder), "data__test_split": ""}
    pipes = {"input__train_ops": ops, "input__eval_ops": ops}
    return make(**{**data, **pipes, "total_steps": total_steps, **changed})


def rows(workdir):
    """What metrics.jsonl says."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def arrays(workdir):
    """The state in the newest checkpoint."""
    return open_checkpoint(str(workdir)).arrays


def assert_same(one, other, **tolerance):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], **{"rtol": 0, **tolerance}, err_msg=name)
