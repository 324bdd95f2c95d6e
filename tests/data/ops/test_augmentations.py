"""Whole policies, from what they draw to the pixels, against Pillow; and the agreement table."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support import agreement, peers
from tests.support.agreement import HEIGHT, NOISE, PHOTO, WIDTH
from tests.support.peers import pil_op
from vit_dist.data.ops import augment, autoaugment, erasing, randaug
from vit_dist.data.ops import basic as ops

pytestmark = pytest.mark.compiles  # ops that XLA compiles

COUNT = 24
IMAGES = np.stack([(PHOTO, NOISE)[i % 4 == 3] for i in range(COUNT)])
SEEDS = np.stack([np.arange(COUNT), np.full(COUNT, 9)], 1).astype(np.int32)
IMAGENET = (124, 116, 104)


def run(text, images=IMAGES, seeds=SEEDS):
    """The images after the pipe, in one chunk."""
    pipe = ops.parse(text)
    assert pipe.compiled_tail
    chunk = {"image": tf.constant(images), "seed": tf.constant(seeds)}
    return pipe.host_chunk(chunk)["image"].numpy()


def words_of(i, shape):
    return augment.draw(tf.random.fold_in(tf.constant(SEEDS[i]), 1), shape).numpy()


def unit(word):
    """float32 in [0, 1) of 24 bits."""
    return np.float32(int(word) >> 8) * np.float32(2**-24)


def test_sharpness_is_that_of_tensorflows_convolution_but_for_the_order_of_its_sum():
    layer = augment.layer("sharpness", factor=1.9)
    for image in agreement.IMAGES:
        have = agreement.run_layer(image, layer, agreement.REFERENCE).astype(int)
        want = peers.tf_sharpness_by_convolution(image, 1.9)
        # Where the exact mean is an integer, rounding decides between two levels, and the blend
        # makes 0.9 levels of one. Every 13th mean is an integer.
        assert abs(have - want).max() <= 1 and (have != want).mean() < 1 / 13


def test_the_table_of_agreement_is_up_to_date():
    have, documented = agreement.rows(), agreement.documented()
    assert list(have) == list(documented), "run python tests/support/agreement.py"
    worse = {name: most for name, most in have.items() if most > documented[name]}
    assert not worse, "a difference has grown; run python tests/support/agreement.py to see all"


def timm_value(name, level, sign, inc):
    """The parameter of each operation as timm has it, for Pillow."""
    part = level / 10
    solarize, posterize = min(256, int(part * 256)), int(part * 4)
    factor = max(0.1, 1 + sign * 0.9 * part) if inc else part * 1.8 + 0.1
    return {
        "Rotate": part * 30 * sign,
        "Posterize": 4 - posterize if inc else posterize,
        "Solarize": 256 - solarize if inc else solarize,
        "SolarizeAdd": min(128, int(part * 110)),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor),
        **dict.fromkeys(("ShearX", "ShearY"), part * 0.3 * sign),
        "TranslateX": part * 0.45 * WIDTH * sign,
        "TranslateY": part * 0.45 * HEIGHT * sign,
    }.get(name)


@pytest.mark.parametrize("spec", ["rand-m9-mstd0.5-inc1", "rand-m8-n3-p0.8"])
def test_rand_augment_timm(spec):
    options = randaug._parse_timm(spec)
    have = run(f"rand_augment_timm({spec!r}, 'nearest')")
    applied = 0
    for i in range(COUNT):
        want = IMAGES[i]
        for words in words_of(i, (options["n"], 5)):
            if unit(words[1]) >= options["p"]:
                continue
            level = float(randaug._timm_level(tf.constant(words[2:4]), options))
            name = randaug.TIMM_OPS[int(words[0]) % 15]
            value = timm_value(name, level, 1 - 2 * (int(words[4]) % 2), options["inc"])
            want = pil_op(want, name, value, fill=IMAGENET)
            applied += 1
        np.testing.assert_array_equal(have[i], want)
    assert abs(applied / COUNT / options["n"] - options["p"]) < 0.25


def test_magnitudes_of_timm_are_normal_and_clipped():
    words = augment.draw(tf.constant([1, 2]), (4000, 2))
    options = randaug._parse_timm("rand-m9-mstd0.5")
    levels = np.array([randaug._timm_level(pair, options) for pair in words[:1500]])
    assert levels.max() == 10 and abs(np.median(levels) - 9) < 0.05
    below = np.mean(levels < 8.5)
    assert abs(below - 0.1587) < 0.03
    uniform = randaug._timm_level(words[0], randaug._parse_timm("rand-m9-mstd101"))
    assert float(uniform) == pytest.approx(9 * unit(words[0, 0]))


def trivial_value(name, bin_, sign):
    part = bin_ / 30
    return {
        "Posterize": int(8 - np.round(bin_ / 5)),
        "Solarize": float(np.linspace(255, 0, 31)[bin_]),
        "Rotate": 135 * part * sign,
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1 + 0.99 * part * sign),
        **dict.fromkeys(("ShearX", "ShearY"), 0.99 * part * sign),
        **dict.fromkeys(("TranslateX", "TranslateY"), -int(32 * part * sign)),
    }.get(name)


def test_trivial_augment():
    have = run("trivial_augment")
    for i in range(COUNT):
        words = words_of(i, (3,))
        name = autoaugment.TRIVIAL_OPS[int(words[0]) % 14]
        value = trivial_value(name, int(words[1]) % 31, 1 - 2 * (int(words[2]) % 2))
        np.testing.assert_array_equal(have[i], pil_op(IMAGES[i], name, value), name)


def test_autoaugment():
    have = run("autoaugment")
    for i in range(COUNT):
        words, want = words_of(i, (5,)), IMAGES[i]
        for j, (name, p, level) in enumerate(autoaugment.POLICY_V0[int(words[0]) % 25]):
            if unit(words[1 + j]) < np.float32(p):
                sign = 1 - 2 * (int(words[3 + j]) % 2)
                want = peers.reference_op(want, name, level, sign, None, translate=250)
        np.testing.assert_array_equal(have[i], want)


def test_three_augment():
    have = run("three_augment")
    kinds = set()
    for i in range(COUNT):
        words = words_of(i, (2,))
        kind = ("Grey", "Solarize", "GaussianBlur")[int(words[0]) % 3]
        value = {"Solarize": 128, "GaussianBlur": 0.1 + 1.9 * float(unit(words[1]))}.get(kind)
        want = pil_op(IMAGES[i], kind, value)
        atol = 1 if kind == "GaussianBlur" else 0
        np.testing.assert_allclose(have[i].astype(int), want, rtol=0, atol=atol)
        kinds.add(kind)
    assert len(kinds) == 3


def test_color_jitter():
    have = run("color_jitter(0.3, 0.4, 0.5)")
    orders = set()
    for i in range(COUNT):
        words, want = words_of(i, (4,)), IMAGES[i]
        names = ("Brightness", "Contrast", "Color")
        factors = [1 - x + 2 * x * unit(w) for x, w in zip((0.3, 0.4, 0.5), words[1:], strict=True)]
        order = autoaugment.ORDERS[int(words[0]) % 6]
        for j in order:
            want = pil_op(want, names[j], float(factors[j]))
        # A factor's last bit decides some pixels' truncation, and two more operations follow.
        np.testing.assert_allclose(have[i].astype(int), want, rtol=0, atol=3)
        orders.add(tuple(order))
    assert len(orders) > 3


@pytest.mark.parametrize(
    "text,name,value",
    [
        ("greyscale(0.4)", "Grey", None),
        ("solarize(100, 0.4)", "Solarize", 100),
        ("gaussian_blur(1.5, 1.5, p=0.4)", "GaussianBlur", 1.5),
    ],
)
def test_single_operations_happen_as_often_as_said(text, name, value):
    have = run(text)
    for i in range(COUNT):
        hit = unit(words_of(i, (2,))[0]) < 0.4
        want = pil_op(IMAGES[i], name, value) if hit else IMAGES[i]
        np.testing.assert_allclose(
            have[i].astype(int), want, rtol=0, atol=1 if name == "GaussianBlur" else 0
        )


MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def erased_parts(mode, count=300, side=32):
    images = np.full((count, side, side, 3), 7, np.uint8)
    seeds = np.stack([np.arange(count), np.zeros(count)], 1).astype(np.int32)
    have = run(f"random_erasing(0.5, {mode!r}, area_min=10, area_max=30)", images, seeds)
    changed = (have != 7).any(-1)
    return have, changed[changed.any((1, 2))]


def test_random_erasing_cuts_rectangles_of_the_right_size():
    have, changed = erased_parts("const")
    assert abs(len(changed) / 300 - 0.5) < 5 * (0.25 / 300) ** 0.5
    want = np.round(MEAN * 255)
    assert (have[(have != 7).all(-1)] == want).all()
    ratios, areas = [], []
    for mask in changed:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        h, w = (x[-1] - x[0] + 1 for x in (rows, columns))
        assert mask.sum() == h * w
        ratios.append(h / w)
        areas.append(h * w / mask.size)
    assert 0.08 < min(areas) < 0.14 and 0.26 < max(areas) < 0.33
    assert min(ratios) > 0.2 and max(ratios) < 5 and abs(np.median(np.log(ratios))) < 0.3


def test_random_erasing_fills_with_normalised_noise():
    have, _ = erased_parts("pixel")
    values = (have[(have != 7).any(-1)] / 255 - MEAN) / STD
    # Clipped to 0..255, N(0, 1) has this mean and spread.
    assert (abs(values.mean(0)) < 0.03).all() and (abs(values.std(0) - 0.97) < 0.03).all()
    assert erasing.levels("pixel", 0.5, 0.5).max() == 255


@pytest.mark.parametrize(
    "text,message",
    [
        ("rand_augment_timm('m9')", "must begin with 'rand'"),
        ("rand_augment_timm('rand-m9-w0')", "'w0' is no part"),
        ("rand_augment_timm('rand-m9', 'cubic')", "interpolation='cubic' must be one of"),
        ("autoaugment('v1')", "policy='v1' must be 'v0'"),
        ("color_jitter(-1)", "strengths must be numbers in 0..5"),
        ("greyscale(2)", "p=2 must be a number in 0..1"),
        ("solarize(300)", "threshold=300 must be an int in 0..256"),
        ("gaussian_blur(1, 3)", "need 0 < min <= max <= 2.0"),
        ("random_erasing(0.5, 'noise')", "mode='noise' must be one of"),
        ("random_erasing(area_min=0)", "need 0 < min <= max <= 100"),
        ("random_erasing(mean=0.5)", "std is missing"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=message):
        ops.parse(text)
