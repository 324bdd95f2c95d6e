"""How far each op is from an independent implementation: the table in docs/ops.md.

.venv/bin/python tests/support/agreement.py    # measures anew and writes the table
"""

import functools
import io
import re
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

from tests.support import peers
from tests.support.peers import pil_op, reference_op
from vit_dist.data.ops import augment, color, geometry, randaug
from vit_dist.data.ops import basic as ops

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ops.md"
HEIGHT, WIDTH = 48, 40
PHOTO = peers.photo(HEIGHT, WIDTH)
NOISE = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
IMAGES = (PHOTO, (PHOTO // 4 + 60).astype(np.uint8), NOISE)
FACTORS = (0.0, 0.1, 0.55, 1.0, 1.37, 1.9)
REFERENCE = augment.Style(reference=True, cutout=12)
PILLOW = {
    taps: augment.Style(reference=False, fill=(124, 116, 104), taps=taps) for taps in (1, 2, 4)
}
RESAMPLE = dict(zip((1, 2, 4), (Image.Resampling(i) for i in (0, 2, 3)), strict=True))
NAMES = {1: "nearest", 2: "bilinear", 4: "bicubic"}


@functools.cache
def _compiled(style, actions):
    def one(image, words, *entries):
        layers = augment.Layer(*(entry[tf.newaxis] for entry in entries))
        return augment.augment(image, layers, style, words, actions)

    return tf.function(one, jit_compile=True, autograph=False)


def run_layer(image, layer, style, words=(0, 0), actions=augment.ACTIONS) -> np.ndarray:
    """One layer applied to one image, compiled by XLA."""
    words = tf.constant([words], tf.uint32)
    entries = [tf.constant(np.asarray(entry)) for entry in layer]
    return _compiled(style, tuple(actions))(tf.constant(image), words, *entries).numpy()


def run_pipe(text, image, seed=(1, 2)) -> np.ndarray:
    """One example through a pipe, with its device part."""
    pipe = ops.parse(text)
    example = {"image": tf.constant(image), "label": tf.constant(0), "seed": tf.constant(seed)}
    return pipe.device(pipe.host(example)["image"][tf.newaxis])[0].numpy()


def reference_rows():
    for name in randaug.REFERENCE_OPS:
        pairs = []
        for image in IMAGES:
            for m, sign in ((10, 1), (7, -1)):
                if name == "Cutout":
                    want = peers.cutout(image, 5, 20, 12)
                else:
                    want = reference_op(image, name, m, sign, None)
                layer = randaug.reference_layer(name, m, sign, HEIGHT, WIDTH)
                pairs.append((run_layer(image, layer, REFERENCE, (5, 20)), want))
        yield f"`randaug`: {name}", "the reference's formula in numpy, TensorFlow's kernels", pairs


def _pillow_layers():
    """(name, Pillow's parameter, layer)."""
    table = functools.partial(augment.layer, "table")
    for name in ("AutoContrast", "Equalize"):
        yield name, None, augment.layer(name.lower())
    yield "Invert", None, table(table=color.invert())
    for value in (1, 4, 8):
        yield "Posterize", value, table(table=color.posterize(value))
    for value in (0, 77, 128.5, 256):
        yield "Solarize", value, table(table=color.solarize(value))
    for value in (0, 55, 110):
        yield "SolarizeAdd", value, table(table=color.solarize_add(value))
    for value in FACTORS:
        yield "Brightness", value, table(table=color.brightness(value))
        for name in ("Color", "Contrast", "Sharpness"):
            yield name, value, augment.layer(name.lower(), factor=value)
    for value in (0.1, 0.5, 1.0, 1.3, 2.0):
        yield "GaussianBlur", value, augment.layer("blur", factor=value)
    yield "Grey", None, augment.layer("color", factor=0.0)


def _warps():
    for value in (-30, 7.5, 90, 135):
        yield "Rotate", value, geometry.rotate(value, HEIGHT, WIDTH)
    for value in (-0.3, 0.99):
        yield "ShearX", value, geometry.shear_x(value)
        yield "ShearY", value, geometry.shear_y(value)
    for value in (-12, 4.3):
        yield "TranslateX", value, geometry.translate(value, 0)
        yield "TranslateY", value, geometry.translate(0, value)


def pillow_rows():
    found = {}
    for name, value, layer in _pillow_layers():
        for image in IMAGES:
            pair = (run_layer(image, layer, PILLOW[1]), pil_op(image, name, value))
            found.setdefault(f"{name}", []).append(pair)
    for taps, style in PILLOW.items():
        for name, value, matrix in _warps():
            layer = augment.layer("warp", matrix=matrix)
            for image in IMAGES:
                have = run_layer(image, layer, style, actions=("table", "warp"))
                want = pil_op(image, name, value, fill=style.fill, resample=RESAMPLE[taps])
                found.setdefault(f"{name}, {NAMES[taps]}", []).append((have, want))
    for name, pairs in found.items():
        yield f"Pillow's form: {name}", "Pillow", pairs


def cubic_weights(size, count):
    """Rows of weights of a bicubic resize without antialiasing: Keys, a = -0.5, renormalised."""
    at = (np.arange(size) + 0.5) * count / size - 0.5
    t = np.abs(at[:, None] - np.arange(count))
    near, far = (1.5 * t - 2.5) * t**2 + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def resize_rows():
    filters = {"area": "BOX", "bilinear": "BILINEAR", "bicubic": "BICUBIC", "lanczos3": "LANCZOS"}
    for method, kind in filters.items():
        pairs = []
        for image in IMAGES:
            sizes = [(24, 20)] if method == "area" else [(24, 20), (30, 33)]
            for h, w in sizes:
                want = Image.fromarray(image).resize((w, h), Image.Resampling[kind])
                have = run_pipe(f"resize(({h}, {w}), {method!r}, antialias=True)", image)
                pairs.append((have, np.asarray(want)))
        yield f"`resize`, {method}, antialiased", "Pillow", pairs
    pairs = []
    for image in IMAGES:
        rows, columns = cubic_weights(70, HEIGHT), cubic_weights(31, WIDTH)
        want = np.clip(np.round(np.einsum("yh,xw,hwc->yxc", rows, columns, image)), 0, 255)
        pairs.append((run_pipe("resize((70, 31), 'bicubic')", image), want))
    yield "`resize`, bicubic", "Keys' formula (a = -0.5) in numpy", pairs


def other_rows():
    pad = "pad(3, 128)|central_crop((20, 30))"
    want = np.pad(PHOTO, ((3, 3), (3, 3), (0, 0)), constant_values=128)[17:37, 8:38]
    yield "`pad`, `central_crop`", "numpy", [(run_pipe(pad, PHOTO), want)]
    mean, std = (np.array(values) for values in ops.STATISTICS["imagenet"])
    pairs = [(run_pipe("normalize", x) * std * 255, (x / 255 - mean) * 255) for x in IMAGES]
    yield "`normalize`", "numpy", pairs
    pairs = [(run_pipe("value_range", x) * 127.5, x - 127.5) for x in IMAGES]
    yield "`value_range`", "numpy", pairs
    for kind in ("jpeg", "png", "bmp", "webp"):
        pairs = []
        for image in (np.asarray(Image.fromarray(PHOTO).resize((160, 120))), PHOTO):
            data = io.BytesIO()
            Image.fromarray(image).save(
                data, kind, **({"lossless": True} if kind == "webp" else {})
            )
            have = run_pipe("decode", data.getvalue())
            pairs.append((have, np.asarray(Image.open(data).convert("RGB"))))
        yield f"`decode`, {kind.upper()}", "Pillow", pairs


def rows() -> dict[tuple[str, str], int]:
    """(op, peer) -> the greatest difference found, in grey levels."""
    found = {}
    for source in (reference_rows, pillow_rows, resize_rows, other_rows):
        for name, peer, pairs in source():
            apart = [np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in pairs]
            found[name, peer] = int(np.ceil(max(apart) - 1e-3))
    return found


def documented() -> dict[tuple[str, str], int]:
    lines = re.findall(r"^\| (.+) \| (.+) \| (\d+) \|$", PAGE.read_text(), re.M)
    return {(name, peer): int(most) for name, peer, most in lines}


def write() -> None:
    lines = ["| Op | Compared with | Greatest difference |", "|---|---|---|"]
    lines += [f"| {name} | {peer} | {most} |" for (name, peer), most in rows().items()]
    text = re.sub(r"(?:^\|.*\n)+\Z", "\n".join(lines) + "\n", PAGE.read_text(), flags=re.M)
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
    print(PAGE.read_text())
