"""Sets resized beforehand: their pixels beside Pillow's, what is kept, resuming, and damage."""

import io
import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.support import images
from tests.support.datasets import prepare_dummy
from tests.support.odd_images import encoded
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.data import pipeline, resized
from vit_dist.data.damage import Damage, explain_data_error
from vit_dist.data.ops import basic as ops
from vit_dist.data.resized import changes_of, convert_resized, resize
from vit_dist.data.sources import fingerprint
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.preparation import make_preparation

SOURCES = {"jpeg": "array_record", "raw": "raw"}
PIPE = "decode_jpeg_and_inception_crop(12)|flip_lr|value_range(-1, 1)|keep('image', 'label')"


# Colours of JPEGs in full resolution: decoders enlarge halved ones in different ways.
FULL = {"subsampling": 0, "quality": 95}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def smooth(height, width):
    """Pixels that JPEG holds well."""
    small = Image.fromarray(96 + noise(5, 6) // 4)
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def turned(way):
    exif = Image.Exif()
    exif[0x0112] = way
    return exif


def write(folder, files):
    """folder/in/train/<class>/<name>: the bytes of each file; returns the source."""
    for name, data in files.items():
        path = folder / "in/train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return open_source("folder", split="train", data_dir=str(folder / "in"))


def prepare(source, out, short_side, size=10, **options):
    how = make_preparation(short_side, **options)
    return convert_resized(source, out, how, split=source.split, examples_per_shard=size)


def opened(out, format, split="train"):
    return open_source(SOURCES[format], split=split, data_dir=str(out))


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def averaged(pixels, height, width):
    """The mean of each pixel's area, by Pillow: repeated to a common multiple, then reduced.

    Pillow rounds the sum of a block of n pixels times a whole multiple of 2**-24, which is off by
    less than n / 2**24 of the mean: 0.03 levels for the n here.
    """
    common = (pixels.shape[1] * width, pixels.shape[0] * height)
    large = Image.fromarray(pixels).resize(common, Image.Resampling.NEAREST)
    return np.asarray(large.reduce((pixels.shape[1], pixels.shape[0])))


def assert_like_pillow(have, want):
    """Equal, but where a mean lies so near to a half that 0.03 levels and float32 decide."""
    difference = np.abs(have.astype(int) - want)
    # Of evenly spread means 0.06 in 100 parts lie that near, on both sides of each half.
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.06


# (height, width) and short side -> the size that the ratio gives
@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((37, 53), 16, (16, 23)), ((60, 40), 32, (48, 32)), ((33, 33), 32, (32, 32))],
)
def test_pixels_are_the_means_of_their_areas(tmp_path, size, short_side, expected):
    pixels = noise(*size)
    source = write(tmp_path, {"a/0.png": encoded(Image.fromarray(pixels), "PNG")})
    prepare(source, tmp_path / "raw", short_side, format="raw")
    have, _ = opened(tmp_path / "raw", "raw").load(0)
    assert have.shape == (*expected, 3)
    assert_like_pillow(have, averaged(pixels, *expected))


