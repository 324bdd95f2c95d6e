"""Every kind of image file, read as Pillow reads it: a table of formats, modes and oddities.

Alpha is compared where it is laid over a colour, which Pillow's `paste` does for comparison.
"""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.support import odd_images, peers
from tests.support.odd_images import bmp, encoded, on_screen, opened, png
from vit_dist.data.ops import basic as ops
from vit_dist.data.ops.decoding import decode_whole

pytestmark = pytest.mark.compiles  # ops that XLA compiles

PHOTO = Image.fromarray(peers.photo(33, 47))
PIXELS = np.asarray(PHOTO)
RANDOM = np.random.default_rng(0)
RAMP = np.tile(np.linspace(0, 255, 47).astype(np.uint8), (33, 1))
SEE_THROUGH = PHOTO.copy()
SEE_THROUGH.putalpha(Image.fromarray(RAMP))
MIRRORED = PHOTO.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
DEEP = RANDOM.integers(0, 65536, (33, 47))
GIF = encoded(PHOTO.quantize(16), "gif")
# IFAST of TensorFlow against ISLOW of Pillow: another rounding of the inverse DCT.
JPEG_LARGEST, JPEG_MEAN = 24, 2.0


def modes():
    """Each mode of Pillow's, as far as a conversion leads there."""
    modes = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F")
    yield from ((mode, PHOTO.convert(mode)) for mode in modes)
    yield from ((mode, SEE_THROUGH.convert(mode)) for mode in ("LA", "RGBA", "RGBa"))
    yield "La", SEE_THROUGH.convert("LA").convert("La")
    yield from ((f"P, {n} colours", PHOTO.quantize(n)) for n in (2, 3, 16, 200))


def written_by_pillow():
    """Format and mode -> file, of all pairs that Pillow writes."""
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
    for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP"):
        for mode, image in modes():
            try:
                yield f"{kind}, {mode}", encoded(image, kind, **options.get(kind, {}))
            except (OSError, ValueError):  # "cannot write mode F as PNG"
                continue


def palette_of(image):
    return np.array(image.getpalette()).reshape(-1, 3)


def bitmaps():
    """BMPs that Pillow reads and does not write."""
    for bits in (1, 4, 8):
        image = PHOTO.quantize(2**bits)
        numbers, palette = np.asarray(image), palette_of(image)
        for header in (12, 40, 108, 124):
            name = f"BMP, {bits} bits, header of {header}"
            yield name, bmp(numbers, bits, palette=palette, header=header)
        yield f"BMP, {bits} bits, top down", bmp(numbers, bits, palette=palette, top_down=True)
        yield f"BMP, {bits} bits, a gap", bmp(numbers, bits, palette=palette, gap=6)
        yield f"BMP, {bits} bits, more behind", bmp(numbers, bits, palette=palette) + b"\0\0"
    few = bmp(np.asarray(PHOTO.quantize(5)), 8, palette=palette_of(PHOTO.quantize(5))[:5])
    yield "BMP, 5 colours", few
    for top_down in (False, True):
        yield f"BMP, 16 bits, top down {top_down}", bmp(DEEP, 16, top_down=top_down)
        small = RANDOM.integers(0, 2**24, (9, 11))
        yield f"BMP, 24 bits, top down {top_down}", bmp(small, 24, top_down=top_down) + b"12"
    yield "BMP, 24 bits, OS/2", bmp(RANDOM.integers(0, 2**24, (9, 11)), 24, header=12)
    for masks in ((0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F)):
        yield f"BMP, 16 bits, {masks}", bmp(DEEP, 16, compression=3, masks=masks)
    wide = RANDOM.integers(0, 2**32, (9, 11))
    yield "BMP, 32 bits", bmp(wide, 32)
    for masks in (
        (0xFF0000, 0xFF00, 0xFF),
        (0xFF000000, 0xFF0000, 0xFF00),
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
        (0, 0, 0, 0),
    ):
        header = 40 if len(masks) == 3 else 124
        name = f"BMP, 32 bits, {[hex(mask) for mask in masks]}"
        yield name, bmp(wide, 32, compression=3, masks=masks, header=header)


