"""What training scripts of PyTorch save: read for the weights, and nothing in it is run."""

import argparse
import collections
import functools
import json
import os
import pickle
import re
import sys
import types
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy

from tests.support.networks import arrays_of, randomize
from tests.support.torch_files import as_zip, torch_file
from vit_dist.config.errors import DataError
from vit_dist.model.formats.containers import open_tensors
from vit_dist.model.formats.pretrained import open_pretrained
from vit_dist.model.formats.writing import write_pretrained
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit
from vit_dist.run.origins import open_origin
from vit_dist.run.served import load_model

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def make(tmp_path, system="timm", **options):
    """A model of ours, and its tensors as another system names them, without a config.json."""
    options = {"image_size": 8, "num_classes": 3, "pool": "tok", "gelu": "erf", **options}
    model = randomize(build_vit(vit_config("mu/4", **options)))
    folder = tmp_path / "made"
    write_pretrained(folder, system, arrays_of(model), model.get_config(), **HALF)
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    return model, state, json.loads((folder / "config.json").read_text())


def written(tmp_path, content, name="checkpoint.pth.tar"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else torch_file(content))
    return path


def assert_taken(path, model, **changed):
    """The file at `path` holds the model's arrays, but for those that `changed` says (None: no)."""
    found = open_pretrained(path)
    expected = {name: a for name, a in arrays_of(model).items() if changed.get(name, a) is not None}
    assert set(found.tensors) == set(expected) and not found.unknown
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found.tensors[name]), array, err_msg=name)
    return found


def test_timm_with_options_scalars_and_an_optimizer(tmp_path):
    """As timm's CheckpointSaver writes it."""
    model, state, _ = make(tmp_path)
    optimizer = {"state": {0: {"step": 3, "exp_avg": np.ones((2, 2), "f")}}, "param_groups": [{}]}
    content = {
        "epoch": 1,
        "arch": "vit_tiny_patch16_224",
        "state_dict": {name: 2 * array for name, array in state.items()},
        "optimizer": optimizer,
        "version": 2,
        "args": argparse.Namespace(lr=1.0, model="vit_tiny_patch16_224", betas=None),
        "state_dict_ema": collections.OrderedDict(state),
        "metric": np.float64(71.5),
        "seen": {np.int64(3), "a"},
        "amp_scaler": {"scale": 65536.0},
        "when": types.SimpleNamespace(day=1),
    }
    found = assert_taken(written(tmp_path, content), model)
    assert found.notes == ["the file's 'state_dict_ema' is taken, not its state_dict"]
    assert found.network["gelu"] == "erf" and not found.assumed  # timm's name tells
    assert "num_heads" not in found.network  # its width is not that of timm's Ti


def test_heads_of_the_architecture_that_a_training_file_names(tmp_path):
    _, state, _ = make(tmp_path, width=192, num_heads=3, mlp_dim=64)
    path = written(tmp_path, {"arch": "vit_tiny_patch16_224", "state_dict": state})
    assert open_pretrained(path).network["num_heads"] == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_small_patch16_rope_ape_224", "it has rotary positions"),
        ("rope_mixed_deit_small_patch16_LS", "it has rotary positions"),
        ("vit_base_patch16_rpn_224", r"behind attention and MLP \(post-norm\)"),
        ("my_own_vit", "parts that nothing is known of here"),
    ],
)
def test_the_architecture_of_a_training_file_is_asked(tmp_path, name, message):
    _, state, _ = make(tmp_path)
    for content in (
        {"arch": name, "state_dict": state},
        {"model": state, "args": argparse.Namespace(model=name)},
        {"state_dict": state, "hyper_parameters": {"model_name": name}},
    ):
        with pytest.raises(DataError, match=f"training script names .*{name}.*: .*{message}"):
            open_pretrained(written(tmp_path, content))


def test_model_kwargs_of_timm_are_asked(tmp_path):
    _, state, _ = make(tmp_path)
    options = argparse.Namespace(model="vit_tiny_patch16_224", model_kwargs={"qk_norm": True})
    path = written(tmp_path, {"state_dict": state, "args": options})
    with pytest.raises(DataError, match="qk_norm=True: normalised queries and keys"):
        open_pretrained(path)


def test_deit3_and_what_has_the_same_names(tmp_path):
    """LayerScale called gamma_1: wrapped by DeiT III, bare in networks with rotary positions."""
    model, state, _ = make(tmp_path, layer_scale=0.1, prefix_posemb="none", depth=2)
    state = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): a for name, a in state.items()}
    assert_taken(written(tmp_path, {"model": state}, "deit3.pth"), model)
    bare = written(tmp_path, state, "bare.pth")
    tensors = tmp_path / "bare.safetensors"
    safetensors.numpy.save_file(state, tensors)
    for path in (bare, tensors):
        with pytest.raises(DataError, match=r"rotary positions.*do not tell apart"):
            open_pretrained(path)
    (tmp_path / "config.json").write_text('{"architecture": "deit3_small_patch16_224"}')
    assert_taken(bare, model)
    assert_taken(tensors, model)


