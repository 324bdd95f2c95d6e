"""Weights of one ViT in another: what is taken, resampled, left; and what is refused."""

import numpy as np
import pytest

from vit_dist.model.posemb import resize_posemb
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.model.weights import adapt_weights


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
    ("source", "target", "resized", "replaced", "skipped"),
    [
        ({}, {}, [], [], []),
        ({"pool": "tok"}, {"pool": "tok"}, [], [], []),
        ({}, {"image_size": (24, 8)}, POSITIONS, [], []),
        ({"pool": "tok"}, {"pool": "tok", "image_size": 32}, POSITIONS, [], []),
        ({}, {"image_size": (32, 8)}, POSITIONS, [], []),  # as many patches, another grid
        ({}, {"num_classes": 3}, [], HEAD, []),
        ({}, {"num_classes": 0}, [], [], HEAD),
        ({"num_classes": 0}, {}, [], HEAD, []),
        ({"pool": "tok"}, {}, POSITIONS, [], ["cls"]),
        ({}, {"pool": "tok"}, POSITIONS, ["cls"], []),
        ({"pool": "map"}, {}, [], [], MAP_NAMES),
        ({}, {"pool": "map"}, [], MAP_NAMES, []),
        ({"posemb": "sincos2d"}, {"posemb": "sincos2d", "image_size": 24}, [], [], []),
        ({}, {"posemb": "sincos2d"}, [], [], POSITIONS),
        ({"posemb": "sincos2d"}, {}, [], POSITIONS, []),
        # A head on the representation layer is of no use without it, though the shape fits.
        ({"rep_size": -1}, {}, [], HEAD, PRE_LOGITS),
        ({}, {"rep_size": -1}, [], [*HEAD, *PRE_LOGITS], []),
        ({"rep_size": -1}, {"rep_size": -1}, [], [], []),
        ({"layer_scale": 0.1, "depth": 2}, {"layer_scale": 0.1, "depth": 2}, [], [], []),
    ],
)
def test_what_becomes_of_each_tensor(source, target, resized, replaced, skipped):
    arrays, config = trained(**source)
    model = vit(seed=1, **target)
    before = arrays_of(model)
    report = adapt_weights(model, arrays, source=config)
    after = arrays_of(model)

    def first_words(lines):
        return sorted(line.split()[0] for line in lines)

    assert first_words(report.resized) == sorted(resized)
    assert first_words(report.replaced) == sorted(replaced)
    assert first_words(report.skipped) == sorted(skipped)
    assert sorted(report.loaded) == sorted(set(after) - set(resized) - set(replaced))
    assert set(arrays) <= set(report.loaded) | set(resized) | set(replaced) | set(skipped)
    for name in report.loaded:
        np.testing.assert_array_equal(after[name], arrays[name])
    for name in replaced:
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
        "loaded 20 tensors unchanged",
        "resized: pos_embedding (1, 17, 16) -> (1, 36, 16) (align_corners)",
        "replaced: head/kernel (16, 3), the checkpoint's is (16, 5)",
        "replaced: head/bias (3,), the checkpoint's is (5,)",
        "skipped: cls (1, 1, 16)",
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
    ("source", "target", "message"),
    [
        ({}, {"width": 32}, r"is \(1, 16, 16\) in the checkpoint and \(1, 16, 32\).*model.variant"),
        ({}, {"mlp_dim": 32}, "mlp/dense_0/kernel is .*mlp_dim"),
        ({}, {"depth": 2}, "has no encoderblock_1/norm_0/gamma"),
        ({"depth": 2}, {}, "has encoderblock_1/.* no place for.*model.depth"),
        ({}, {"layer_scale": 0.1}, "has no encoderblock_0/layer_scale_0/gamma"),
        ({"layer_scale": 0.1}, {}, "has encoderblock_0/layer_scale_0/gamma, .*model.layer_scale"),
        ({}, {"qkv_bias": False}, "has encoderblock_0/attention/key/bias"),
        ({}, {"gelu": "erf"}, "trained with gelu 'tanh', this config has 'erf': set model.gelu"),
        ({}, {"variant": "mu/8"}, "patch_size 4, this config has 8: set the patch"),
        # No shape tells: 2 heads of 8 channels or 4 of 4.
        ({}, {"num_heads": 4}, "num_heads 2, this config has 4: set model.num_heads"),
        ({"rep_size": 8}, {"rep_size": 4}, r"pre_logits/kernel is \(16, 8\) .*rep_size"),
    ],
)
def test_another_network_is_refused(source, target, message):
    arrays, config = trained(**source)
    model = vit(seed=1, **target)
    before = arrays_of(model)
    with pytest.raises(ValueError, match=message):
        adapt_weights(model, arrays, source=config)
    for name, value in arrays_of(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_source_that_does_not_know_its_heads():
    arrays, config = trained()
    del config["num_heads"]  # fused projections of other libraries do not say
    assert len(adapt_weights(vit(), arrays, source=config).loaded) == len(arrays)


def test_a_table_of_another_grid_than_the_source_says():
    arrays, config = trained()
    with pytest.raises(ValueError, match="does not hold 0 prefix tokens and a grid of 6x6"):
        adapt_weights(vit(), arrays, source={**config, "image_size": (24, 24)})
