"""Unusual and damaged images: each gives an image or an error that names the op."""

import functools
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.support import peers
from vit_dist.data.ops import basic as ops
from vit_dist.data.ops import decoding

PHOTO = peers.photo(33, 47)
WAYS = range(1, 9)  # orientations of EXIF; 1 is upright


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@functools.cache
def host_of(text):
    """A pipe's ops on a file's bytes: called at once, and as a graph that is traced once."""
    pipe = ops.parse(text)

    def host(data):
        return pipe.host({"image": data, "label": 0, "seed": tf.constant([1, 2])})["image"]

    return host, tf.function(host, input_signature=[tf.TensorSpec((), tf.string)])


def decode(data, text="decode"):
    eager, graph = (host(tf.constant(data)).numpy() for host in host_of(text))
    np.testing.assert_array_equal(eager, graph)
    return eager


def decode_all(files, text):
    """As `decode`, of several files through a pipe that is traced once."""
    pipe, rest = ops.parse(text), {"label": 0, "seed": tf.constant([1, 2])}
    made = tf.data.Dataset.from_tensor_slices(files).map(lambda x: pipe.host({"image": x, **rest}))
    return [example["image"] for example in made.as_numpy_iterator()]


def with_orientation(way, *, byteorder="II", quality=95):
    """A JPEG with EXIF; Pillow writes big-endian, so little-endian bytes are made by hand."""
    if byteorder == "MM":
        exif = Image.Exif()
        exif[0x010F], exif[0x0112] = "a camera", way
        exif = exif.tobytes()
    else:
        entry = (0x0112).to_bytes(2, "little") + (3).to_bytes(2, "little")
        entry += (1).to_bytes(4, "little") + way.to_bytes(2, "little") + b"\0\0"
        exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"
    return encoded(Image.fromarray(PHOTO), "jpeg", exif=exif, quality=quality)


@pytest.mark.parametrize("byteorder", ["II", "MM"])
@pytest.mark.parametrize("way", range(1, 9))
def test_exif_orientation(way, byteorder):
    data = with_orientation(way, byteorder=byteorder)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == way
    plain = Image.fromarray(decode(data))  # of one decoder, so that all is equal but the turn
    plain.getexif()[0x0112] = way
    want = np.asarray(ImageOps.exif_transpose(plain))
    np.testing.assert_array_equal(decode(data, "decode(exif=True)"), want)
    assert decode(data).shape == PHOTO.shape  # as the reference systems: not turned


def turned_file(kind, way, pixels=PHOTO):
    """An image file with that orientation, and the bytes of one that differs in that alone."""
    exif = Image.Exif()
    exif[0x0112] = way
    options = {"jpeg": {"quality": 95}, "webp": {"lossless": True}}.get(kind, {})
    image = Image.fromarray(pixels)
    return encoded(image, kind, exif=exif, **options), encoded(image, kind, **options)


