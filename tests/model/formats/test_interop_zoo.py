"""Every network of timm and transformers that is named as a ViT: the same logits, or refused.

Small and random, in its own class (interop_zoo.py). With the config.json beside the weights there
is no third way. Without it, what no tensor tells is assumed, and the report says what.
"""

import json
import re

import numpy as np
import pytest

from tests.support.interop import NEEDS_PEERS, ROOT, run_peer
from vit_dist.config.errors import DataError
from vit_dist.run.origins import open_origin
from vit_dist.run.served import load_model

pytestmark = NEEDS_PEERS
TOLERANCE = 1e-4  # of the largest logit, float32
TOLD = {"num_heads": 3}


# Of timm's networks each kind of plain ViT, and one for each reason why another is refused.
FEW = (
    *("vit_base_patch16_224", "vit_base_patch16_gap_224", "vit_base_patch16_siglip_224"),
    *("vit_so400m_patch14_siglip_gap_224", "vit_small_patch14_dinov2"),
    *("vit_base_patch14_reg4_dinov2", "vit_base_patch16_224_miil", "eva_large_patch14_196"),
    *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "test_vit", "test_vit3"),
    *("vit_base_patch16_rpn_224", "vit_base_patch32_clip_224", "vit_small_patch16_18x2_224"),
    *("vit_base_patch32_clip_quickgelu_224", "vit_base_patch16_xp_224"),
    *("vit_small_patch16_rope_224", "vit_small_r26_s32_224", "vit_pe_core_tiny_patch16_384"),
    *("vit_giant_patch14_dinov2", "vit_intern300m_patch14_448", "aimv2_large_patch14_224"),
    *("vit_small_patch16_dinov3", "vit_relpos_small_patch16_224", "samvit_base_patch16"),
    *("beit_base_patch16_224", "beit3_base_patch16_224", "eva02_tiny_patch14_224"),
)


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.exhaustive)])
def zoo(request, tmp_path_factory):
    """The folder, logits by name, and what each network is."""
    folder = tmp_path_factory.mktemp("zoo")
    names = FEW if request.param == "few" else ()
    run_peer(folder, *names, script="interop_zoo.py", timeout=1500)
    with np.load(folder / "logits.npz") as logits:
        return folder, dict(logits), json.loads((folder / "made.json").read_text())


def images_of(size=32):
    rng = np.random.default_rng(size * 1000 + size)
    return rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)


class Ours:
    """Logits of a file by our ViT; each network is built once, as many names mean the same one."""

    def __init__(self):
        self.known = {}

    def __call__(self, path, **told):
        origin = open_origin(str(path))
        digest = {name: float(np.asarray(t).sum()) for name, t in origin.tensors.items()}
        key = json.dumps([origin.network, told, origin.unknown, digest], sort_keys=True)
        if key not in self.known:
            self.known[key] = load_model(origin, **told)(images_of()).numpy()
        return self.known[key], origin


ours = Ours()


def verdict(path, expected, **told):
    """ "same", "other", or why it is refused; and the origin."""
    try:
        mine, origin = ours(path, **told)
    except DataError as error:
        return f"refused: {error}", None
    if expected is None or mine.shape != expected.shape:
        return "other", origin
    same = np.abs(mine - expected).max() <= TOLERANCE * np.abs(expected).max()
    return ("same" if same else "other"), origin


def is_plain(name, made):
    """Whether timm's network is one that our ViT computes, from what timm made."""
    other = re.search(
        r"rpn|_clip_|intern300m|test_vit[34]|giant_patch14_(reg4_)?dinov2|beit3|aimv2", name
    )
    hybrid = re.search(r"_r\d*_s\d+|resnet|_mci_", name)
    kind = made["class"] in ("VisionTransformer", "VisionTransformerDistilled")
    return kind and made["block"] == "Block" and not other and not hybrid


def documented():
    """How many architectures of timm, and classes of transformers, the documentation promises."""
    text = (ROOT / "docs/finetuning.md").read_text()
    found = re.search(r"\((\d+) architectures of timm, (\d+) of transformers\)", text)
    return int(found[1]), int(found[2])


