"""Small ViTs for tests of the model."""

import numpy as np

from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights


def tiny_config(**options):
    """A ViT of width 16 and 4 x 2 patches: the image is not square."""
    options = {"image_size": (16, 8), "num_classes": 5, "width": 16, "depth": 2, **options}
    return vit_config("mu/4", mlp_dim=24, **options)


def tiny_vit(*, precision="float32", form="matrix", **options):
    return randomize(build_vit(tiny_config(**options), precision=precision, form=form))


def randomize(model, scale=0.3):
    """Weights that leave nothing at zero or one, so that no part can hide."""
    rng = np.random.default_rng(0)
    for name, variable in named_weights(model).items():
        center = 1.0 if name.endswith("gamma") else 0.0
        variable.assign(center + scale * rng.standard_normal(variable.shape))
    return model


def images_for(model, batch=3):
    shape = (batch, *model.image_size, model.channels)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def arrays_of(model):
    return {name: v.numpy() for name, v in named_weights(model).items()}