def upright(pixels, way):
    """Pixels as stored -> as Pillow turns them."""
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = way
    return np.asarray(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_exif_orientation_of_other_kinds(kind):
    files = [turned_file(kind, way)[0] for way in WAYS]
    for data, have in zip(files, decode_all(files, "decode(exif=True)"), strict=True):
        want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        np.testing.assert_array_equal(have, want)
    for have in decode_all(files, "decode"):
        np.testing.assert_array_equal(have, PHOTO)


def test_exif_behind_the_pixels():
    """PNG and WebP allow it there; Pillow writes it in front in PNG, and behind in WebP."""
    data, plain = turned_file("png", 6)
    at, end = data.index(b"eXIf") - 4, data.index(b"IDAT") - 4
    behind = data[:at] + data[end:-12] + data[at:end] + data[-12:]
    want = upright(decode(plain), 6)
    np.testing.assert_array_equal(decode(behind, "decode(exif=True)"), want)


def segment(marker, data):
    """A segment of a JPEG."""
    return bytes((0xFF, marker)) + (len(data) + 2).to_bytes(2, "big") + data


def test_what_stands_before_exif():
    data = with_orientation(6)
    at = data.index(b"Exif") - 4
    parts = [
        segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0"),
        segment(0xFE, b"a comment"),
        segment(0xE2, b"ICC_PROFILE\0" + b"x" * 60_000) * 2,
        b"\xff" * 3,  # filling
    ]
    fronts = [b"", *parts, b"".join(parts)]
    files = [data[:2] + front + data[at:] for front in fronts]
    want = upright(decode(data), 6)
    for have in decode_all(files, "decode(exif=True)"):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(
    ("kind", "dct", "limit"),
    [
        ("png", "", 0),
        pytest.param("webp", "", 0, marks=pytest.mark.exhaustive),
        # A window is smoothed otherwise at its border, and rounded to pixels of the smaller image.
        ("jpeg", "", 1),
        ("jpeg", ", dct_scaling=True", 12),  # a wrong way is 50 apart and more
    ],
)
def test_exif_in_the_fused_crop(kind, dct, limit):
    """The window is drawn in the upright image: as if the file had been stored so."""
    files = [turned_file(kind, way, peers.photo(120, 170))[0] for way in WAYS]
    options = "24, area_min=60, method='area'"
    fused = decode_all(files, f"decode_jpeg_and_inception_crop({options}, exif=True{dct})")
    # The crop stands at the same place of its pipe, so that the same window is drawn.
    crop = ops.parse(f"inception_crop({options})")
    for way, image, have in zip(WAYS, decode_all(files, "decode(exif=True)"), fused, strict=True):
        example = {"image": tf.constant(image), "label": 0, "seed": tf.constant([1, 2])}
        want = crop.host(example)["image"].numpy()
        apart = [abs(have - upright(want, other).astype(int)).mean() for other in WAYS]
        assert np.argmin(apart) == 0 and apart[0] <= limit, (way, apart)


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_no_orientation_and_nonsense_leave_the_image_as_it_is(kind):
    data = encoded(Image.fromarray(PHOTO), kind)
    np.testing.assert_array_equal(decode(data, "decode(exif=True)"), decode(data))
    for way in (0, 9, 700):
        data = with_orientation(way)
        np.testing.assert_array_equal(decode(data, "decode(exif=True)"), decode(data))
    cut = with_orientation(6)
    at = cut.index(b"Exif")
    # The directory lies beyond the end.
    far = cut[: at + 10] + b"\xff\xff\xff\x7f" + cut[at + 14 :]
    np.testing.assert_array_equal(decode(far, "decode(exif=True)"), decode(far))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 1), (17, 31)])
@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "gif", "webp"])
def test_odd_sizes(size, kind):
    image = Image.fromarray(PHOTO).resize(size[::-1])
    data = encoded(image, kind)
    assert decode(data).shape == (*size, 3)
    assert decode(data, "decode_jpeg_and_inception_crop(8)|flip_lr").shape == (8, 8, 3)
    assert decode(data, "decode|resize_small(4)|central_crop(4)").shape == (4, 4, 3)


def test_modes_of_colour():
    photo = Image.fromarray(PHOTO)
    grey = decode(encoded(photo.convert("L"), "jpeg"))
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    cmyk = encoded(photo.convert("CMYK"), "jpeg", quality=95)
    want = np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB"), int)
    apart = abs(decode(cmyk) - want)  # another DCT and chroma filter
    assert apart.max() <= 16 and apart.mean() < 1.5
    crop = decode(cmyk, "decode_jpeg_and_inception_crop(16)")
    assert crop.shape == (16, 16, 3)
    deep = np.linspace(0, 65535, 33 * 47).astype(np.uint16).reshape(33, 47)
    have = decode(encoded(Image.fromarray(deep), "png"))
    np.testing.assert_array_equal(have[..., 1], deep >> 8)
    clear = photo.copy()
    clear.putalpha(Image.fromarray(PHOTO[..., 0]))
    np.testing.assert_array_equal(decode(encoded(clear, "png")), PHOTO)
    palette = photo.quantize(16)
    want = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode(encoded(palette, "png")), want)
    np.testing.assert_array_equal(decode(encoded(palette, "gif")), want)


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", with_orientation(1)[:400], encoded(Image.fromarray(PHOTO), "png")[:200]],
    ids=["empty", "text", "half a JPEG", "half a PNG"],
)
@pytest.mark.parametrize("text", ["decode(exif=True)", "decode_jpeg_and_inception_crop(8)"])
def test_what_is_no_image_is_an_error(data, text):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(data, text)


@pytest.mark.parametrize("name", ["inception_crop(24", "decode_jpeg_and_inception_crop(24"])
def test_crops_take_a_method(name):
    data = encoded(Image.fromarray(PHOTO), "png")
    begin = "decode|" if name.startswith("inception") else ""
    images = {
        text: decode(data, f"{begin}{name}, area_min=60{text})").astype(int)
        for text in ("", ", method='bicubic'", ", method='bicubic', antialias=True")
    }
    plain, cubic, smooth = images.values()
    assert (plain != cubic).any() and (cubic != smooth).any()
    assert abs(plain - smooth).mean() < 12


# decoding at a fraction of the size


