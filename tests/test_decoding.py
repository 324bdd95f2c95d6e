"""Unusual and damaged images: each gives an image or an error that names the op."""

import io

import numpy as np
import peers
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from vit_dist.data import ops

PHOTO = peers.photo(33, 47)


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def decode(data, text="decode"):
    pipe = ops.parse(text)
    example = {"image": tf.constant(data), "label": tf.constant(0), "seed": tf.constant([1, 2])}
    eager = pipe.host(example)["image"].numpy()
    mapped = next(iter(tf.data.Dataset.from_tensors(example).map(pipe.host)))["image"]
    np.testing.assert_array_equal(eager, mapped)
    return eager


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
    opened = Image.open(io.BytesIO(data))
    assert opened.getexif()[0x0112] == way
    want = np.asarray(ImageOps.exif_transpose(opened))
    have = decode(data, "decode(exif=True)")
    assert have.shape == want.shape
    np.testing.assert_allclose(have.astype(int), want, rtol=0, atol=5)
    assert decode(data).shape == PHOTO.shape  # as the reference systems: not turned


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
    np.testing.assert_allclose(decode(cmyk).astype(int), want, rtol=0, atol=6)
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
