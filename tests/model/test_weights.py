"""Weights of one ViT in another: what is taken, resampled, left; and what is refused."""

import itertools
import re

import numpy as np
import pytest
import tensorflow as tf

from vit_dist.model.classes import match_classes
from vit_dist.model.posemb import resize_posemb
from vit_dist.model.unfit import UnfitError
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.model.weights import LoadReport, adapt_weights


def vit(*, seed=0, **options):
    options = {"image_size": 16, "num_classes": 5, "width": 16, "mlp_dim": 24, **options}
    return build_vit(vit_config(options.pop("variant", "mu/4"), **options), seed=seed)


def arrays_of(model):
    return {name: v.numpy() for name, v in named_weights(model).items()}


def trained(**options):
    """(arrays, config) of a ViT without a single zero or one."""
    model = vit(**options)
    rng = np.random.default_rng(0)
    arrays = {k: rng.standard_normal(v.shape).astype("f") for k, v in arrays_of(model).items()}
    return arrays, model.get_config()


HEAD = ["head/bias", "head/kernel"]
PRE_LOGITS = ["pre_logits/bias", "pre_logits/kernel"]
POSITIONS = ["pos_embedding"]
MAP_NAMES = [n for n in arrays_of(vit(pool="map")) if n.startswith("map_head/")]


# From a ViT with a learned table at 16 x 16 pixels and 5 classes, pool "gap" unless said.
@pytest.mark.parametrize(
    ("source", "target", "resized", "new", "unused"),
    [
        ({}, {}, [], [], []),
        ({"pool": "tok"}, {"pool": "tok"}, [], [], []),
        ({}, {"image_size": (24, 8)}, POSITIONS, [], []),
        ({"pool": "tok"}, {"pool": "tok", "image_size": 32}, POSITIONS, [], []),
        ({}, {"image_size": (32, 8)}, POSITIONS, [], []),  # as many patches, another grid
        ({}, {"num_classes": 3}, [], HEAD, []),
        ({}, {"num_classes": 0}, [], [], HEAD),
        ({"num_classes": 0}, {}, [], HEAD, []),
        # A head learnt on other features is of no use, though the shape fits.
        ({"pool": "tok"}, {}, POSITIONS, HEAD, ["cls"]),
        ({}, {"pool": "tok"}, POSITIONS, [*HEAD, "cls"], []),
        ({"pool": "map"}, {}, [], HEAD, MAP_NAMES),
        ({}, {"pool": "map"}, [], [*HEAD, *MAP_NAMES], []),
        ({"pool": "tok"}, {"cls_token": True}, [], HEAD, []),
        ({"pool": "tok"}, {"pool": "tok_gap"}, [], HEAD, []),
        ({"posemb": "sincos2d"}, {"posemb": "sincos2d", "image_size": 24}, [], [], []),
        ({}, {"posemb": "sincos2d"}, [], [], POSITIONS),
        ({"posemb": "sincos2d"}, {}, [], POSITIONS, []),
        ({"rep_size": -1}, {}, [], HEAD, PRE_LOGITS),
        ({}, {"rep_size": -1}, [], [*HEAD, *PRE_LOGITS], []),
        ({"rep_size": -1}, {"rep_size": -1}, [], [], []),
        ({"layer_scale": 0.1, "depth": 2}, {"layer_scale": 0.1, "depth": 2}, [], [], []),
    ],
)
def test_what_becomes_of_each_tensor(source, target, resized, new, unused):
    arrays, config = trained(**source)
    model = vit(seed=1, **target)
    before = arrays_of(model)
    report = adapt_weights(model, arrays, source=config)
    after = arrays_of(model)

    def first_words(lines):
        return sorted(line.split()[0] for line in lines)

    assert first_words(report.resized) == sorted(resized)
    assert first_words(report.new) == sorted(new)
    assert first_words(report.unused) == sorted(unused)
    assert sorted(report.loaded) == sorted(set(after) - set(resized) - set(new))
    assert set(arrays) <= set(report.loaded) | set(resized) | set(new) | set(unused)
    for name in report.loaded:
        np.testing.assert_array_equal(after[name], arrays[name])
    for name in new:
        np.testing.assert_array_equal(after[name], before[name])
    for name in resized:
        expected = resize_posemb(
            arrays[name],
            old_grid=(4, 4),
            new_grid=model.grid,
            old_prefix=int(config["pool"] == "tok"),
            new_prefix=model.prefix,
        )
        np.testing.assert_array_equal(after[name], expected)