UNNAMED = {"test_vit", "test_vit2"}  # timm's own tests: plain, and refused as names nobody knows


def test_timm_with_config_json(zoo, request):
    folder, logits, made = zoo
    few = request.node.callspec.params["zoo"] == "few"
    assert not (few and {name for name in FEW if "error" in made[name]}), made
    found = {}
    for name, what in made.items():
        if "block" in what:
            found[name], _ = verdict(folder / name, logits[name], **{"gelu": "erf"})
    print(*(f"{name}: {text}" for name, text in found.items()), sep="\n")
    assert not [name for name, text in found.items() if text == "other"], found
    plain = {name for name in found if is_plain(name, made[name])}
    same = {name for name, text in found.items() if text == "same"}
    assert same == plain - UNNAMED
    assert len(same) == documented()[0] if not few else same and set(found) - same


def test_timm_without_config_json(zoo, tmp_path):
    """Bare files are taken for timm's plain ViT; one other of timm's own tests has its tensors."""
    folder, logits, made = zoo
    others = set()
    for name, what in made.items():
        if "block" not in what:
            continue
        path = tmp_path / f"{name}.safetensors"
        (folder / name / "model.safetensors").rename(path)
        gelu = "tanh" if what["act"] == "GELUTanh" else "erf"
        text, origin = verdict(path, logits[name], **TOLD, gelu=gelu)
        path.rename(folder / name / "model.safetensors")
        if text == "other":
            others.add(name)
            assert "no config.json beside the file names the architecture" in origin.assumed[0]
            assert "attention pooling over the patches alone" in origin.assumed[1]
        elif is_plain(name, what):
            # Its tensors may be those of a network that normalises behind: refused, not guessed.
            assert text == "same" or "vit_*_rpn_*" in text, (name, text)
    assert others <= {"test_vit3"}


REFUSED = {
    "DINOv3ViTModel": "rotary positions",
    "BeitForImageClassification": "relative positions, or keys without biases",
    "Data2VecVisionForImageClassification": "relative positions, or keys without biases",
    "YolosForObjectDetection": "detection tokens",
    "SiglipVisionModel": "SigLIP",
    "CLIPVisionModel": "a LayerNorm before the blocks",
    "ViT, relu": "activation 'relu'",
    "ViT, quick_gelu": "activation 'quick_gelu'",
    "ViT, pooler": "pooler has the activation 'relu'",
    "DINOv2, SwiGLU": "SwiGLU",
}
SAME = (
    "ViTForImageClassification",
    "ViTModel",
    "ViTForMaskedImageModeling",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForMaskedImageModeling",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "ViTMAEForPreTraining",
    "ViTMAEModel",
    "ViTMSNForImageClassification",
    "IJepaForImageClassification",
    "IJepaModel",
    "ViT, tanh",
    "ViT, epsilon",
    "ViT, no biases",
    "ViT, six heads",
)


def test_transformers_with_config_json(zoo):
    folder, logits, made = zoo
    found = {
        name: verdict(folder / name, logits.get(name))[0]
        for name, what in made.items()
        if "block" not in what and "error" not in what and name != "Dinov2Backbone"
    }
    print(*(f"{name}: {text}" for name, text in found.items()), sep="\n")
    assert {name for name, text in found.items() if text == "same"} == set(SAME)
    assert len(SAME) == documented()[1]
    assert not [name for name, text in found.items() if text == "other"]
    for name, message in REFUSED.items():
        assert re.search(message, found[name]), found[name]


@pytest.mark.parametrize("name", ["ViTMAEForPreTraining", "DeiTForImageClassificationWithTeacher"])
def test_what_was_left_out_is_said(zoo, name):
    origin = open_origin(str(zoo[0] / name))
    notes = str(origin.fill(load_model(origin)))
    assert re.search("note: left out: (the decoder of masked|both heads of a distilled)", notes)
