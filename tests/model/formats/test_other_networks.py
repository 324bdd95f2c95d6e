"""Networks whose tensors look like our ViT's: refused for what they are, with config.json or not.

test_interop_zoo.py does the same with the networks that timm and transformers make.
"""

import logging
import re
import sys

import numpy as np
import pytest
from absl import logging as absl_logging

from tests.support import flax_vit
from tests.support.folders import make, save
from vit_dist.config.errors import DataError
from vit_dist.model.formats.architectures import explain_architecture, known_of
from vit_dist.model.formats.pretrained import open_pretrained
from vit_dist.run.origins import open_origin
from vit_dist.run.served import load_model

# What timm's config.json says -> the real reason.
TIMM = [
    ({"architecture": "vit_small_patch16_rope_224"}, "rotary positions"),
    ({"architecture": "vit_base_patch16_rope_mixed_ape_224.naver_in1k"}, "rotary positions"),
    ({"architecture": "hf-hub:timm/vit_small_patch16_dinov3.lvd1689m"}, "rotary positions"),
    ({"architecture": "eva02_tiny_patch14_224"}, "rotary positions"),
    ({"architecture": "vit_pe_core_tiny_patch16_384"}, "rotary positions"),
    ({"architecture": "vit_base_patch16_rpn_224"}, r"\(post-norm\)"),
    ({"architecture": "vit_base_patch32_clip_quickgelu_224"}, "LayerNorm before the blocks.*CLIP"),
    ({"architecture": "vit_small_patch16_18x2_224"}, "side by side"),
    ({"architecture": "vit_small_r26_s32_224"}, "convolutional network before the patches"),
    ({"architecture": "vit_base_resnet50d_224"}, "convolutional network before the patches"),
    ({"architecture": "beit_base_patch16_224"}, "relative positions"),
    ({"architecture": "vit_relpos_small_patch16_224"}, "relative positions"),
    ({"architecture": "beit3_base_patch16_224"}, "LayerNorms inside"),
    ({"architecture": "vit_giant_patch14_dinov2"}, "SwiGLU"),
    ({"architecture": "aimv2_large_patch14_224"}, "RMSNorm"),
    ({"architecture": "vit_intern300m_patch14_448"}, "no LayerNorm behind the blocks"),
    ({"architecture": "vit_base_patch16_newest_224"}, r"nothing is known of here \('newest'\)"),
    ({"architecture": "vit_base_patch16_clip_224.openai"}, r"\(CLIP\)"),
    ({"architecture": "vit_base_patch16_xp_224"}, "side by side"),
    ({"architecture": "vit_base_mci_224"}, "convolutional network before the patches"),
    ({"architecture": "eva_giant_patch14_224"}, "biases of queries and values, none of keys"),
    ({"architecture": "beitv2_base_patch16_224"}, "relative positions"),
    ({"architecture": "samvit_base_patch16"}, "relative positions"),
    ({"architecture": "vit_7b_patch16_dinov3"}, "rotary positions"),
    ({"architecture": "naflexvit_base_patch16_gap"}, "nothing is known of here"),
    ({"architecture": "deit_base_patch16_18x2_LS"}, "side by side"),
    ({"architecture": "vitamin_small_224"}, "nothing is known of here"),
    ({"architecture": "cait_s24_224"}, "class attention"),
    ({"architecture": "mixer_b16_224"}, "no attention"),
    ({"architecture": "xcit_tiny_12_p8_224"}, "attention over channels"),
    ({"architecture": "resnet50"}, "no attention"),
    ({"model_args": {"pre_norm": True}}, r"pre_norm=True: a LayerNorm before the blocks \(CLIP\)"),
    ({"model_args": {"final_norm": False}}, "no LayerNorm behind the blocks"),
    ({"model_args": {"qk_norm": True}}, "normalised queries and keys"),
    ({"model_args": {"act_layer": "quick_gelu"}}, "activation 'quick_gelu', not GELU"),
    ({"model_args": {"norm_layer": "rmsnorm"}}, "another norm than LayerNorm"),
    ({"model_args": {"scale_attn_norm": True}}, "a LayerNorm inside of the attention"),
    ({"model_args": {"scale_mlp_norm": True}}, "a LayerNorm inside of the MLP"),
    ({"model_args": {"pool_include_prefix": True}}, "a pooling of all tokens"),
    ({"model_args": {"pos_embed": "none"}}, "no learned positions"),
    ({"model_args": {"block_fn": "ResPostBlock"}}, "it is not known what it changes"),
    ({"model_args": {"qk_scale": 0.5}}, "it is not known what it changes"),
    ({"model_args": {"embed_dim": 64}}, "width 64, while its tensors have 32"),
    ({"model_args": {"class_token": False}}, "cls_token False, while its tensors have True"),
    ({"model_args": {"reg_tokens": 4}}, "registers 4, while its tensors have 0"),
    ({"model_args": {"fc_norm": True}}, "norm_after_pool True, while its tensors have False"),
    ({"model_args": {"patch_size": 8}}, "patch_size 8, while its tensors have 4"),
    ({"model_args": {"init_values": 1e-4}}, "layer_scale 1e-05, while its tensors have None"),
    ({"qk_norm": True}, "normalised queries and keys"),
    ({"global_pool": "avgmax"}, "it pools by 'avgmax'"),
    ({"global_pool": "avg"}, "says global_pool 'avg' and 'token'"),
    ({"pretrained_cfg": {"global_pool": "avg"}}, "says global_pool 'avg' and 'token'"),
    ({"act_layer": "quick_gelu"}, "act_layer='quick_gelu' beside model_args"),
    ({"num_heads": 4}, "num_heads=4 beside model_args, where timm does not read it"),
    (
        {"model_args": {"dynamic_img_pad": True, "img_size": [10, 9]}},
        r"images of \(10, 9\) are padded to whole patches of 4 pixels",
    ),
    ({"model_type": "vit", "architecture": None}, "is of Hugging Face, while its tensors"),
]