def test_the_report_reads_well():
    arrays, config = trained(pool="tok")
    report = adapt_weights(vit(num_classes=3, image_size=24), arrays, source=config)
    assert str(report).splitlines() == [
        "loaded 20 tensors unchanged, 1 resized, 2 new (head), 1 unused (cls)",
        "resized: pos_embedding (1, 17, 16) -> (1, 36, 16) (align_corners)",
    ]
    lines = report.full().splitlines()
    assert len(lines) == 24 and lines[-4:] == [
        str(report).splitlines()[1],
        "new: head/kernel (16, 3), as model.pool differs",
        "new: head/bias (3,), as model.pool differs",
        "unused: cls (1, 1, 16)",
    ]


def test_a_report_of_many_tensors_stays_short():
    names = [f"{part}/{i} (3, 3)" for part in ("text", "a", "b", "c", "d") for i in range(100)]
    report = LoadReport(loaded=["x"], unused=names, assumed=["gelu 'erf', which no file tells"])
    assert str(report).splitlines() == [
        "loaded 1 tensors unchanged, 500 unused (text, a, b, c, ...)",
        "assumed: gelu 'erf', which no file tells",
    ]


def test_the_method_of_resampling_is_passed_on():
    arrays, config = trained()
    model = vit(image_size=24)
    report = adapt_weights(model, arrays, source=config, method="bicubic_antialias")
    expected = resize_posemb(
        arrays["pos_embedding"], old_grid=(4, 4), new_grid=(6, 6), method="bicubic_antialias"
    )
    np.testing.assert_array_equal(arrays_of(model)["pos_embedding"], expected)
    assert report.resized == ["pos_embedding (1, 16, 16) -> (1, 36, 16) (bicubic_antialias)"]


def test_the_same_network_at_the_same_size_computes_the_same():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    arrays, config = trained(pool="tok", rep_size=-1)
    first, second = vit(pool="tok", rep_size=-1), vit(pool="tok", rep_size=-1, seed=1)
    for model in (first, second):
        adapt_weights(model, arrays, source=config)
    np.testing.assert_array_equal(first(images), second(images))


