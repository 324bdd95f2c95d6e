"""Files of other systems: each .npz layout against a restatement; round trips; misfits."""

import json
import resource

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.support import flax_vit
from tests.support.networks import arrays_of, randomize
from vit_dist.config.errors import DataError
from vit_dist.model.formats.pretrained import open_pretrained
from vit_dist.model.formats.timm import to_config
from vit_dist.model.formats.writing import prefix_posemb_for, write_pretrained
from vit_dist.model.unfit import UnfitError
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit
from vit_dist.run.origins import Origin, open_origin
from vit_dist.run.served import load_model

TOK = {"cls": True, "positions": flax_vit.GRID**2 + 1}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


# layout, how the tree is made, what is known of the network then
LAYOUTS = [
    ("published", TOK, {"pool": "tok", "prefix_posemb": "cls"}),
    ("published", TOK | {"rep": True}, {"rep_size": 8}),
    ("published", {}, {"pool": "gap", "cls_token": False}),
    ("linen", TOK, {"pool": "tok"}),
    ("before_2022", TOK, {"prefix_posemb": "cls"}),
    ("big_vision", {"cls": True}, {"pool": "tok", "prefix_posemb": "none"}),
    ("big_vision", {"rep": True, "positions": 0}, {"posemb": "sincos2d"}),
    ("big_vision", {"map_head": True}, {"pool": "map"}),
    ("inlined_map", {"map_head": True, "head": False}, {"pool": "map", "num_classes": 0}),
    ("optimizer", TOK, {"pool": "tok"}),
    ("two_towers", {"map_head": True, "head": False}, {"pool": "map"}),
    ("scanned", {"map_head": True}, {"depth": 2}),
]


@pytest.mark.parametrize(
    ("layout", "options", "known", "save"),
    [
        *((*layout, np.savez) for layout in LAYOUTS),
        (*LAYOUTS[0], np.savez_compressed),
        # What is compressed does not depend on the layout.
        *(
            pytest.param(*layout, np.savez_compressed, marks=pytest.mark.exhaustive)
            for layout in LAYOUTS[1:]
        ),
    ],
)
def test_npz_layouts(tmp_path, layout, options, known, save):
    tree = flax_vit.make_tree(**options)
    written = getattr(flax_vit, layout)(tree)
    save(tmp_path / "weights.npz", **written)
    origin = open_origin(str(tmp_path / "weights.npz"))
    expected = {
        "gelu": "tanh", "norm_epsilon": 1e-6, "num_heads": 3, "width": 12, "mlp_dim": 20,
        "depth": 2, "patch_size": 4, "layer_scale": None, **known,
    }  # fmt: skip
    assert {key: origin.network[key] for key in expected} == expected
    assert not origin.unknown and (origin.mean, origin.std) == ((0.5,), (0.5,))
    assert len(origin.unused) + len(origin.tensors) >= len(written)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    mine = load_model(origin, image_size=12)(images).numpy()
    in_table = bool(options.get("positions") == flax_vit.GRID**2 + 1)
    theirs = flax_vit.forward(tree, images, cls_in_table=in_table)
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_npz_with_positions_of_an_old_and_of_a_new_file(tmp_path):
    written = flax_vit.big_vision(flax_vit.make_tree())
    old = "Transformer/posembed_input/pos_embedding"
    written |= {f"params/{old}": np.zeros_like(written["params/pos_embedding"])}
    np.savez(tmp_path / "weights.npz", **written)
    with pytest.raises(DataError, match=f"two tensors for pos_embedding, one of them params/{old}"):
        open_pretrained(tmp_path / "weights.npz")


def test_npz_of_bfloat16(tmp_path):
    tree = flax_vit.make_tree()
    np.savez(tmp_path / "weights.npz", **flax_vit.bfloat16(tree))
    tensors = open_pretrained(tmp_path / "weights.npz").tensors
    expected = tree["head/kernel"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(tensors["head/kernel"]), expected)
    assert np.asarray(tensors["head/kernel"]).dtype == np.float32


@pytest.mark.parametrize("shape", [(), (0, 4)], ids=str)
def test_what_is_no_layer_among_stacked_blocks_is_reported(tmp_path, shape):
    extra = {"params/Transformer/encoderblock/scale": np.ones(shape, "f")}
    np.savez(tmp_path / "weights.npz", **flax_vit.scanned(flax_vit.make_tree()), **extra)
    found = open_pretrained(tmp_path / "weights.npz")
    assert found.unknown == ["Transformer/encoderblock/scale"]