def test_an_evaluation_sees_the_same_pixels(tmp_path):
    """resize_small to the same side changes nothing, and is what reduced them: raw is exact."""
    files = {f"a/{i}.jpg": encoded(Image.fromarray(smooth(50 + i, 61)), "JPEG") for i in range(3)}
    source = write(tmp_path, files)
    prepare(source, tmp_path / "raw", 32, format="raw")
    pipe = ops.parse("decode(exif=True, background=255)|resize_small(32)|central_crop(28)")
    batches = [
        next(pipeline.make_eval_data(one, pipe, batch_size=3).as_numpy_iterator())
        for one in (source, opened(tmp_path / "raw", "raw"))
    ]
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Images that need nothing, and others that are turned, transparent, grey and large."""
    folder = tmp_path_factory.mktemp("odd")
    clear = noise(20, 24, 4)
    files = {
        "large.png": encoded(Image.fromarray(noise(64, 96)), "PNG"),
        "large_turned.jpg": encoded(
            Image.fromarray(smooth(64, 96)), "JPEG", exif=turned(6), **FULL
        ),
        "small.jpg": encoded(Image.fromarray(smooth(20, 30)), "JPEG", **FULL),
        "small.png": encoded(Image.fromarray(noise(20, 30)), "PNG"),
        "small_clear.png": encoded(Image.fromarray(clear), "PNG"),
        "small_grey.png": encoded(Image.fromarray(noise(20, 30)[..., 0]), "PNG"),
        "small_opaque.png": encoded(
            Image.fromarray(np.dstack([clear[..., :3], np.full((20, 24), 255, np.uint8)])), "PNG"
        ),
        "small_turned.png": encoded(Image.fromarray(noise(20, 30)), "PNG", exif=turned(8)),
    }
    return write(folder, {f"a/{name}": data for name, data in files.items()}), folder, files


def test_images_are_upright_over_white_and_never_enlarged(odd):
    source, folder, files = odd
    prepare(source, folder / "raw", 32, format="raw")
    found = opened(folder / "raw", "raw")
    have = dict(zip(sorted(files), (found.load(i)[0] for i in range(len(files))), strict=True))
    for name in files:
        with Image.open(io.BytesIO(files[name])) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        want = np.asarray(Image.alpha_composite(white, upright).convert("RGB"))
        if name.startswith("large"):
            want = averaged(want, *((32, 48) if name == "large.png" else (48, 32)))
        # JPEG decoders differ by some levels; where colours are mixed, rounding differs by 1.
        tolerance = 8 if name.endswith("jpg") else 1
        np.testing.assert_allclose(have[name].astype(int), want, atol=tolerance)
    text = changes_of(folder / "raw", "train")
    assert "of 8 images 2 reduced, 2 turned upright, 1 laid over white; the others keep" in text


def test_what_needs_nothing_is_kept_byte_for_byte(odd):
    source, folder, files = odd
    prepare(source, folder / "jpeg", 32)
    found, exact = opened(folder / "jpeg", "jpeg"), opened(folder / "raw", "raw")
    kept = {"small.jpg", "small.png", "small_grey.png", "small_opaque.png"}
    for i, name in enumerate(sorted(files)):
        data = found.load(i)[0]
        assert (data == files[name]) == (name in kept), name
        if name not in kept:
            with Image.open(io.BytesIO(data)) as image:
                assert image.format == "JPEG" and not image.getexif()
            assert pillow(data).shape == exact.load(i)[0].shape
        if name == "large_turned.jpg":
            # What quality 90 costs of colours as strong as these, half of them in each direction.
            difference = np.abs(pillow(data).astype(int) - exact.load(i)[0])
            assert difference.mean() < 4


def test_quality_is_that_of_the_flag(odd):
    source, folder, _ = odd
    sizes = []
    for quality in (50, 100):
        prepare(source, folder / f"q{quality}", 32, quality=quality)
        found = opened(folder / f"q{quality}", "jpeg")
        assert found.prepared.quality == quality
        sizes.append(len(found.load(0)[0]))
    assert sizes[0] < sizes[1]


def sources(folder):
    """One of each kind that can be converted."""
    tfrecords = folder / "tfrecords"
    images.write_tfrecords(tfrecords / "plain")
    images.write_tfrecords(tfrecords / "packed", compression="GZIP")
    made = {"num_classes": 4}
    yield open_source("demo", split="val")
    yield write(folder, {f"{c}/0.jpg": images.jpeg(9) for c in "ab"})
    for name in ("plain", "packed"):
        yield open_source("tfrecord", split="train", files=f"{tfrecords}/{name}/*", **made)
    yield open_source("tfds", split="train", **prepare_dummy(folder / "tfds", "array_record"))
    array = {"num_examples": 9, "num_classes": 3, "height": 12, "width": 30}
    yield open_source("synthetic", split="train", image_format="array", **array)
    part = {"source": "folder", "data_dir": str(folder / "in")}
    parts = [{**part, "weight": 1}, {**part, "weight": 2}]
    yield open_source("mixture", split="train", parts=parts)


@pytest.mark.parametrize(
    "formats",
    [("jpeg", "raw"), pytest.param(("raw", "jpeg"), marks=pytest.mark.exhaustive)],
)
def test_every_source_is_taken(tmp_path, formats):
    """In one format and the other by turns."""
    for number, source in enumerate(sources(tmp_path)):
        format = formats[number % 2]
        out = tmp_path / f"{number}-{format}"
        prepare(source, out, 6, 1000, format=format)
        found = opened(out, format, source.split)
        assert found.class_names == source.class_names
        assert found.num_examples == source.num_examples
        labels = [found.load(i)[1] for i in range(min(found.num_examples, 20))]
        if source.indexable:
            assert labels == [source.load(i)[1] for i in range(len(labels))]
        image = found.load(0)[0]
        image = pillow(image) if isinstance(image, bytes) else image
        assert min(image.shape[:2]) == 6


def test_a_set_is_prepared_and_converted_again(tmp_path):
    source = write(tmp_path, {f"{c}/0.jpg": images.jpeg(9) for c in "ab"})
    prepare(source, tmp_path / "raw", 6, format="raw")
    found = opened(tmp_path / "raw", "raw")
    assert prepare(found, tmp_path / "again", 4) == 1
    convert(found, tmp_path / "plain", split="train", examples_per_shard=100)
    plain = opened(tmp_path / "plain", "jpeg")
    np.testing.assert_array_equal(tf.io.decode_png(plain.load(0)[0]), found.load(0)[0])


@pytest.fixture(params=sorted(SOURCES))
def folder_of(request, tmp_path):
    """24 images as a folder, and the format to prepare them in."""
    images.write_folder(tmp_path / "in")
    return open_source("folder", split="train", data_dir=str(tmp_path / "in")), request.param


def contents(out):
    return {path.name: path.read_bytes() for path in (out / "train").iterdir()}


def test_a_conversion_goes_on_where_it_was_killed(folder_of, tmp_path, monkeypatch):
    source, format = folder_of
    prepare(source, tmp_path / "whole", 8, 8, format=format)

    class Killed(BaseException):
        pass

    made = []

    def stop_at(limit):
        def counted(image, short_side):
            made.append(1)
            if len(made) > limit:
                raise Killed
            return resize(image, short_side)

        monkeypatch.setattr(resized, "resize", counted)

    stop_at(12)  # within the second shard
    with pytest.raises(Killed):
        prepare(source, tmp_path / "out", 8, 8, format=format)
    with pytest.raises(DataError, match="of a conversion that ended"):
        opened(tmp_path / "out", format)
    # Half a shard is there under another name, as after a kill that ran no clean-up.
    (tmp_path / "out/train/00001-of-00003.tmp").write_bytes(b"half")
    made.clear()
    stop_at(100)
    assert prepare(source, tmp_path / "out", 8, 8, format=format) == 2
    assert len(made) == 16  # the first shard was read back, and not made again
    whole, out = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert whole == out and "verified.json" not in out
    made.clear()
    assert prepare(source, tmp_path / "out", 8, 8, format=format) == 0 and not made
    # A shard that is gone is made again, and no other.
    next((tmp_path / "out/train").glob("00001-*")).unlink()
    assert prepare(source, tmp_path / "out", 8, 8, format=format) == 1
    assert contents(tmp_path / "out") == whole


def test_other_options_and_other_data_are_not_mixed(folder_of, tmp_path):
    source, format = folder_of
    prepare(source, tmp_path / "out", 8, format=format)
    other = "raw" if format == "jpeg" else "jpeg"
    for size, options in ((9, {"format": format}), (8, {"format": other}), (8, {"quality": 50})):
        with pytest.raises(DataError, match="other data or of another size"):
            prepare(source, tmp_path / "out", size, **options)
    with pytest.raises(DataError, match="other data or of another size"):
        convert(source, tmp_path / "out", split="train", examples_per_shard=10)
    # Other contents under the same names.
    images.write_folder(tmp_path / "in", start=100)
    for path, new in zip(
        sorted((tmp_path / "in").rglob("0*")), sorted((tmp_path / "in").rglob("1*")), strict=True
    ):
        new.rename(path)
    changed = open_source("folder", split="train", data_dir=str(tmp_path / "in"))
    with pytest.raises(DataError, match="other data or of another size"):
        prepare(changed, tmp_path / "out", 8, format=format)
    with pytest.raises(DataError, match=f"set config.data.source to {SOURCES[format]}$"):
        opened(tmp_path / "out", other)


def test_a_shard_that_does_not_read_back_is_named(folder_of, tmp_path):
    source, format = folder_of
    prepare(source, tmp_path / "out", 8, format=format)
    shard = next((tmp_path / "out/train").glob("00001-*"))
    whole = shard.read_bytes()
    for damaged in (whole[:500] + bytes([whole[500] ^ 1]) + whole[501:], whole[:-40]):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{shard}.*remove (it|.*) and convert again"):
            prepare(source, tmp_path / "out", 8, format=format)
    with pytest.raises(DataError, match=f"{shard} has .* bytes instead of .*: it has been cut"):
        opened(tmp_path / "out", format)


@pytest.mark.parametrize("packed", [False, True])
def test_bad_images_are_named_at_once(tmp_path, packed):
    if packed:
        labels = [0, 7, 1, 1, 9, 0]
        images.write_tfrecords(tmp_path, (6,), compression="GZIP", labels=labels)
        source = open_source("tfrecord", split="train", files=f"{tmp_path}/*", num_classes=4)
        bad = [source.describe(i) for i in (1, 4)]
    else:
        paths = images.write_folder(tmp_path / "in")
        for i in (3, 20):
            paths[i].write_bytes(paths[i].read_bytes()[:300])
        source = open_source("folder", split="train", data_dir=str(tmp_path / "in"))
        bad = [str(paths[i]) for i in (3, 20)]
    with pytest.raises(DataError, match="2 examples are damaged") as error:
        prepare(source, tmp_path / "out", 8, 5)
    assert all(name in str(error.value) for name in bad)


def test_training_reads_raw_pixels_as_it_reads_arrays(tmp_path):
    """Batches, of crops and others, are those of the same pixels in memory."""
    files = {f"{'ab'[i % 2]}/{i:02}.jpg": images.jpeg(9 * i, (30 + i, 41)) for i in range(12)}
    prepare(write(tmp_path, files), tmp_path / "raw", 24, 5, format="raw")
    source = opened(tmp_path / "raw", "raw")
    assert not source.encoded and source.portable
    for text in (PIPE, PIPE.replace("decode_jpeg_and_inception_crop(12)", "resize(12)")):
        pipe = ops.parse(text)
        batch = next(iter(pipeline.make_train_data(source, pipe, batch_size=8, seed=3)))
        positions = tf.range(8, dtype=tf.int64)
        drawn = pipeline.train_records(source, positions, seed=3, batch_size=8, repeats=1)
        for i in range(8):
            pixels, label = source.load(int(drawn["index"][i]))
            place = {key: value[i] for key, value in drawn.items()}
            want = pipe.host({"image": tf.constant(pixels), "label": tf.constant(label), **place})
            np.testing.assert_array_equal(batch["image"][i], want["image"])
            assert batch["label"][i] == label
    np.testing.assert_array_equal(source.read(tf.constant(7))["image"], source.load(7)[0])
    np.testing.assert_array_equal(source.peek(7)[0], source.load(7)[0])


def test_a_flipped_bit_of_raw_pixels_is_met(tmp_path):
    source = write(tmp_path, {f"a/{i}.jpg": images.jpeg(9 * i) for i in range(9)})
    prepare(source, tmp_path / "raw", 8, 5, format="raw")
    shard = tmp_path / "raw/train/00001-of-00002.tfrecord"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    found = opened(tmp_path / "raw", "raw")
    pipe = ops.parse(PIPE)
    with pytest.raises(tf.errors.DataLossError) as error:
        list(pipeline.make_eval_data(found, pipe, batch_size=9))
    said = explain_data_error(found, error.value)
    assert f"the record at byte 0 of {shard} (example 5 of " in said
    damage = Damage(found)
    list(pipeline.make_eval_data(found, pipe, batch_size=9, damage=damage))
    assert damage.counts() == {"corrupt": 1}
    with pytest.raises(DataError, match="storage is damaged"):
        found.load(5)


def test_a_fingerprint_tells_how_a_set_was_resized(folder_of, tmp_path):
    source, format = folder_of
    found = []
    for side in (8, 9):
        prepare(source, tmp_path / str(side), side, format=format)
        found.append(json.loads(json.dumps(opened(tmp_path / str(side), format).fingerprint())))
    other, _ = fingerprint.compare(*found)
    assert other[0].startswith("prepared: short side 8 (area), upright, over white, ")
    assert "-> short side 9 (area)" in other[0]
    assert fingerprint.compare(found[0], found[0]) == ([], [])


@pytest.mark.parametrize(
    ("side", "options", "words"),
    [
        (None, {"quality": 90}, "--quality goes with --short_side=N alone"),
        (None, {"format": "raw"}, "--format goes with --short_side=N alone"),
        (0, {}, "--short_side must be 1 pixel or more, such as 256; got 0"),
        (256, {"format": "png"}, "--format 'png' is unknown; allowed: jpeg, raw"),
        (256, {"format": "raw", "quality": 90}, "--quality is that of JPEGs, and --format=raw"),
        (256, {"quality": 0}, r"--quality must be in 1\.\.100, got 0"),
        (256, {"quality": 101}, r"--quality must be in 1\.\.100, got 101"),
    ],
)
def test_flags_that_cannot_work(side, options, words):
    with pytest.raises(ConfigError, match=words):
        make_preparation(side, **options)


def test_raw_pixels_in_a_bucket_are_refused():
    with pytest.raises(ConfigError, match="source 'raw' must be a local path, got gs://"):
        open_source("raw", split="train", data_dir="gs://bucket/set")