def pngs():
    """PNGs of all depths and types, with what else they may hold."""
    for depth in (1, 2, 4):
        numbers = RANDOM.integers(0, 2**depth, (9, 11))
        yield f"PNG, grey of {depth} bits", png(numbers, depth, 0)
        yield f"PNG, palette of {depth} bits", encoded(PHOTO.quantize(2**depth), "png", bits=depth)
    for color_type, channels in ((2, 3), (4, 2), (6, 4)):
        numbers = RANDOM.integers(0, 65536, (9, 11, channels))
        yield f"PNG, 16 bits, type {color_type}", png(numbers, 16, color_type)
    yield "PNG, grey of 1 bit, tRNS", png(RANDOM.integers(0, 2, (9, 11)), 1, 0, tRNS=b"\0\1")
    image = PHOTO.quantize(16)
    yield "PNG, palette, tRNS of one", encoded(image, "png", transparency=3)
    yield "PNG, palette, tRNS", encoded(image, "png", transparency=bytes(range(0, 256, 16)))
    one = b"".join(int(value).to_bytes(2, "big") for value in PIXELS[3, 4])
    yield "PNG, RGB, tRNS", png(PIXELS, 8, 2, tRNS=one)
    yield "PNG, grey, tRNS", png(RAMP, 8, 0, tRNS=int(RAMP[0, 9]).to_bytes(2, "big"))
    yield "PNG, gAMA", png(PIXELS, 8, 2, gAMA=(100000).to_bytes(4, "big"))
    yield "PNG, interlaced", odd_images.interlaced_png(PIXELS)
    frames = {"save_all": True, "append_images": [MIRRORED]}
    yield "PNG, animated", encoded(PHOTO, "png", **frames)
    yield "PNG, animated, first apart", encoded(PHOTO, "png", **frames, default_image=True)
    yield "PNG, animated, alpha", encoded(SEE_THROUGH, "png", **frames)


def gifs():
    image = PHOTO.quantize(16)
    plain = encoded(image, "gif")
    frames = {"save_all": True, "append_images": [MIRRORED]}
    yield "GIF, animated", encoded(PHOTO, "gif", **frames)
    yield "GIF, animated, transparent", encoded(SEE_THROUGH, "gif", **frames)
    yield "GIF, interlaced", encoded(image, "gif", interlace=1)
    yield "GIF, transparent", encoded(image, "gif", transparency=3)
    yield "GIF, on a larger screen", on_screen(plain, (60, 50))
    yield "GIF, in its middle", on_screen(plain, (60, 50), place=(3, 4), background=5)
    inside = on_screen(plain, (60, 50), place=(3, 4), transparent=7)
    yield "GIF, in its middle, transparent", inside
    yield "GIF, larger than the screen", on_screen(plain, (20, 10), place=(3, 4))
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 3 + b"\x05hello\0"
    yield "GIF, a comment", on_screen(plain, (47, 33), extension=comment, transparent=2)
    for shared in (False, True):
        own = odd_images.with_own_palette(plain, keep_shared=shared)
        yield f"GIF, a frame's palette, another {shared}", own
    noise = Image.fromarray(RANDOM.integers(0, 256, (90, 80), np.uint8))
    yield "GIF, many blocks", encoded(noise, "gif")
    later = Image.new("RGB", (47, 33), (9, 9, 9))
    later.putpixel((40, 30), (200, 0, 0))
    yield (
        "GIF, a later frame is a part",
        encoded(Image.new("RGB", (47, 33), (9, 9, 9)), "gif", save_all=True, append_images=[later]),
    )


def webps():
    frames = {"save_all": True, "append_images": [MIRRORED]}
    for lossless in (False, True):
        for name, image in (("RGB", PHOTO), ("RGBA", SEE_THROUGH)):
            kind = f"WebP, lossless {lossless}, {name}"
            yield kind, encoded(image, "webp", lossless=lossless)
            yield f"{kind}, animated", encoded(image, "webp", lossless=lossless, **frames)
            still = encoded(image, "webp", lossless=lossless)
            alpha = name == "RGBA"
            part = odd_images.animated_webp(still, (60, 51), (6, 4), alpha=alpha)
            yield f"{kind}, a part of its canvas", part
    yield "WebP, alpha later", encoded(PHOTO, "webp", save_all=True, append_images=[SEE_THROUGH])