@pytest.mark.parametrize(
    ("source", "target", "message", "settings"),
    [
        ({}, {"width": 32}, r"width 16 \(here 32\)", {"width": 16}),
        ({}, {"mlp_dim": 32}, r"mlp_dim 24 \(here 32\)", {"mlp_dim": 24}),
        ({}, {"depth": 2}, r"depth 1 \(here 2\)", {"depth": 1}),
        ({"depth": 2}, {}, r"depth 2 \(here 1\)", {"depth": 2}),
        ({}, {"layer_scale": 0.1}, r"layer_scale None \(here 0.1\)", {"layer_scale": None}),
        ({"layer_scale": 0.1}, {}, r"layer_scale 1e-05 \(here None\)", {"layer_scale": 1e-5}),
        ({}, {"qkv_bias": False}, r"qkv_bias True \(here False\)", {"qkv_bias": True}),
        ({}, {"gelu": "erf"}, r"gelu 'tanh' \(here 'erf'\)", {"gelu": "tanh"}),
        ({}, {"norm_epsilon": 1e-3}, "norm_epsilon", {"norm_epsilon": 1e-6}),
        # No shape tells: 2 heads of 8 channels or 4 of 4.
        ({}, {"num_heads": 4}, r"num_heads 2 \(here 4\)", {"num_heads": 2}),
        ({}, {"norm_after_pool": True}, "norm_after_pool", {"norm_after_pool": False}),
        # All that differs is said at once.
        ({}, {"gelu": "erf", "depth": 2}, "depth 1 .*, gelu", {"depth": 1, "gelu": "tanh"}),
    ],
)
def test_another_network_is_refused(source, target, message, settings):
    arrays, config = trained(**source)
    model = vit(seed=1, **target)
    before = arrays_of(model)
    with pytest.raises(UnfitError, match=message) as caught:
        adapt_weights(model, arrays, source=config)
    assert caught.value.settings == {f"model.{k}": v for k, v in settings.items()}
    assert "--" not in str(caught.value)  # flags are the command's
    for name, value in arrays_of(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_another_patch_is_refused():
    arrays, config = trained()
    with pytest.raises(UnfitError, match=r"patch_size 4 .*variant with /4, or resample") as caught:
        adapt_weights(vit(variant="mu/8"), arrays, source=config)
    assert caught.value.settings == {"patch_method": "pinv"}


def test_a_source_that_does_not_tell_all():
    arrays, config = trained()
    for key in ("num_heads", "gelu"):  # fused projections, bare files of weights
        del config[key]
    report = adapt_weights(vit(), arrays, source=config)
    assert len(report.loaded) == len(arrays)
    assert report.assumed == [
        "num_heads 2, which the file does not tell",
        "gelu 'tanh', which the file does not tell",
    ]


def test_a_table_of_another_grid_than_the_source_says():
    arrays, config = trained()
    with pytest.raises(ValueError, match="does not hold 0 prefix tokens and a grid of 6x6"):
        adapt_weights(vit(), arrays, source={**config, "image_size": (24, 24)})


def test_tensors_that_nothing_accounts_for():
    arrays, config = trained()
    named = {"unused": ["txt/a"], "unknown": ["head_dist.bias"]}
    with pytest.raises(UnfitError, match=r"head_dist.bias .*another kind of network") as caught:
        adapt_weights(vit(), arrays, source=config, **named)
    assert caught.value.settings == {"init_ignore": r"head_dist\.bias"}
    report = adapt_weights(vit(), arrays, source=config, ignore=r"^head_dist\.", **named)
    assert report.unused == ["txt/a", "head_dist.bias"]


def test_a_representation_layer_of_another_width_is_new():
    arrays, config = trained(rep_size=8)
    report = adapt_weights(vit(rep_size=4), arrays, source=config)
    assert {line.split()[0] for line in report.new} == {*HEAD, *PRE_LOGITS}


# Names of a checkpoint's classes, of the data's, and which column of the head each of these gets;
# or words of why the head is new.
CLASSES = [
    ("abcde", "abcde", None),
    ("abcde", "", None),  # nobody knows: taken as it is
    ("", "abcde", None),
    ("abcde", "cabed", [2, 0, 1, 4, 3]),
    (["1", "10", "2", "3", "4"], ["1", "2", "3", "4", "10"], [0, 2, 3, 4, 1]),
    ("abcde", "abcdz", r"its 5 classes are not the 5 of the data \('z' is not in it\)"),
    ("abcde", "vwxyz", r"\('v', 'w', 'x' and 2 more are not in it\)"),
    ("abcdef", "abcde", r"its 6 classes are not the 5 of the data \('f' is not in the data\)"),
    ("aabcd", "abcda", r"\(a name stands for two of them\)"),
]


@pytest.mark.parametrize(("theirs", "ours", "expected"), CLASSES, ids=str)
def test_a_head_is_mapped_by_the_names_of_its_classes(theirs, ours, expected):
    arrays, config = trained(num_classes=len(theirs) or 5)
    model = vit(seed=1)
    before = arrays_of(model)
    report = adapt_weights(model, arrays, source=config, classes=(list(theirs), list(ours)))
    after = arrays_of(model)
    for name in HEAD:
        if isinstance(expected, str):
            np.testing.assert_array_equal(after[name], before[name])
        else:
            order = slice(None) if expected is None else expected
            np.testing.assert_array_equal(after[name], arrays[name][..., order])
    if isinstance(expected, str):
        assert len(report.new) == 2
        assert all(re.search(expected, line) for line in [*report.new, str(report)]), report.new
    elif expected:
        assert str(report).splitlines() == [
            f"loaded {len(arrays) - 2} tensors unchanged, 2 mapped",
            "mapped: head/kernel (16, 5), its classes by name in the order of the data",
            "mapped: head/bias (5,), its classes by name in the order of the data",
        ]
    else:
        assert not report.mapped and not report.new


def test_classes_that_only_one_side_names_are_assumed_aloud():
    arrays, config = trained()
    report = adapt_weights(vit(), arrays, source=config, classes=("abcde", "01234"))
    assert not report.new and "assumed: that the checkpoint's classes ('a', 'b'" in str(report)


def test_the_same_image_gets_the_same_class_after_mapping():
    """Logits by name, not by number, are what a reordering must keep."""
    names, wanted = ["ant", "bee", "cat", "dog", "elk"], ["elk", "ant", "dog", "bee", "cat"]
    arrays, config = trained()
    first, second = vit(), vit(seed=1)
    adapt_weights(first, arrays, source=config)
    adapt_weights(second, arrays, source=config, classes=(names, wanted))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    for row, other in zip(first(images).numpy(), second(images).numpy(), strict=True):
        by_name = dict(zip(names, row, strict=True))
        np.testing.assert_allclose([by_name[name] for name in wanted], other, rtol=1e-6)


def test_a_head_on_other_features_is_new_whatever_its_classes_are_called():
    arrays, config = trained(pool="tok")
    report = adapt_weights(vit(), arrays, source=config, classes=("abcde", "edcba"))
    assert not report.mapped and all("as model.pool differs" in line for line in report.new[:2])


def test_lines_for_the_report():
    arrays, config = trained()
    report = adapt_weights(
        vit(), arrays, source=config, assumed=["no rope"], notes=["left out: a decoder"]
    )
    assert str(report).splitlines()[1:] == ["assumed: no rope", "note: left out: a decoder"]


def test_classes_of_both_sides_are_compared_as_they_are():
    assert match_classes(("a", "b"), ["b", "a"]).order == [1, 0]
    match = match_classes(("a", "b"), ["0", "1"])  # no names
    assert match.order is None and not match.other
    assert match.assumed == (
        "that the checkpoint's classes ('a', 'b') are the data's 0, 1, ... in this order"
    )
    assert match_classes(("0", "1"), ["a", "b"]).assumed == (
        "that the data's classes ('a', 'b') are the checkpoint's 0, 1, ... in this order"
    )
    assert match_classes(("0", "1", "10"), ["0", "10", "1"]).order == [0, 2, 1]
    assert "'a ' and 'A' look alike" in match_classes(("A", "b"), ["a ", "b"]).other
    assert match_classes(("a", "b"), ["a", "b"]) == match_classes((), ["x"])


PREFIXES = [
    {"pool": "tok"},
    {"pool": "tok", "prefix_posemb": "none"},
    {"pool": "tok", "registers": 2},
    {"pool": "tok", "registers": 2, "prefix_posemb": "all"},
    {"pool": "tok", "registers": 2, "prefix_posemb": "none"},
]


PAIRS = [
    (a, b)
    for a, b in itertools.product(PREFIXES, PREFIXES)
    if a.get("registers") == b.get("registers")  # else it is another network
]


# Each kind once as the source and once as the target.
FEW = [(PREFIXES[0], PREFIXES[1]), (PREFIXES[1], PREFIXES[0])]
FEW += [(PREFIXES[i], PREFIXES[j]) for i, j in ((2, 3), (3, 4), (4, 2))]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param(*pair, marks=[pytest.mark.exhaustive] if pair not in FEW else [])
        for pair in PAIRS
    ],
    ids=str,
)
def test_positions_before_the_patches_move_without_a_change(source, target):
    """Whichever tokens have positions, the network computes the same."""
    arrays, config = trained(**source)
    arrays = {name: 0.3 * array for name, array in arrays.items()}  # attention to more than one
    models = [vit(**source), vit(seed=1, **target)]
    for model in models:
        adapt_weights(model, arrays, source=config)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(*(model(images) for model in models), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("patch", [8, 2])
def test_patches_of_another_size(patch):
    """Images of twice the size in patches of twice the size give the same tokens."""
    arrays, config = trained()
    model = vit(variant=f"mu/{patch}", image_size=4 * patch)
    report = adapt_weights(model, arrays, source=config, patch_method="pinv")
    shape = arrays["embedding/kernel"].shape
    kernel = f"embedding/kernel {shape} -> ({patch}, {patch}, 3, 16) (pinv)"
    assert report.resized == [kernel]
    if patch == 8:  # where patches shrink, not every image fits
        patches = np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32)
        large = tf.image.resize(patches, (8, 8)).numpy()
        before = np.einsum("bijc,ijcd->bd", patches, arrays["embedding/kernel"])
        after = np.einsum("bijc,ijcd->bd", large, arrays_of(model)["embedding/kernel"])
        np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_of_other_channels(channels):
    arrays, config = trained()
    model = vit(channels=channels)
    adapt_weights(model, arrays, source=config)
    old, new = arrays["embedding/kernel"], arrays_of(model)["embedding/kernel"]
    grey = np.random.default_rng(0).uniform(-1, 1, (4, 4, 1))
    before = np.einsum("ijc,ijcd->d", np.repeat(grey, 3, -1), old)
    after = np.einsum("ijc,ijcd->d", np.repeat(grey, channels, -1), new)
    if channels != 4:  # red twice: near, not equal
        np.testing.assert_allclose(after, before, atol=1e-4)
    assert new.shape == (4, 4, channels, 16)