def chunked(state):
    """Blocks in chunks of two, as DINOv2 keeps them for FSDP: blocks.CHUNK.BLOCK."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", name): array
        for name, array in state.items()
    }


def without_head(state):
    return {name: array for name, array in state.items() if not name.startswith("head.")}


def prefixed(state, prefix):
    return {f"{prefix}{name}": array for name, array in state.items()}


DINO_HEAD = {
    "dino_head.mlp.0.weight": np.ones((4, 4), "f"),
    "dino_head.last_layer.weight_v": np.ones((4, 4), "f"),
}
HEADS_LEFT = "left out: the heads of self-distillation (DINO, iBOT)"


def dinov2_teacher(state):
    backbone = prefixed(chunked(without_head(state)), "backbone.")
    return {"teacher": {**backbone, **DINO_HEAD}}, [HEADS_LEFT]


def dinov2_fsdp(state):
    backbone = chunked(without_head(state))
    model = {
        **prefixed({n: 2 * a for n, a in backbone.items()}, "student.backbone."),
        **prefixed(backbone, "teacher.backbone."),
        **prefixed(DINO_HEAD, "teacher."),
        "student.ibot_head.mlp.0.bias": np.ones(4, "f"),
    }
    return {"model": model, "iteration": 5}, [
        "left out: the student of self-distillation",
        HEADS_LEFT,
    ]


def dino(state):
    backbone = without_head(state)
    student = prefixed({n: 2 * a for n, a in backbone.items()}, "module.backbone.")
    content = {
        "student": student,
        "teacher": {**prefixed(backbone, "backbone."), **prefixed(DINO_HEAD, "")},
        "optimizer": {"state": {}},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small", patch_size=4),
        "dino_loss": {"center": np.zeros((1, 4), "f")},
    }
    return content, ["the file's 'teacher' is taken, not its student", HEADS_LEFT]


def dino_as_published(state):
    """DINO's own wrapper calls its head "head", as a classifier is called elsewhere."""
    head = {"head.mlp.0.weight": np.ones((4, 4), "f"), "head.last_layer.weight_v": np.ones(4, "f")}
    return {"teacher": {**prefixed(without_head(state), "backbone."), **head}}, [HEADS_LEFT]


def averaged(state):
    """torch's AveragedModel counts its steps."""
    return {
        "state_dict": {"n_averaged": np.ones((), "f"), **prefixed(without_head(state), "m.")}
    }, ["left out: how many steps were averaged"]


def mae(state):
    decoder = {
        "mask_token": np.ones((1, 1, 8), "f"),
        "decoder_embed.weight": np.ones((8, 32), "f"),
        "decoder_pos_embed": np.ones((1, 5, 8), "f"),
        "decoder_blocks.0.attn.qkv.weight": np.ones((24, 8), "f"),
        "decoder_norm.weight": np.ones(8, "f"),
        "decoder_pred.bias": np.ones(48, "f"),
    }
    return {"model": {**without_head(state), **decoder}}, [
        "left out: the token of masked pretraining",
        "left out: the decoder of masked pretraining (MAE)",
    ]


@pytest.mark.parametrize(
    "wrap", [dinov2_teacher, dinov2_fsdp, dino, dino_as_published, averaged, mae]
)
def test_the_encoder_of_self_supervised_training(tmp_path, wrap):
    model, state, _ = make(tmp_path, depth=4)
    content, notes = wrap(state)
    path = written(tmp_path, content)
    found = assert_taken(path, model, **{"head/kernel": None, "head/bias": None})
    assert list(found.notes) == notes and found.network["num_classes"] == 0
    report = str(open_origin(str(path)).fill(model))
    assert all(f"note: {line}" in report for line in notes)
    assert "2 new (head)" in report


def test_a_head_of_several_layers_is_not_dropped_in_silence(tmp_path):
    """MAE's linear probes have a BatchNorm before the classifier."""
    _, state, _ = make(tmp_path)
    probe = {"head.0.running_mean": np.ones(32, "f"), "head.1.weight": np.ones((3, 32), "f")}
    origin = open_origin(str(written(tmp_path, {"model": {**without_head(state), **probe}})))
    assert set(origin.unknown) == set(probe)
    with pytest.raises(DataError, match="a head of several layers, such as a BatchNorm"):
        load_model(origin, num_heads=2)


