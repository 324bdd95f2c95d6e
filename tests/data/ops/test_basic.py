"""Ops against PIL and numpy, eagerly and inside tf.data."""

import io
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

from vit_dist.data.ops import basic as ops
from vit_dist.data.ops import pipe

RANDOM = np.random.RandomState(0)
IMAGE = RANDOM.randint(0, 256, (20, 30, 3), np.uint8)
SMOOTH = np.asarray(Image.fromarray(IMAGE).resize((120, 90), Image.Resampling.BICUBIC))


def example(image=IMAGE, *, seed=(1, 2), **entries):
    base = {"image": image, "label": np.int32(3), "seed": np.array(seed, np.int32), **entries}
    return {key: tf.constant(value) for key, value in base.items()}


def run(text, image=IMAGE, *, seed=(1, 2), **names):
    """The image after the pipe; asserts that it is the same eagerly and inside tf.data."""
    parsed = ops.parse(text, **names)
    eager = parsed.host(example(image, seed=seed))["image"].numpy()
    ds = tf.data.Dataset.from_tensors(example(image, seed=seed)).map(parsed.host)
    np.testing.assert_array_equal(next(ds.as_numpy_iterator())["image"], eager)
    return eager


def encoded(kind, image=IMAGE, **options):
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    return data.getvalue()


def bilinear(image, height, width):
    """Half-pixel centres, no antialiasing, edges clamped."""
    out = image.astype(np.float64)
    for axis, size in ((0, height), (1, width)):
        n = out.shape[axis]
        at = (np.arange(size) + 0.5) * n / size - 0.5
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        below, above = (np.take(out, np.clip(low + i, 0, n - 1), axis) for i in (0, 1))
        out = below * (1 - weight) + above * weight
    return out


@pytest.mark.parametrize("kind", ["png", "bmp", "jpeg"])
def test_decode(kind):
    data = encoded(kind, SMOOTH)
    want = np.asarray(Image.open(io.BytesIO(data)))
    # Another DCT and chroma filter in JPEG.
    np.testing.assert_allclose(run("decode", data), want, atol=6 if kind == "jpeg" else 0)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_decode_repeats_grey(kind):
    grey = encoded(kind, IMAGE[..., 0])
    image = run("decode", grey)
    assert image.shape == (20, 30, 3) and (image[..., 0] == image[..., 2]).all()