def jpegs():
    yield "JPEG, progressive", encoded(PHOTO, "jpeg", progressive=True, quality=95)
    yield "JPEG, 4:4:4", encoded(PHOTO, "jpeg", subsampling=0, quality=95)
    yield "JPEG, stored as RGB", encoded(PHOTO, "jpeg", keep_rgb=True, quality=95)
    inks = encoded(PHOTO.convert("CMYK"), "jpeg", quality=95)
    yield "JPEG, CMYK without Adobe", odd_images.without_adobe(inks)
    at = inks.index(b"Adobe") + 11
    yield "JPEG, YCCK", inks[:at] + b"\x02" + inks[at + 1 :]
    grey = encoded(PHOTO.convert("L"), "jpeg", quality=95)
    yield (
        "JPEG, grey, restart markers",
        encoded(PHOTO.convert("L"), "jpeg", quality=95, restart_marker_blocks=1),
    )
    yield "JPEG, something behind", grey + b"more"


FILES = dict(
    entry for make in (written_by_pillow, bitmaps, pngs, gifs, webps, jpegs) for entry in make()
)


def assert_close(have, want, name):
    assert have.shape == want.shape
    apart = abs(have.astype(int) - want)
    jpeg = name.startswith("JPEG")
    assert apart.max() <= (JPEG_LARGEST if jpeg else 0), apart.max()
    assert apart.mean() <= JPEG_MEAN


@pytest.mark.parametrize("name", FILES)
def test_each_kind_is_as_pillow_reads_it(name):
    data = FILES[name]
    assert_close(decode_whole(tf.constant(data)).numpy(), opened(data), name)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("JPEG")])
def test_alpha_is_laid_over_a_colour_as_pillow_pastes(name):
    data, color = FILES[name], (200, 255, 3)
    with Image.open(io.BytesIO(data)) as image:
        over = Image.new("RGB", image.size, color)
        clear = image.convert("RGBA")
        over.paste(clear, mask=clear.getchannel("A"))
    have = decode_whole(tf.constant(data), background=color).numpy()
    assert_close(have, np.asarray(over), name)


def test_the_table_has_all_that_matters():
    """Pillow may cease to write something, and then no test would miss it."""
    counts = {kind: sum(name.startswith(kind) for name in FILES) for kind in ("JPEG", "PNG", "GIF")}
    assert counts["JPEG"] >= 12 and counts["PNG"] >= 25 and counts["GIF"] >= 20, counts
    assert {"PNG, LA", "PNG, P", "BMP, 1", "BMP, L", "WEBP, RGBA", "JPEG, CMYK"} <= set(FILES)