@pytest.mark.parametrize(("said", "message"), TIMM, ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("note", [False, True], ids=["theirs", "ours"])
def test_what_config_json_of_timm_says(tmp_path, said, message, note):
    """Also beside a file of ours, which carries a note of our own on its network."""
    _, config = make(tmp_path, note=note)
    arguments = {**config["model_args"], **said.get("model_args", {})}
    config |= {**said, "model_args": arguments}
    if "architecture" in said and said["architecture"] is None:
        del config["architecture"]
    save(tmp_path, config)
    with pytest.raises(DataError, match=message) as caught:
        open_origin(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


# What Hugging Face's config.json says -> the real reason.
HUGGINGFACE = [
    ({"model_type": "dinov3_vit"}, r"rotary positions \(RoPE\)"),
    ({"model_type": "beit"}, "relative positions"),
    ({"model_type": "data2vec-vision"}, "relative positions"),
    ({"model_type": "clip_vision_model"}, r"a LayerNorm before the blocks \(CLIP\)"),
    ({"model_type": "siglip_vision_model"}, "read its weights as timm's vit_.*siglip"),
    ({"model_type": "yolos"}, "detection tokens"),
    ({"model_type": "audio-spectrogram-transformer"}, "patches that overlap"),
    ({"model_type": "vit-hybrid"}, "convolutional"),
    ({"model_type": "vit_hybrid"}, "convolutional"),
    ({"model_type": "videomae"}, "patches of videos"),
    ({"model_type": "vitpose_backbone"}, "nothing is known of here"),
    ({"model_type": "dinov2"}, "'dinov2', while its tensors are named as those of ViT"),
    ({"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map"),
    ({"model_type": "anything"}, "nothing is known of here.*Plain ViTs are vit, deit"),
    ({"model_type": None}, "model_type None"),
    ({"architectures": ["MyViT"]}, "names the class 'MyViT'"),
    ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu', not GELU"),
    ({"hidden_act": "relu"}, "activation 'relu', not GELU"),
    ({"position_embedding_type": "rotary"}, "another kind of positions"),
    ({"use_swiglu_ffn": True}, "SwiGLU"),
    ({"norm_first": False}, "norm_first=False, of which it is not known what it changes"),
    ({"rope_theta": 100.0}, "rope_theta=100.0, of which it is not known"),
    ({"attention_scale": 1.0}, "attention_scale"),
    ({"patch_padding": 2}, "patch_padding=2"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": 64}, "width 64, while its tensors have 32"),
    ({"num_hidden_layers": 3}, "depth 3, while its tensors have 1"),
    ({"qkv_bias": False}, "qkv_bias False, while its tensors have True"),
    ({"architecture": "vit_small_patch16_224"}, "is of timm .*, while its tensors"),
]


@pytest.mark.parametrize(("said", "message"), HUGGINGFACE, ids=lambda x: str(x)[:60])
@pytest.mark.parametrize("note", [False, True], ids=["theirs", "ours"])
def test_what_config_json_of_hugging_face_says(tmp_path, said, message, note):
    _, config = make(tmp_path, "huggingface", note=note)
    save(tmp_path, config | said)
    with pytest.raises(DataError, match=message) as caught:
        open_origin(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("system", "said", "expected"),
    [
        ("timm", {"model_args": {"act_layer": "gelu_tanh"}}, {"gelu": "tanh"}),
        ("timm", {"global_pool": "avg", "model_args": {"global_pool": "avg"}}, {"pool": "gap"}),
        ("huggingface", {"hidden_act": "gelu_new"}, {"gelu": "tanh"}),
        ("huggingface", {"layer_norm_eps": 1e-5}, {"norm_epsilon": 1e-5}),
        ("huggingface", {"num_attention_heads": 4}, {"num_heads": 4}),
        # What it does not say is as transformers has it by default.
        ("huggingface", {"layer_norm_eps": None, "model_type": "vit"}, {"norm_epsilon": 1e-12}),
        ("huggingface", {"layer_norm_eps": None, "model_type": "vit_msn"}, {"norm_epsilon": 1e-6}),
    ],
)
def test_settings_that_leave_no_tensor_are_taken(tmp_path, system, said, expected):
    _, config = make(tmp_path, system)
    for key, value in said.items():
        if value is None:
            del config[key]
        else:
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
    save(tmp_path, config)
    network = open_pretrained(tmp_path).network
    assert {key: network[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("system", "said", "message"),
    [
        ("timm", {"model_args": {"act_layer": "quick_gelu"}}, "activation 'quick_gelu', not GELU"),
        ("timm", {"model_args": {"qk_norm": True}}, "normalised queries and keys"),
        ("timm", {"hidden_act": "quick_gelu"}, "is of Hugging Face, while its tensors"),
        ("huggingface", {"hidden_act": "quick_gelu"}, "model_type None"),
        ("huggingface", {"num_attention_heads": 4}, "model_type None"),
    ],
)
def test_settings_without_the_name_of_their_network(tmp_path, system, said, message):
    """A config.json that lost its first line is still one."""
    make(tmp_path, system)
    save(tmp_path, said)
    with pytest.raises(DataError, match=message):
        open_pretrained(tmp_path)


def test_a_config_json_that_is_no_dictionary(tmp_path):
    make(tmp_path, "timm")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(DataError, match=r"config.json is damaged \(a list is no dictionary\)"):
        open_pretrained(tmp_path)


def test_config_json_beside_an_npz_is_asked_too(tmp_path):
    np.savez(tmp_path / "weights.npz", **flax_vit.published(flax_vit.make_tree()))
    for config, message in (
        ({"architecture": "vit_small_patch16_rope_224"}, "rotary positions"),
        ({"model_type": "dinov3_vit"}, "rotary positions"),
    ):
        save(tmp_path, config)
        with pytest.raises(DataError, match=message):
            open_pretrained(tmp_path)


NPZ = {  # what is added to a file of big_vision's -> the real reason
    "Transformer/rope/freqs": "rotary positions",
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query_norm/scale": "qk_norm",
    "Transformer/encoderblock_0/MlpBlock_0/Dense_2/kernel": "a gated MLP",
    "conv_root/kernel": "a convolutional network before the patches",
}


@pytest.mark.parametrize(("name", "message"), NPZ.items(), ids=NPZ)
def test_npz_of_other_networks(tmp_path, name, message):
    tree = flax_vit.make_tree() | {name: np.ones((3, 3), "f")}
    np.savez(tmp_path / "weights.npz", **flax_vit.big_vision(tree))
    with pytest.raises(DataError, match=message):
        load_model(open_origin(str(tmp_path / "weights.npz")))


def test_npz_without_positions(tmp_path):
    """big_vision computes them, and the report says so; vision_transformer always has a table."""
    tree = flax_vit.make_tree(positions=0)
    np.savez(tmp_path / "a.npz", **flax_vit.big_vision(tree))
    np.savez(tmp_path / "b.npz", **flax_vit.published(tree))
    assert "sincos2d" in open_pretrained(tmp_path / "a.npz").assumed[0]
    with pytest.raises(DataError, match="no table of positions"):
        open_pretrained(tmp_path / "b.npz")


def test_nothing_beside_weights_is_imported(tmp_path, monkeypatch):
    """What names modules in a run's config, or a model of one's own at the hub, means nothing."""
    (tmp_path / "evil_beside_weights.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    make(tmp_path)
    save(tmp_path, {"imports": ["evil_beside_weights"], "input": {"eval_ops": "evil()"}})
    load_model(open_origin(str(tmp_path)), num_heads=2)
    assert "evil_beside_weights" not in sys.modules


def test_a_config_json_that_contradicts_our_own_note(tmp_path):
    _, config = make(tmp_path, note=True)
    config["model_args"]["act_layer"] = "gelu_tanh"
    save(tmp_path, config)
    with pytest.raises(DataError, match=r"config.json says gelu 'tanh', the file itself 'erf'"):
        open_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("system", "said"),
    [
        ("timm", {"architecture": 5}),
        ("timm", {"model_args": ["depth"]}),
        ("timm", {"model_args": {"img_size": [8]}}),
        ("timm", {"model_args": {"num_heads": "two"}}),
        ("timm", {"pretrained_cfg": {"mean": "grey"}}),
        ("huggingface", {"hidden_act": ["gelu"]}),
        ("huggingface", {"layer_norm_eps": "small"}),
        ("huggingface", {"image_size": [8, 8, 8]}),
        ("huggingface", {"id2label": {"first": "a"}}),
    ],
)
def test_values_that_cannot_be(tmp_path, system, said):
    _, config = make(tmp_path, system)
    save(tmp_path, config | said)
    with pytest.raises(DataError, match=r"config.json has \w+=.*, which cannot be"):
        open_pretrained(tmp_path)


def test_keys_that_change_nothing_are_passed_over(tmp_path):
    _, config = make(tmp_path / "timm")
    config["model_args"] |= {"drop_path_rate": 0.1, "dynamic_img_size": True, "weight_init": "jax"}
    save(tmp_path / "timm", config)
    open_pretrained(tmp_path / "timm")
    _, config = make(tmp_path / "hf", "huggingface")
    config |= {
        "_name_or_path": "a/b", "torch_dtype": "float32", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "encoder_stride": 16,
        "transformers_version": "4.13.0", "problem_type": None, "drop_path_rate": 0.0,
        "pooler_act": "tanh", "pooler_output_size": 32, "num_labels": 3, "patch_size": [4, 4],
    }  # fmt: skip
    save(tmp_path / "hf", config)
    open_pretrained(tmp_path / "hf")


def renamed(state, pattern, new):
    return {re.sub(pattern, new, name): array for name, array in state.items()}


def without(state, pattern):
    return {name: array for name, array in state.items() if not re.search(pattern, name)}


def swiglu_packed(state):
    """timm's SwiGLUPacked: fc1 gives the gate and the values, fc2 takes half as much."""
    name = "blocks.0.mlp.fc2.weight"
    return state | {name: np.ascontiguousarray(state[name][:, : state[name].shape[1] // 2])}


def extra(name, *shape):
    return lambda state: state | {name: np.ones(shape, "f")}


# Without config.json: tensors of timm's names -> the real reason, at the latest when they are used.
BARE_TIMM = {
    "rotary, without biases": (
        lambda s: without(s, "pos_embed|qkv.bias"),
        "no table of positions, so it has rotary",
    ),
    "rotary": (lambda s: without(s, "pos_embed"), "no table of positions, so it has rotary"),
    "rotary, mixed": (extra("rope.freqs", 2, 4), "rotary positions"),
    "DINOv3's own": (
        lambda s: without(s, "pos_embed") | {"storage_tokens": np.ones((1, 4, 32), "f")},
        "rotary positions",
    ),
    "relative": (
        lambda s: (
            without(s, "pos_embed")
            | {"blocks.0.attn.relative_position_bias_table": np.ones((9, 2), "f")}
        ),
        r"relative positions \(BEiT",
    ),
    "biases": (
        lambda s: without(s, "qkv.bias") | {"blocks.0.attn.q_bias": np.ones(32, "f")},
        "biases of queries and values, none of keys",
    ),
    "CLIP": (
        lambda s: without(s, "patch_embed.proj.bias") | {"norm_pre.weight": np.ones(32, "f")},
        "a LayerNorm before the blocks",
    ),
    "hybrid": (
        extra("patch_embed.backbone.stem.conv.weight", 8, 3, 7, 7),
        "a convolutional network before the patches",
    ),
    "qk_norm": (extra("blocks.0.attn.q_norm.weight", 16), "normalised queries and keys"),
    "SwiGLU": (extra("blocks.0.mlp.w12.weight", 8, 8), "SwiGLU in place of the MLP"),
    "SwiGLU, packed": (swiglu_packed, "SwiGLU in place of the MLP"),
    "norms inside": (extra("blocks.0.attn.norm.weight", 32), "LayerNorms inside of attention"),
    "RMSNorm": (lambda s: without(s, r"norm\d?\.bias"), r"norms without offsets \(RMSNorm\)"),
    "no last norm": (lambda s: without(s, r"^norm\."), "no LayerNorm behind the blocks"),
    "parallel": (
        lambda s: renamed(s, r"blocks.0.attn.", "blocks.0.attns.0.attn."),
        "side by side",
    ),
    "no biases": (lambda s: without(s, r"attn.proj.bias"), "projections without biases"),
    "norms behind": (
        lambda s: (
            without(s, "qkv.bias") | {f"blocks.0.ls{i}.gamma": np.ones(32, "f") for i in (1, 2)}
        ),
        r"normalise behind attention and MLP \(vit_\*_rpn_\*\)",
    ),
    "positions by row and column": (
        lambda s: s | {"pos_embed": np.ones((1, 2, 2, 32), "f")},
        r"a table of positions of shape \(1, 2, 2, 32\)",
    ),
    "quantised": (
        lambda s: s | {"blocks.0.mlp.fc1.weight": np.ones((64, 32), np.int8)},
        "blocks.0.mlp.fc1.weight holds integers, as in a quantised file",
    ),
    "windows": (
        lambda s: renamed(s, r"^blocks\.", "layers.0.blocks."),
        "stages of several widths",
    ),
}


@pytest.mark.parametrize(("change", "message"), BARE_TIMM.values(), ids=BARE_TIMM)
def test_bare_files_of_other_networks_named_as_timm(tmp_path, change, message):
    state, _ = make(tmp_path)
    save(tmp_path, None, change(state))
    with pytest.raises(DataError, match=message) as caught:
        load_model(open_origin(str(tmp_path)), num_heads=2, gelu="erf")
    assert str(tmp_path) in str(caught.value)


BARE_HUGGINGFACE = {
    "positions": (lambda s: without(s, "position_embeddings"), "no table of positions"),
    "BEiT": (
        lambda s: without(s, "key.bias") | {"vit.encoder.layer.0.lambda_1": np.ones(32, "f")},
        "biases of queries and values, none of keys",
    ),
    "keys": (lambda s: without(s, "key.bias"), "biases of some of query, key and value alone"),
    "two families' names": (
        lambda s: renamed(s, r"intermediate\.dense", "mlp.fc1"),
        "some of its blocks' tensors are named as ViT's, some as DINOv2's",
    ),
    "YOLOS": (extra("vit.embeddings.detection_tokens", 1, 5, 32), "detection tokens"),
    "other model": (lambda s: renamed(s, "^vit", "dpt"), "are those of 'dpt', of which nothing"),
    "CLIP": (
        lambda s: renamed(
            s | {"pre_layrnorm.weight": np.ones(32, "f")},
            r"vit.embeddings.patch_embeddings.projection",
            "vision_model.embeddings.patch_embedding",
        ),
        r"is no ViT of .*: a LayerNorm before the blocks \(CLIP\)",
    ),
    "SigLIP": (
        lambda s: renamed(
            s,
            r"vit.embeddings.patch_embeddings.projection",
            "vision_model.embeddings.patch_embedding",
        ),
        "is no ViT of .*: SigLIP: .* read as timm's",
    ),
    "DINOv3": (
        lambda s: renamed(
            renamed(
                s, r"vit.encoder.layer.0.attention.attention.query", "layer.0.attention.q_proj"
            ),
            r"patch_embeddings.projection",
            "patch_embeddings",
        ),
        "is no ViT of .*: rotary positions",
    ),
    "hybrid": (
        extra("vit.embeddings.patch_embeddings.backbone.conv.weight", 3),
        "a convolutional network before the patches",
    ),
}


@pytest.mark.parametrize(("change", "message"), BARE_HUGGINGFACE.values(), ids=BARE_HUGGINGFACE)
def test_bare_files_of_other_networks_of_hugging_face(tmp_path, change, message):
    state, _ = make(tmp_path, "huggingface")
    save(tmp_path, None, change(state))
    with pytest.raises(DataError, match=message):
        load_model(open_origin(str(tmp_path)), num_heads=2, gelu="erf")


def test_what_a_bare_file_does_not_tell_is_said(tmp_path):
    """The GELU of a SigLIP model with mean pooling is tanh's or erf's; other files have erf's."""
    _, _ = make(tmp_path / "tok")
    _, _ = make(tmp_path / "gap", pool="gap")
    for folder, gelu in (("tok", "erf"), ("gap", None)):
        save(tmp_path / folder, None)
        found = open_pretrained(tmp_path / folder)
        assert found.network.get("gelu") == gelu
        assert "no config.json beside the file names the architecture" in found.assumed[0]
    origin = open_origin(str(tmp_path / "gap"))
    with pytest.raises(DataError, match=r"num_heads, gelu\. Set --config\.model\.num_heads"):
        load_model(origin)


def test_pooling_that_contradicts_the_tensors(tmp_path):
    _, config = make(tmp_path, pool="map")
    config["model_args"]["global_pool"] = "avg"
    save(tmp_path, config | {"global_pool": "avg"})
    with pytest.raises(DataError, match=r"pools by 'avg', its tensors by attention \(map\)"):
        open_pretrained(tmp_path)


def test_a_part_that_config_json_promises_and_the_file_lacks(tmp_path):
    """Attention pooling would otherwise be random."""
    _, config = make(tmp_path, pool="gap")
    config["model_args"]["global_pool"] = "map"
    save(tmp_path, config | {"global_pool": "map"})
    with pytest.raises(DataError, match="does not hold all of its network: map_head/"):
        load_model(open_origin(str(tmp_path)))


def test_encoders_of_hugging_face_that_are_plain_vits(tmp_path):
    """MAE and masked modelling bring a decoder, distilled DeiT two heads: left out, and said."""
    for kind, name, parts in (
        ("vit_mae", "ViTMAEForPreTraining", {"decoder.decoder_embed.weight": (8, 32)}),
        ("vit", "ViTForMaskedImageModeling", {"decoder.0.bias": (48,)}),
        (
            "deit",
            "DeiTForImageClassificationWithTeacher",
            {f"{n}_classifier.weight": (3, 32) for n in ("cls", "distillation")},
        ),
    ):
        folder = tmp_path / name
        state, config = make(folder, "huggingface")
        state = without(state, "classifier") | {n: np.ones(s, "f") for n, s in parts.items()}
        save(folder, config | {"model_type": kind, "architectures": [name]}, state)
        origin = open_origin(str(folder))
        model = load_model(origin)
        assert model.head is None and set(origin.unused) == set(parts) and not origin.unknown
        assert len(origin.notes) == 1 and origin.notes[0].startswith("left out: ")


def test_a_pooler_that_the_classifier_does_not_read(tmp_path):
    """transformers' classifier takes the cls token; a pooler may still lie in the file."""
    state, config = make(tmp_path / "plain", "huggingface")
    expected = load_model(open_origin(str(tmp_path / "plain")))(images())
    (tmp_path / "pooled").mkdir()
    pooler = {"weight": np.ones((32, 32), "f"), "bias": np.ones(32, "f")}
    state |= {f"vit.pooler.dense.{name}": array for name, array in pooler.items()}
    save(tmp_path / "pooled", config, state)
    (tmp_path / "pooled/preprocessor_config.json").write_text("{}")
    origin = open_origin(str(tmp_path / "pooled"))
    np.testing.assert_array_equal(load_model(origin)(images()), expected)
    assert origin.notes == ["left out: the pooler, which the classifier does not read"]


def images():
    return np.random.default_rng(2).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)


def test_positions_that_fit_two_grids_are_asked_for(tmp_path):
    """9 entries: of 5 tokens and 2 x 2 patches, or of 3 x 3 patches alone."""
    make(tmp_path, registers=4, prefix_posemb="all")
    save(tmp_path, None)
    with pytest.raises(DataError, match="its 9 positions are not those of one square grid"):
        open_pretrained(tmp_path)
    for size, kind in ((8, "all"), (12, "none")):
        network = open_pretrained(tmp_path, image_size=size).network
        assert (network["image_size"], network["prefix_posemb"]) == ((size, size), kind)


def test_what_is_assumed_or_left_out_is_said_by_every_command(tmp_path, caplog, monkeypatch):
    """load_model is what export and predict take weights by."""
    monkeypatch.setattr(absl_logging.get_absl_logger(), "propagate", True)
    state, config = make(tmp_path / "mae", "huggingface")
    state = without(state, "classifier") | {"decoder.decoder_embed.weight": np.ones((8, 32), "f")}
    save(tmp_path / "mae", config | {"model_type": "vit_mae", "architectures": []}, state)
    make(tmp_path / "bare")
    save(tmp_path / "bare", None)
    with caplog.at_level(logging.WARNING):
        load_model(open_origin(str(tmp_path / "mae")))
        load_model(open_origin(str(tmp_path / "bare")), num_heads=2)
        np.savez(tmp_path / "fixed.npz", **flax_vit.big_vision(flax_vit.make_tree(positions=0)))
        load_model(open_origin(str(tmp_path / "fixed.npz")), image_size=12)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3, said
    assert "mae: note: left out: the decoder of masked pretraining" in said[0]
    assert "bare: assumed: timm's plain ViT" in said[1]
    assert "fixed.npz: assumed: positions computed as big_vision's sincos2d" in said[2]


def test_i_jepa_takes_the_mean_over_patches(tmp_path):
    state, config = make(tmp_path, "huggingface")
    state = without(renamed(state, "^vit", "ijepa"), "cls_token")
    name = "ijepa.embeddings.position_embeddings"
    state[name] = np.ascontiguousarray(state[name][:, 1:])
    config |= {"model_type": "ijepa", "architectures": ["IJepaForImageClassification"]}
    save(tmp_path, config, state)
    network = open_pretrained(tmp_path).network
    assert network["pool"] == "gap" and not network["cls_token"]
    load_model(open_origin(str(tmp_path)))


def test_patches_that_do_not_divide_the_images(tmp_path):
    """SigLIP's 384 px in patches of 14: the convolution never sees the last 6 rows and columns."""
    _, config = make(tmp_path, image_size=12)
    config["model_args"]["img_size"] = [14, 15]
    save(tmp_path, config)
    found = open_pretrained(tmp_path)
    assert found.network["image_size"] == (12, 12)
    assert found.notes == [
        "of images of (14, 15) its patches cover (12, 12): that is its size here"
    ]


def test_names_without_classes_are_no_names(tmp_path):
    _, config = make(tmp_path, "huggingface")
    assert config["id2label"]["0"] == "LABEL_0"
    assert open_pretrained(tmp_path).class_names == ()
    save(tmp_path, config | {"id2label": {"0": "b", "1": "a", "2": "c"}})
    assert open_pretrained(tmp_path).class_names == ("b", "a", "c")


def test_names_of_a_head_that_was_changed(tmp_path, caplog):
    absl_logging.get_absl_logger().propagate = True
    _, config = make(tmp_path, "huggingface")
    save(tmp_path, config | {"id2label": {"0": "b", "1": "a"}})
    assert open_pretrained(tmp_path).class_names == ()
    assert "config.json names 2 classes and the head has 3 outputs" in caplog.text


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("vit_base_patch16_224", 768, {"num_heads": 12, "gelu": "erf", "pool": None}),
        ("vit_base_patch16_224", 192, {"num_heads": None}),  # made with another width
        ("vit_base_patch16_gap_224", 768, {"num_heads": 16, "pool": "gap"}),
        ("vit_base_patch16_plus_240", 896, {"num_heads": 14}),
        ("vit_base_patch16_siglip_224.webli", 768, {"gelu": "erf", "pool": "map"}),
        ("vit_so400m_patch16_siglip_gap_384", 1152, {"gelu": "tanh", "pool": "gap"}),
        ("eva_large_patch14_196", 1024, {"num_heads": 16, "pool": "gap"}),
        ("deit3_small_patch16_384", 384, {"num_heads": 6}),
    ],
)
def test_what_the_name_of_a_plain_vit_tells(name, width, expected):
    assert explain_architecture(name) is None
    known = known_of(name, width)
    assert {key: known[key] for key in expected} == expected