def test_decode_takes_the_first_frame_and_passes_arrays_through():
    frames = [Image.fromarray(np.full((4, 5, 3), v, np.uint8)) for v in (10, 200)]
    data = io.BytesIO()
    frames[0].save(data, "gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(run("decode", data.getvalue()), np.full((4, 5, 3), 10))
    np.testing.assert_array_equal(run("decode", IMAGE), IMAGE)
    np.testing.assert_array_equal(run("decode", IMAGE[..., :1]), np.repeat(IMAGE[..., :1], 3, -1))


@pytest.mark.parametrize("size", [(7, 11), (40, 33), 16])
def test_resize_bilinear(size):
    want = np.round(bilinear(IMAGE, *((size, size) if isinstance(size, int) else size)))
    np.testing.assert_allclose(run("resize(size)", size=size), want, atol=1)


def test_resize_antialiased_as_pil():
    want = Image.fromarray(SMOOTH).resize((20, 15), Image.Resampling.BILINEAR)
    have = run("resize((15, 20), antialias=True)", SMOOTH)
    np.testing.assert_allclose(have.astype(int), np.asarray(want, int), atol=1)


@pytest.mark.parametrize("smaller,size", [(30, (30, 40)), (45, (45, 60)), (90, (90, 120))])
def test_resize_small_as_pils_box(smaller, size):
    want = Image.fromarray(SMOOTH).resize(size[::-1], Image.Resampling.BOX)
    have = run(f"resize_small({smaller})", SMOOTH)
    assert have.shape == (*size, 3)
    np.testing.assert_allclose(have.astype(int), np.asarray(want, int), atol=1)


def test_resize_small_weighs_parts_of_pixels():
    row = np.arange(0, 250, 50, dtype=np.uint8)  # 5 pixels to 3: each covers 5/3
    image = np.repeat(np.tile(row, (5, 1))[..., None], 3, -1)
    spans = [(0, 5 / 3), (5 / 3, 10 / 3), (10 / 3, 5)]
    overlap = [[max(0, min(b, i + 1) - max(a, i)) for i in range(5)] for a, b in spans]
    want = np.round(np.array(overlap) @ row / (5 / 3))
    np.testing.assert_array_equal(run("resize_small(3)", image)[0, :, 0], want)


@pytest.mark.parametrize("size", [(8, 9), (20, 30), 13])
def test_central_crop(size):
    h, w = (size, size) if isinstance(size, int) else size
    top, left = (20 - h) // 2, (30 - w) // 2
    want = IMAGE[top : top + h, left : left + w]
    np.testing.assert_array_equal(run("central_crop(size)", size=size), want)


@pytest.mark.parametrize(
    "value,mode", [(0, "constant"), (128, "constant"), (0, "reflect"), (0, "edge")]
)
def test_pad(value, mode):
    options = {"constant_values": value} if mode == "constant" else {}
    want = np.pad(IMAGE, ((3, 3), (3, 3), (0, 0)), mode, **options)
    np.testing.assert_array_equal(run(f"pad(3, {value}, {mode!r})"), want)


def test_random_crop_reaches_each_place_equally():
    image = np.arange(20, dtype=np.uint8).reshape(4, 5, 1)
    parsed = ops.parse("random_crop((3, 3))")
    seeds = tf.data.Dataset.range(2400).map(lambda i: tf.stack([tf.cast(i, tf.int32), 0]))
    ds = seeds.map(lambda seed: parsed.host({**example(image), "seed": seed})["image"])
    corners = np.array([x[0, 0, 0] for x in ds.as_numpy_iterator()])
    values, counts = np.unique(corners, return_counts=True)
    assert values.tolist() == [0, 1, 2, 5, 6, 7]
    assert stats.chisquare(counts).pvalue > 1e-4
    crop = run("random_crop((3, 3))", image)
    y, x = divmod(int(crop[0, 0, 0]), 5)
    np.testing.assert_array_equal(crop, image[y : y + 3, x : x + 3])


@pytest.mark.parametrize("mode", ["constant", "edge"])
def test_random_shift_translates(mode):
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)), mode)
    windows = {padded[y : y + 20, x : x + 30].tobytes(): (y, x) for y in range(5) for x in range(5)}
    parsed = ops.parse(f"random_shift(2, mode={mode!r})")
    seen = {
        windows[parsed.host(example(seed=(i, 0)))["image"].numpy().tobytes()] for i in range(200)
    }
    assert len(seen) == 25
    assert run(f"random_shift(2, mode={mode!r})").shape == IMAGE.shape


def test_flip_lr_is_a_fair_coin():
    parsed = ops.parse("flip_lr")
    flipped = []
    for i in range(200):
        image = parsed.host(example(seed=(i, 0)))["image"].numpy()
        flipped.append((image == IMAGE[:, ::-1]).all())
        assert flipped[-1] or (image == IMAGE).all()
    assert stats.binomtest(sum(flipped), 200).pvalue > 1e-4
    run("flip_lr")