def test_both_heads_of_a_distilled_deit_are_left_out(tmp_path):
    """timm's answer is the mean of two heads: one of them alone would be another network."""
    model, state, _ = make(tmp_path, registers=1, prefix_posemb="all")
    state["dist_token"] = state.pop("reg_token")
    state |= {"head_dist.weight": state["head.weight"], "head_dist.bias": state["head.bias"]}
    path = written(tmp_path, {"model": state})
    found = assert_taken(path, model, **{"head/kernel": None, "head/bias": None})
    assert found.notes == [
        "left out: both heads of a distilled DeiT, whose mean would be its answer"
    ]
    assert {n for n in found.unused if n.startswith("head")} == {
        f"{head}.{part}" for head in ("head", "head_dist") for part in ("weight", "bias")
    }
    expected = model.features(np.ones((1, 8, 8, 3), "f"))
    ready = load_model(open_origin(str(path)), num_heads=2)
    np.testing.assert_array_equal(ready(np.ones((1, 8, 8, 3), "f")), expected)


def test_shards_of_pytorch(tmp_path):
    model, state, config = make(tmp_path, "huggingface")
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names, places = sorted(state), {}
    for k, part in enumerate((names[:5], names[5:])):
        file = f"pytorch_model-0000{k + 1}-of-00002.bin"
        (folder / file).write_bytes(torch_file({name: state[name] for name in part}))
        places |= dict.fromkeys(part, file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_taken(folder, model)
    index.write_text(json.dumps({"weight_map": {**places, "lost": file}}))
    with pytest.raises(DataError, match=f"{file} lacks lost, which .*index.json says it holds"):
        open_pretrained(folder)
    (folder / file).unlink()
    with pytest.raises(DataError, match=f"there is no file .*{file}"):
        open_pretrained(folder)


# Pickles that would run something


class Called:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return self.function, self.arguments, self.state


def in_a_module(name):
    """A class that is pickled as one of a module that is not there when it is read."""
    kind = type("Unknown", (dict,), {"__module__": name, "__qualname__": "Unknown"})
    module = types.ModuleType(name)
    module.Unknown = kind
    return module, kind


def attacks(marker):
    command = f"touch {marker}"
    yield "system", Called(os.system, command)
    yield "eval", Called(eval, f"open({str(marker)!r}, 'w')")
    yield "import", Called(__import__, "antigravity_of_attacker")
    yield "deep", {"model": {"x": [Called(exec, f"open({str(marker)!r}, 'w')")]}}
    yield "nested", Called(functools.partial, os.system, Called(os.system, command))
    yield "state", Called(argparse.Namespace, state={"a": Called(os.system, command)})
    yield "key", {Called(os.system, command): 1}


@pytest.mark.parametrize("index", range(7))
def test_nothing_in_a_pickle_is_called(tmp_path, index):
    model, state, _ = make(tmp_path)
    name, attack = list(attacks(tmp_path / "marker"))[index]
    before = set(sys.modules)
    path = written(tmp_path, {"state_dict": state, "args": attack}, f"{name}.pth")
    assert_taken(path, model)
    assert not (tmp_path / "marker").exists()
    assert not {m for m in set(sys.modules) - before if "antigravity" in m}


def test_unknown_classes_stay_inert(tmp_path):
    """NEWOBJ, BUILD, SETITEMS and REDUCE on classes of a module that is not installed."""
    model, state, _ = make(tmp_path)
    module, kind = in_a_module("not_installed_here")
    one = kind(a=1, b=[2])
    one.attribute = 3
    with mock.patch.dict(sys.modules, {"not_installed_here": module}):
        data = torch_file({"state_dict": state, "args": one, "kind": kind, "many": [one, (one,)]})
    assert_taken(written(tmp_path, data), model)
    assert "not_installed_here" not in sys.modules


RAW = {  # opcodes that Python's own pickler does not write
    "inst": b"(S'touch {marker}'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch {marker}'\no.",
    "global and reduce": b"cos\nsystem\n(S'touch {marker}'\ntR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c{length}touch {marker}\x85R.",
    "state of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__K\x01sb.",
    "state of a class": b"\x80\x02ccollections\nOrderedDict\n}U\x04evilK\x01sb.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_pickles_assembled_by_hand(tmp_path, raw):
    marker = tmp_path / "m"
    text = raw.replace(b"{length}", bytes([len(f"touch {marker}")]))
    path = written(tmp_path, as_zip(text.replace(b"{marker}", str(marker).encode())))
    with pytest.raises(DataError, match=r"holds a whole model|is damaged, or holds no tensors"):
        open_tensors(path)
    assert not marker.exists() and not hasattr(collections.OrderedDict, "evil")


def test_a_dictionary_that_contains_itself(tmp_path):
    loop = {"epoch": 1}
    loop["model"] = loop["state_dict"] = loop
    path = written(tmp_path, as_zip(pickle.dumps(loop, protocol=2)))
    with pytest.raises(DataError, match="holds no tensors by name: save the model's state_dict"):
        open_tensors(path)


def test_a_whole_model_is_asked_for_its_state(tmp_path):
    module, kind = in_a_module("not_installed_here")
    with mock.patch.dict(sys.modules, {"not_installed_here": module}):
        path = written(tmp_path, torch_file(kind()))
    with pytest.raises(DataError, match="holds a whole model: save the model's state_dict"):
        open_tensors(path)
