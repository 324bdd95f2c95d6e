"""Pipe strings: each mistake is named before data is read."""

import pytest
import tensorflow as tf

from vit_dist.data import tracing
from vit_dist.data.ops import basic as ops
from vit_dist.data.sources.source import Source


@pytest.mark.parametrize(
    "text,words",
    [
        ("", ["not a chain"]),
        ("decode|", ["not a chain", "character"]),
        ("decode+flip_lr", ["op 1", "decode + flip_lr"]),
        ("decode|flip_rl", ["op 2", "flip_rl", "did you mean 'flip_lr'", "central_crop"]),
        ("decode|ops.flip_lr", ["op 2", "ops.flip_lr"]),
        ("decode|'flip_lr'", ["op 2"]),
        ("resize", ["op 1", "size", "resize(size, method="]),
        ("resize(8, 'bilinear', False, 1)", ["op 1", "too many"]),
        ("resize(8, metod='area')", ["metod", "did you mean 'method'"]),
        ("resize(sise)", ["'sise'", "did you mean 'size'", "num_classes"]),
        ("resize(2 * 4)", ["2 * 4", "literal"]),
        ("value_range(-1, 1e999)", ["op 1", "inf is no finite number"]),
        ("normalize((0, 0, -1e999), 1)", ["-inf is no finite number"]),
        ("resize(__import__('os'))", ["literal"]),
        ("resize(*[8])", ["not supported"]),
        ("resize(8, **{})", ["not supported"]),
        ("resize(8.5)", ["8.5", "height, width"]),
        ("resize(0)", ["height=0"]),
        ("resize((8, 8, 3))", ["height, width"]),
        ("resize(8, 'cubic')", ["'cubic'", "bicubic"]),
        ("inception_crop(8, 50, 20)", ["area_min=50", "area_max=20"]),
        ("pad(-1)", ["pixels=-1"]),
        ("pad(1, mode='wrap')", ["'wrap'", "reflect"]),
        ("random_shift(1, 300)", ["300", "0..255"]),
        ("value_range(1, -1)", ["vmin=1"]),
        ("normalize('imagnet')", ["imagenet"]),
        ("normalize(0.5)", ["std is missing"]),
        ("normalize(0.5, 0)", ["std=0"]),
        ("onehot(0)", ["num_classes=0"]),
        ("keep()", ["keys"]),
        ("keep(1)", ["keys"]),
        ("value_range|flip_lr", ["op 2 'flip_lr'", "op 1 'value_range'", "after 'flip_lr'"]),
        ("value_range|normalize", ["op 2 'normalize'", "0..255"]),
    ],
)
def test_mistakes_in_a_pipe(text, words):
    with pytest.raises(ValueError) as error:
        ops.parse(text, size=8, num_classes=10)
    for word in words:
        assert word in str(error.value)


class Bytes(Source):
    name, split, num_examples, class_names = "bytes", "train", 1, ("a",)

    def __init__(self, image=tf.TensorSpec((), tf.string)):  # noqa: B008 (immutable)
        self.element_spec = {"image": image, "label": tf.TensorSpec((), tf.int32)}


class Arrays(Bytes):
    def __init__(self):
        super().__init__(tf.TensorSpec((8, 8, 3), tf.uint8))


@pytest.mark.parametrize(
    "source,text,words",
    [
        (Bytes, "decode", ["varying shape", "resize"]),
        (Bytes, "flip_lr", ["op 1 'flip_lr'", "put decode before"]),
        (Bytes, "value_range", ["never decodes"]),
        (Bytes, "decode|keep('label')", ["drops the image"]),
        (Bytes, "decode|resize(8)|keep('image', 'lable')", ["op 3", "'lable'", "'label'"]),
        (Bytes, "keep('image')|onehot(3)", ["op 2 'onehot(3)'", "'label'"]),
        (Arrays, "central_crop(9)", ["op 1 'central_crop(9)'", "9x9", "(8, 8)"]),
        (Arrays, "random_crop((8, 9))", ["random_crop", "8x9"]),
    ],
)
def test_mistakes_that_show_with_the_source(source, text, words):
    with pytest.raises(ValueError) as error:
        ops.output_spec(source(), ops.parse(text))
    for word in words:
        assert word in str(error.value)


def test_output_spec():
    text = "decode_jpeg_and_inception_crop(size)|flip_lr|value_range(-1,1)|onehot(num_classes)"
    spec = ops.output_spec(Bytes(), ops.parse(text, size=(6, 8), num_classes=4))
    assert spec == {
        "image": tf.TensorSpec((6, 8, 3), tf.uint8),
        "label": tf.TensorSpec((4,), tf.float32),
        "device_image": tf.TensorSpec((6, 8, 3), tf.float32),
    }
    for name in ("resize_small(4)", "pad(2)", "pad(2, mode='edge')", "random_shift(2)"):
        assert ops.output_spec(Arrays(), ops.parse(name))["image"].shape.is_fully_defined()


def test_switch_is_switch_case_wherever_it_is_traced():
    branches = [lambda i=i: tf.constant(i * 10) for i in range(4)]
    assert [int(ops.switch(tf.constant(i), branches)) for i in range(4)] == [0, 10, 20, 30]
    ds = tf.data.Dataset.range(4).map(lambda i: ops.switch(tf.cast(i, tf.int32), branches))
    assert [int(x) for x in ds] == [0, 10, 20, 30]
    with tracing.deviceless_graph() as _, tf.compat.v1.Session() as session:
        index = tf.compat.v1.placeholder(tf.int32, ())
        output = ops.switch(index, branches)
        assert [session.run(output, {index: i}) for i in range(4)] == [0, 10, 20, 30]
    assert tf.compat.v1.control_flow_v2_enabled()