def test_positions_of_a_grid_that_is_not_square(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **flax_vit.big_vision(flax_vit.make_tree(positions=10)))
    with pytest.raises(UnfitError, match=r"10 positions .* must be told") as caught:
        open_pretrained(path)
    assert caught.value.settings == {"init_image_size": "..."}
    with pytest.raises(DataError, match=r"positions .*\. Set --config\.init_image_size=\.\.\."):
        open_origin(str(path))
    network = open_pretrained(path, image_size=(8, 20)).network
    assert network["image_size"] == (8, 20)
    with pytest.raises(ValueError, match=r"not those of images of \(8, 8\)"):
        open_pretrained(path, image_size=(8, 8))


def origin_of(model):
    return Origin(path="memory", tensors=arrays_of(model), network=model.get_config())


# What ours is -> the formats that can hold it.
NETWORKS = [
    ({"pool": "tok"}, ("npz", "timm", "huggingface")),
    ({"pool": "tok", "prefix_posemb": "none"}, ("big_vision", "timm")),
    ({"pool": "tok", "num_classes": 0, "rep_size": 16}, ("npz", "huggingface")),
    ({"rep_size": 8}, ("npz", "big_vision")),
    ({"image_size": (16, 8), "pool": "tok"}, ("npz", "timm", "huggingface")),
    ({"pool": "map"}, ("big_vision", "timm")),
    ({"posemb": "sincos2d"}, ("big_vision",)),
    (
        {"norm_after_pool": True, "cls_token": True, "registers": 2, "prefix_posemb": "all"},
        ("timm",),
    ),
    ({"pool": "tok", "registers": 2, "prefix_posemb": "all", "gelu": "erf"}, ("timm",)),
    ({"pool": "tok", "registers": 1, "prefix_posemb": "all"}, ("timm", "huggingface")),
    ({"pool": "tok_gap", "layer_scale": 0.1, "registers": 2}, ("huggingface",)),
    ({"pool": "tok", "norm_epsilon": 1e-12, "qkv_bias": False}, ("huggingface", "timm")),
    ({"channels": 1}, ("npz",)),
]


@pytest.mark.parametrize(("options", "systems"), NETWORKS, ids=str)
def test_round_trips_have_the_same_bits(tmp_path, options, systems):
    options = {"image_size": 16, "num_classes": 5, "depth": 2, **options}
    model = randomize(build_vit(vit_config("mu/4", width=16, mlp_dim=32, **options)))
    network, arrays = model.get_config(), arrays_of(model)
    told = {"image_size": network["image_size"]}
    scaling = {key: values[: network["channels"]] for key, values in HALF.items()}
    for system in systems:
        assert prefix_posemb_for(system, network) == network["prefix_posemb"] or system == "npz"
        path = tmp_path / f"{system}.npz" if system in ("npz", "big_vision") else tmp_path / system
        files = write_pretrained(path, system, arrays, network, **scaling)
        assert all(file.exists() for file in files)
        found = open_pretrained(path, **({} if path.suffix == "" else told))
        assert not found.unknown and not found.unused
        assert set(found.tensors) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(found.tensors[name]), array, err_msg=name)
        compared = set(found.network) - {"layer_scale"}  # its initial value is no one's business
        compared -= {"prefix_posemb"} if not network["cls_token"] else set()
        assert {k: found.network[k] for k in compared} == {k: network[k] for k in compared}
        assert {"gelu", "norm_epsilon", "num_heads", "pool", "image_size"} <= compared
        np.testing.assert_allclose(np.asarray(found.mean), 0.5)


@pytest.mark.parametrize(
    "name, system", [("a.npz", "npz"), ("a.safetensors", "timm"), ("a", "timm")]
)
def test_a_file_that_cannot_be_written_to_its_end_replaces_none(tmp_path, name, system):
    network = vit_config("mu/4", image_size=8, num_classes=3, pool="tok")
    model, path = build_vit(network), tmp_path / name
    arrays = arrays_of(model)
    written = write_pretrained(path, system, arrays, model.get_config(), **HALF)
    before = {file: file.read_bytes() for file in written}
    # As of a full disk; Python ignores the signal that would tell of it.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_pretrained(path, system, arrays, model.get_config(), **HALF)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {file: file.read_bytes() for file in before} == before
    assert {f for f in tmp_path.rglob("*") if f.is_file()} == set(before)