def test_16_bits_of_grey_are_the_upper_8():
    """Pillow cuts what is above 255 off instead, so that all but the darkest is white."""
    data = encoded(Image.fromarray(DEEP.astype(np.uint16)), "png")
    have = decode_whole(tf.constant(data)).numpy()
    np.testing.assert_array_equal(have, np.repeat((DEEP >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("depth", [2, 4])
def test_a_transparent_grey_of_few_bits(depth):
    """Pillow compares the number that is transparent with levels stretched to 0..255: in vain."""
    numbers = RANDOM.integers(0, 2**depth, (9, 11))
    data = tf.constant(png(numbers, depth, 0, tRNS=b"\0\1"))
    want = np.where(numbers == 1, 200, numbers * 255 // (2**depth - 1))
    have = decode_whole(data, background=(200, 200, 200)).numpy()
    np.testing.assert_array_equal(have, np.repeat(want[..., None], 3, axis=2))


def with_size(data, width, height):
    """A BMP whose header says so."""
    return data[:18] + width.to_bytes(4, "little") + height.to_bytes(4, "little") + data[26:]


def with_runs(bits, compression):
    """A BMP of one row, compressed: three pixels of colour 1, the end of the row, of the image."""
    row, palette = np.ones((1, 3), int), palette_of(PHOTO.quantize(2**bits))
    stream = b"\x03\x11\0\0\0\1"
    return bmp(row, bits, palette=palette, compression=compression, stream=stream)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a JPEG inside", bmp(DEEP, 16, compression=4), "16 bits a pixel, compression 4, 47 x 33"),
        ("runs of 8 bits", with_runs(8, 1), r"compressed by run lengths \(RLE\).*save it as PNG"),
        ("runs of 4 bits", with_runs(4, 2), r"compressed by run lengths \(RLE\).*save it as PNG"),
        ("3 bits", bmp(RANDOM.integers(0, 8, (8, 8)), 8).replace(b"\x08\0", b"\x03\0"), "3 bits"),
        ("a new header", bmp(DEEP, 16, header=200), "header of 200 bytes.*save it as PNG"),
        ("cut off", bmp(DEEP, 16)[:900], "a BMP that is cut off: [0-9]+ bytes are missing"),
        ("no size", bmp(np.zeros((0, 4), int), 8) + b"\0" * 20, "4 x 0 pixels"),
        ("a huge BMP", with_size(bmp(DEEP, 16), 60_000, 50_000), "60000 x 50000 pixels.*as PNG"),
        ("a huge screen", on_screen(GIF, (60_000, 50_000)), "a GIF of 60000 x 50000 pixels, which"),
        ("no frame", encoded(PHOTO.quantize(4), "gif")[:25] + b";" * 20, "a GIF without an image"),
    ],
)
def test_what_is_not_read_says_so(name, data, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        decode_whole(tf.constant(data))


@pytest.mark.parametrize("kind", ["BMP, 8", "PNG, RGB", "GIF, P", "WEBP, RGBA", "WebP, lossless"])
def test_files_cut_anywhere_are_errors_or_images(kind):
    """Never a crash nor a loop without end; what Pillow cannot read is no image."""
    data = next(data for name, data in FILES.items() if name.startswith(kind))
    for size in [*range(0, 60, 7), len(data) // 2]:
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_whole(tf.constant(data[:size]))


@pytest.mark.parametrize("kind", ["BMP, 8 bits, a", "PNG, palette, tRNS", "GIF, in its", "WebP"])
def test_damaged_bytes_never_hang(kind):
    data = next(data for name, data in FILES.items() if name.startswith(kind))
    random = np.random.default_rng(1)
    for _ in range(40):
        damaged = bytearray(data)
        for at in random.integers(2, min(len(data), 200), 4):
            damaged[at] = random.integers(0, 256)
        try:
            decode_whole(tf.constant(bytes(damaged)), exif=True, background=(255, 255, 255))
        except (tf.errors.InvalidArgumentError, tf.errors.ResourceExhaustedError):
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"RIFF\xa4\x01\0\0WEBPVP8X",
        b"BM\xc2\0\0\0\0\0\0\0>\0\0\xee(\0" + b"\x01\0\0\0" * 20,
        b"GIF8\xff",
        b"GIF89a\xc8\xc8\xc8\xc8\x87\0\0",
        b"\x89PNG\r\n\x1a\n\0\0",
    ],
)
def test_bytes_that_are_no_text_are_no_other_error(data):
    """TensorFlow's own message holds them, and cannot be made a text of Python's."""
    for options in ({}, {"exif": True, "background": (255, 255, 255)}):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_whole(tf.constant(data), **options)


def test_within_tf_data_and_a_fused_crop():
    """As graphs, where all branches are there; a crop of the whole image is the image, resized."""
    pipe = ops.parse("decode_jpeg_and_inception_crop(16, area_min=100)")
    names = ["BMP, 1 bits, a gap", "GIF, in its middle", "WebP, lossless True, RGB, animated"]
    names += ["PNG, palette, tRNS", "JPEG, YCCK"]
    files = tf.data.Dataset.from_tensor_slices([FILES[name] for name in names])
    seed = tf.constant([1, 2])
    made = files.map(lambda data: pipe.host({"image": data, "seed": seed})["image"])
    whole = ops.parse("keep('image')|decode|inception_crop(16, area_min=100)")
    for name, have in zip(names, made, strict=True):
        example = {"image": tf.constant(FILES[name]), "seed": tf.constant([1, 2])}
        assert have.shape == (16, 16, 3), name
        assert whole.host(example)["image"].shape == (16, 16, 3)