def coordinates(height, width):
    """An image that tells, after a crop, where it was cut: channels 0 and 1 are y and x."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)


def test_inception_crop_statistics():
    height, width = 200, 240
    parsed = ops.parse("inception_crop(200, area_min=20, area_max=60)")
    seeds = tf.data.Dataset.range(400).map(lambda i: tf.stack([tf.cast(i, tf.int32), 0]))
    image = coordinates(height, width)
    ds = seeds.map(lambda s: parsed.host({**example(image), "seed": s})["image"])
    areas, ratios, tops = [], [], []
    for crop in ds.as_numpy_iterator():
        # Bilinear with clamped edges spans the cut from its first to its last pixel.
        (y0, x0), (y1, x1) = (crop[i, i, :2].astype(int) for i in (0, -1))
        areas.append((y1 - y0 + 1) * (x1 - x0 + 1) / (height * width))
        ratios.append((x1 - x0 + 1) / (y1 - y0 + 1))
        tops.append(y0)
    assert 0.19 < min(areas) < 0.25 and 0.55 < max(areas) < 0.62
    assert 0.74 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.35
    assert abs(np.mean(areas) - 0.4) < 0.04 and min(tops) < 5


def test_inception_crop_is_a_bilinear_resize_of_a_window():
    for i in range(5):
        seed = tf.constant([i, 3])
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            SMOOTH.shape,
            tf.zeros((0, 0, 4)),
            tf.random.fold_in(seed, 1),
            min_object_covered=0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.1, 0.5),
            use_image_if_no_bounding_boxes=True,
        )
        (y, x), (h, w) = begin.numpy()[:2], size.numpy()[:2]
        want = np.round(bilinear(SMOOTH[y : y + h, x : x + w], 10, 12))
        have = run("inception_crop((10, 12), area_min=10, area_max=50)", SMOOTH, seed=(i, 3))
        np.testing.assert_allclose(have, want, atol=1)
        assert have.dtype == np.uint8


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_cropping_before_decoding_is_cropping_after(kind):
    data = encoded(kind, SMOOTH)
    for seed in range(8):
        # Both ops are the last of two, so that they draw from the same stream.
        one = run("keep('image')|decode_jpeg_and_inception_crop(24)", data, seed=(seed, 0))
        two = ops.parse("decode|inception_crop(24)").host(example(data, seed=(seed, 0)))["image"]
        difference = np.abs(one.astype(int) - two.numpy().astype(int))
        # Chroma at the window's edge is filtered without its neighbours.
        assert difference.mean() < 2 if kind == "jpeg" else not difference.any()
    array = ops.parse("keep('image')|decode_jpeg_and_inception_crop(24)").host(example(SMOOTH))
    assert array["image"].shape == (24, 24, 3)


def test_each_op_has_its_own_stream():
    parsed = ops.parse("flip_lr|flip_lr")
    pairs = set()
    for i in range(64):
        seed = tf.constant([i, 0])
        flips = [tf.random.stateless_uniform((), tf.random.fold_in(seed, p)) < 0.5 for p in (1, 2)]
        pairs.add(tuple(bool(f) for f in flips))
        image = parsed.host(example(seed=(i, 0)))["image"].numpy()
        want = IMAGE[:, ::-1] if flips[0] != flips[1] else IMAGE
        np.testing.assert_array_equal(image, want)
    assert len(pairs) == 4


MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    "text,want",
    [
        ("value_range", IMAGE / 127.5 - 1),
        ("value_range(0, 1)", IMAGE / 255),
        ("normalize('imagenet')", (IMAGE / 255 - MEAN) / STD),
        (
            "normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))",
            (IMAGE / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.2, 0.1],
        ),
        ("normalize(0.5, 0.25)", (IMAGE / 255 - 0.5) / 0.25),
        ("decode", IMAGE),
    ],
)
def test_device_ops(text, want):
    parsed = ops.parse(text)
    assert parsed.host(example())["image"].dtype == tf.uint8
    for function in (parsed.device, tf.function(parsed.device, jit_compile=True)):
        images = function(tf.constant(IMAGE[None]))
        assert images.dtype == tf.float32 and images.shape == (1, 20, 30, 3)
        np.testing.assert_allclose(images[0], want, atol=2e-6, rtol=2e-6)
    np.testing.assert_allclose(
        parsed.device(tf.constant(IMAGE[None], tf.float32))[0], want, atol=2e-6
    )


def test_onehot_and_keep():
    parsed = ops.parse("value_range|onehot(num_classes)|keep('label', 'index')", num_classes=5)
    output = parsed.host(example(index=np.int64(7)))
    assert set(output) == {"label", "index"}
    np.testing.assert_array_equal(output["label"], np.eye(5, dtype=np.float32)[3])
    assert set(ops.parse("decode").host(example(index=np.int64(7)))) == {"image", "label"}
    assert str(parsed) == "value_range|onehot(num_classes)|keep('label', 'index')"


def test_every_op_has_a_docstring_and_a_test():
    text = pathlib.Path(__file__).read_text()
    for name, entry in pipe._REGISTRY.items():
        if entry.make.__module__ == "vit_dist.data.ops.basic":
            assert entry.make.__doc__ and f"{name}" in text