def test_positions_move_into_what_a_format_has(tmp_path):
    """A cls token with a position, written for big_vision, which has none: the same logits."""
    model = randomize(build_vit(vit_config("mu/4", image_size=8, num_classes=3, pool="tok")))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    ready = load_model(origin_of(model), system="big_vision")
    write_pretrained(tmp_path / "a.npz", "big_vision", arrays_of(ready), ready.get_config(), **HALF)
    again = load_model(open_origin(str(tmp_path / "a.npz")))
    np.testing.assert_allclose(again(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("system", "options", "message"),
    [
        ("npz", {"gelu": "erf", "layer_scale": 0.1}, "GELU is tanh's.*neither LayerScale"),
        ("npz", {"norm_epsilon": 1e-3}, "epsilon is 1e-6"),
        ("npz", {"pool": "map"}, "only big_vision has attention pooling"),
        ("npz", {"pool": "gap", "cls_token": True}, "goes with pool 'tok'"),
        ("npz", {"qkv_bias": False}, "queries have biases"),
        ("timm", {"rep_size": 8}, "no representation layer"),
        ("timm", {"pool": "tok_gap"}, "no pooling of cls token and mean"),
        ("timm", {"norm_epsilon": 1e-3}, "epsilon is 1e-6"),
        ("huggingface", {"pool": "gap"}, "they need a cls token"),
        ("huggingface", {"pool": "tok", "rep_size": 8}, "classify the cls token as it is"),
        ("huggingface", {"pool": "tok", "registers": 2}, "registers without LayerScale"),
        ("huggingface", {"pool": "tok", "layer_scale": 0.1}, "reads pool 'tok_gap'"),
        # A table that is not of a square would be resampled as if it were, or could not be.
        (
            "huggingface",
            {"pool": "tok_gap", "layer_scale": 0.1, "image_size": (16, 64)},
            "DINOv2 takes square images",
        ),
    ],
)
def test_networks_that_a_format_cannot_hold(tmp_path, system, options, message):
    model = build_vit(vit_config("mu/4", **{"image_size": 8, "num_classes": 3, **options}))
    path = tmp_path / "file.npz"
    with pytest.raises(ValueError, match=message):
        write_pretrained(path, system, arrays_of(model), model.get_config(), **HALF)
    assert not path.exists()


def test_timm_makes_the_mlp_as_wide_as_it_is():
    """timm computes int(width * mlp_ratio), one too few where the quotient is rounded down."""
    widths = [(1664, 7680)]
    widths += [(w, 2 * w + n) for w in range(8, 2049, 8) for n in range(0, 2 * w, w // 4 + 1)]
    wrong = 0
    for width, mlp_dim in widths:
        network = vit_config("mu/4", image_size=(8, 8), num_classes=3, width=width, mlp_dim=mlp_dim)
        ratio = to_config(network, mean=[0.5], std=[0.5], labels=())["model_args"]["mlp_ratio"]
        assert int(width * ratio) == mlp_dim, (width, mlp_dim)
        wrong += int(width * (mlp_dim / width)) != mlp_dim
    assert wrong > 10  # of the plain quotient


def read_all(path):
    return {name: np.asarray(t) for name, t in open_pretrained(path).tensors.items()}


def test_tensors_of_other_networks_are_named(tmp_path):
    model = build_vit(vit_config("mu/4", image_size=8, num_classes=3, pool="tok", gelu="erf"))
    path = tmp_path / "a.safetensors"
    write_pretrained(path, "timm", arrays_of(model), model.get_config(), **HALF)
    state = safetensors.numpy.load_file(path)
    state["blocks.0.attn.q_norm.weight"] = np.ones(16, "f")
    safetensors.numpy.save_file(state, path)
    origin = open_origin(str(path))
    assert origin.unknown == ["blocks.0.attn.q_norm.weight"]
    with pytest.raises(ValueError, match=r"q_norm.weight \(normalised queries"):
        load_model(origin, num_heads=2, gelu="erf")


def test_sharded_folders(tmp_path):
    model = randomize(build_vit(vit_config("mu/4", image_size=8, num_classes=3, pool="tok")))
    write_pretrained(tmp_path, "huggingface", arrays_of(model), model.get_config(), **HALF)
    state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, places = sorted(state), {}
    for k, part in enumerate((names[:5], names[5:])):
        file = f"model-0000{k + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({n: state[n] for n in part}, tmp_path / file)
        places |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    tensors = read_all(tmp_path)
    for name, array in arrays_of(model).items():
        np.testing.assert_array_equal(tensors[name], array)
    index.write_text(json.dumps({"weight_map": {"a": [1], "b": 2}}))
    with pytest.raises(ValueError, match=r"there is no .*2"):
        open_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="names no files beside it"):
        open_pretrained(tmp_path)


def test_weights_of_another_network_are_named_with_their_file(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **flax_vit.published(flax_vit.make_tree(**TOK)))
    model = build_vit(vit_config("mu/4", image_size=12, num_classes=5, pool="tok"))
    with pytest.raises(ValueError, match=r"weights.npz: .*width 12 \(here 32\).*model.width=12"):
        open_origin(str(path)).fill(model)