@functools.cache
def camera_jpeg(height, width):
    """A photograph enlarged to what a telephone takes, with a sensor's noise."""
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    image = Image.fromarray(np.clip(peers.photo(height, width) + noise, 0, 255).astype(np.uint8))
    return encoded(image, "jpeg", quality=92)


@functools.cache
def camera(height, width):
    """A JPEG, and all of its pixels."""
    data = camera_jpeg(height, width)
    return data, tf.io.decode_jpeg(data).numpy()


def crops(data, text, seeds):
    pipe = ops.parse(text)
    made = [
        pipe.host({"image": tf.constant(data), "label": 0, "seed": tf.constant([7, i])})
        for i in seeds
    ]
    return np.stack([example["image"] for example in made]).astype(int)


# Target sizes, windows in percent of the area, and the least of 1 / 8, 1 / 4 and 1 / 2 to come.
CROPS = [(112, 5, 2), (150, 70, 4), (300, 70, 2), (600, 90, 2)]
# Sides that are multiples of 8 and sides that are not, each with a small and a large window.
WIDE, TALL = (1504, 2000), (2001, 1499)


@pytest.mark.parametrize(
    ("camera_size", "size", "area_min", "least"),
    [
        pytest.param(sides, *crop, marks=[] if i % 2 == odd else pytest.mark.exhaustive)
        for odd, sides in enumerate((WIDE, TALL))
        for i, crop in enumerate(CROPS)
    ],
)
def test_a_scaled_crop_is_the_crop(camera_size, size, area_min, least):
    """Against the means of the same draw's window in the full decode."""
    data, full = camera(*camera_size)
    for i in range(2):
        seed = tf.random.fold_in([7, i], 1)
        begin, extent = (
            x[:2] for x in decoding._crop_window(full.shape, (area_min / 100, 1.0), seed)
        )
        ratio = max(r for r in (1, 2, 4, 8) if (extent.numpy() >= r * size).all())
        window = ratio * decoding._scaled_window(begin, extent, tf.shape(full)[:2], ratio).numpy()
        assert ratio >= least
        assert abs(window - np.concatenate((begin, extent))).max() <= ratio  # of the full pixels
        top, left, height, width = window
        window = np.pad(full, ((0, 8), (0, 8), (0, 0)), "edge")[top:, left:][:height, :width]
        want = tf.image.resize(window, (size, size), "area").numpy()
        text = (
            f"decode_jpeg_and_inception_crop({size}, {area_min}, method='area', dct_scaling=True)"
        )
        apart = abs(crops(data, text, [i])[0] - want)
        assert apart.mean() < 4 and np.quantile(apart, 0.99) < 25, (apart.mean(), apart.max())


def test_small_windows_are_decoded_whole():
    """Less than twice the size in one direction."""
    data = encoded(Image.fromarray(PHOTO).resize((390, 1000)), "jpeg")
    text = "decode_jpeg_and_inception_crop(200{})"
    want, have = (crops(data, text.format(x), range(8)) for x in ("", ", dct_scaling=True"))
    np.testing.assert_array_equal(have, want)
    png = encoded(Image.fromarray(PHOTO), "png")
    want, have = (
        crops(png, f"decode_jpeg_and_inception_crop(4{x})", range(4))
        for x in ("", ", dct_scaling=True")
    )
    np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(("min_side", "ratio"), [(75, 8), (125, 8), (126, 4), (500, 2), (501, 1)])
def test_decode_with_a_smaller_side(min_side, ratio):
    data = camera_jpeg(1001, 1335)
    have = decode(data, f"decode(min_side={min_side})")
    size = (-(-1001 // ratio), -(-1335 // ratio))
    assert have.shape == (*size, 3)
    margins = [(0, -n % ratio) for n in (1001, 1335)]
    whole = np.pad(decode(data), (*margins, (0, 0)), "edge")
    want = whole.reshape(size[0], ratio, size[1], ratio, 3).mean((1, 3))
    apart = abs(have - want)
    if ratio == 1:
        assert apart.max() == 0
    assert apart.mean() < 1.5 and np.quantile(apart, 0.99) < 8


def test_min_side_with_orientation_and_other_kinds():
    data = with_orientation(6)
    assert decode(data, "decode(exif=True, min_side=8)").shape == (12, 9, 3)
    png = encoded(Image.fromarray(PHOTO), "png")
    np.testing.assert_array_equal(decode(png, "decode(min_side=4)"), PHOTO)
    with pytest.raises(ValueError, match="min_side=0 must be an int of 1 or more"):
        ops.parse("decode(min_side=0)")
