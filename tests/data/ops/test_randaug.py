"""RandAugment: each operation and whole images against independent implementations."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.support import peers
from vit_dist.data.ops import augment, randaug
from vit_dist.data.ops import basic as ops

pytestmark = pytest.mark.compiles  # ops that XLA compiles

HEIGHT, WIDTH = 48, 40
RANDOM = np.random.RandomState(0)
PHOTO = peers.photo(HEIGHT, WIDTH)
NARROW = (PHOTO // 4 + 60).astype(np.uint8)
NOISE = RANDOM.randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
FLAT = np.full((HEIGHT, WIDTH, 3), 77, np.uint8)
IMAGES = {"photo": PHOTO, "narrow": NARROW, "noise": NOISE, "flat": FLAT}
NAMES = randaug.REFERENCE_OPS


@functools.cache
def compiled(form):
    """(image, level of LEVELS, place in NAMES, sign, words) -> image; compiled once for all."""

    def one(image, level, name, sign, words):
        layers = [
            randaug.reference_layer(name, m, s, HEIGHT, WIDTH, form)
            for m in LEVELS
            for name in NAMES
            for s in (1, -1)
        ]
        at = (level * len(NAMES) + name) * 2 + tf.cast(sign < 0, tf.int32)
        # A cutout's size is the op's, not the layer's: 12 pixels here.
        style = augment.Style(reference=True, cutout=12)
        return augment.augment(image, augment.pick(layers, at[tf.newaxis]), style, words)

    function = tf.function(one, jit_compile=True, autograph=False)
    # As tensors: of Python's ints it would compile each value anew.
    return lambda *args: function(*(tf.constant(arg) for arg in args)).numpy()


LEVELS = (0, 3, 9.5, 10, 15, 20)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_the_reference(name, kind):
    image = IMAGES[kind]
    for level, m in enumerate(LEVELS):
        for sign in (1, -1):
            words = RANDOM.randint(0, 2**32, (1, 2), np.uint32)
            have = compiled("reference")(image, level, NAMES.index(name), sign, words)
            if name == "Cutout":
                place = int(words[0, 0]) % HEIGHT, int(words[0, 1]) % WIDTH
                want = peers.cutout(image, *place, 12)
            else:
                want = peers.reference_op(image, name, m, sign, None)
            np.testing.assert_array_equal(have, want, f"m={m} sign={sign}")


def test_quirks_of_the_reference():
    def run(level, name):
        return compiled("reference")(PHOTO, level, name, 1, np.zeros((1, 2), np.uint32))

    at = {m: i for i, m in enumerate(LEVELS)}
    solarize, posterize = NAMES.index("Solarize"), NAMES.index("Posterize")
    for m in (10, 20):  # the threshold wraps to 0: all is inverted
        np.testing.assert_array_equal(run(at[m], solarize), 255 - PHOTO)
    inverted = np.where(PHOTO < 128, PHOTO, 255 - PHOTO)
    np.testing.assert_array_equal(run(at[15], solarize), inverted)
    np.testing.assert_array_equal(run(at[20], posterize), PHOTO)
    # At 0 bits a shift by 8, which TensorFlow clamps to 7.
    np.testing.assert_array_equal(run(at[0], posterize), np.where(PHOTO >= 128, 128, 0))


@pytest.mark.parametrize(
    "name,m,want",
    [
        ("Solarize", 0, PHOTO),
        ("Solarize", 3, peers.pil_op(PHOTO, "Solarize", 256 - 76)),
        ("Solarize", 10, 255 - PHOTO),
        ("Solarize", 20, 255 - PHOTO),
        ("Posterize", 0, PHOTO),
        ("Posterize", 10, peers.pil_op(PHOTO, "Posterize", 4)),
        ("Posterize", 15, peers.pil_op(PHOTO, "Posterize", 2)),
        ("Posterize", 20, np.zeros_like(PHOTO)),
        ("Contrast", 3, peers.pil_op(PHOTO, "Contrast", 0.64)),
        ("Contrast", 10, peers.pil_op(PHOTO, "Contrast", 1.9)),
        ("Brightness", 10, peers.pil_op(PHOTO, "Brightness", 1.9)),
    ],
)
def test_the_fixed_form_repairs_three_quirks(name, m, want):
    words = np.zeros((1, 2), np.uint32)
    have = compiled("fixed")(PHOTO, LEVELS.index(m), NAMES.index(name), 1, words)
    np.testing.assert_array_equal(have, want)


def example(image, seed):
    return {
        "image": tf.constant(image),
        "label": tf.constant(0),
        "seed": tf.constant(seed, tf.int32),
    }


def decisions(seed, n, position=1):
    words = augment.draw(tf.random.fold_in(tf.constant(seed), position), (n, 4)).numpy()
    names = [NAMES[int(w) % 32 // 2] for w in words[:, 0]]
    return list(zip(names, [1 - 2 * (int(w) % 2) for w in words[:, 0]], words[:, 1:3], strict=True))


def test_whole_images_are_the_reference():
    """n=3, m=10: what is drawn, applied one by one by the independent implementation."""
    parsed = ops.parse("randaug(3, 10)")
    seen = set()
    for i in range(40):
        image = list(IMAGES.values())[i % 3]
        want = image
        for name, sign, words in decisions((i, 5), 3):
            place = [int(w) % n for w, n in zip(words, image.shape, strict=False)]
            want = peers.reference_op(want, name, 10, sign, place)
            seen.add(name)
        have = parsed.host(example(image, (i, 5)))["image"]
        np.testing.assert_array_equal(have, want)
    assert seen == set(NAMES)


def test_alone_together_and_in_tf_data_are_equal():
    parsed = ops.parse("flip_lr|randaug(3, 10)")
    images = tf.constant(np.stack(list(IMAGES.values()) * 2))
    seeds = tf.constant(RANDOM.randint(0, 2**31 - 1, (8, 2), np.int32))
    labels = tf.range(8)
    alone = [
        parsed.host({"image": images[i], "label": labels[i], "seed": seeds[i]})["image"]
        for i in range(8)
    ]
    slices = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels, "seed": seeds})
    ds = slices.map(parsed.host_each).batch(8).map(parsed.host_chunk, num_parallel_calls=2)
    chunk = next(iter(ds))
    assert set(chunk) == {"image", "label"}
    np.testing.assert_array_equal(chunk["image"], tf.stack(alone))
    np.testing.assert_array_equal(chunk["label"], labels)


def test_operations_are_drawn_uniformly():
    names = [name for i in range(600) for name, *_ in decisions((i, 1), 2)]
    counts = np.array([names.count(name) for name in NAMES])
    assert counts.sum() == 1200 and (abs(counts - 75) < 5 * 75**0.5).all()


@pytest.mark.parametrize(
    "text,message",
    [
        ("randaug(0, 10)", "n=0 must be an int in 1..16"),
        ("randaug(2, 21)", "m=21 must be a number in 0..20"),
        ("randaug(2, 10, 'mine')", "form='mine' must be one of"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=message):
        ops.parse(text)


def test_an_image_of_varying_size_is_named():
    parsed = ops.parse("decode|randaug(2, 10)")
    with pytest.raises(ValueError, match=r"op 2 'randaug.*one fixed size"):
        tf.data.Dataset.from_tensors({**example(b"", (0, 0))}).map(parsed.host)
