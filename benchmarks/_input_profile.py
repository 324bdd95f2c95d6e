"""Where the time of input.py goes: CPU time of the pipeline's parts, each run by one thread."""

import time

import _input_peers
import tensorflow as tf

from vit_dist.data.ops import augment, randaug
from vit_dist.data.ops import basic as ops

CHUNK = 32
# Name -> pipe; each pipe is the one before and one op more, so differences are the ops' times.
PREFIXES = {
    "decode (whole)": "decode|central_crop(224)",
    "crop: decode the window, resize": "decode_jpeg_and_inception_crop(224)",
    "  + flip_lr": "decode_jpeg_and_inception_crop(224)|flip_lr",
    "  + flip_lr + randaug(2, 10)": "decode_jpeg_and_inception_crop(224)|flip_lr|randaug(2, 10)",
}


def best(function, *, images: int, rounds: int) -> float:
    """The least CPU milliseconds per image; the first call, which compiles, does not count."""
    function()
    took = []
    for _ in range(rounds):
        began = time.process_time()
        function()
        took.append(time.process_time() - began)
    return min(took) / images * 1e3


def pipe_time(files: list[str], text: str, *, rounds: int) -> float:
    pipe = ops.parse(text)

    def example(i):
        seed = tf.stack([tf.cast(i, tf.int32), 0])
        return {"image": images[i], "label": tf.constant(0), "seed": seed}

    images = tf.stack([tf.io.read_file(path) for path in files])
    ds = tf.data.Dataset.range(len(files)).map(example).map(pipe.host_each)
    ds = ds.batch(CHUNK).map(pipe.host_chunk)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    ds = ds.repeat().with_options(options)
    batches = iter(ds)

    def run():
        for _ in range(len(files) // CHUNK):
            next(batches)

    return best(run, images=len(files), rounds=rounds)


def operation_times(images: tf.Tensor, *, rounds: int) -> list[tuple[str, float, float]]:
    """(name, ms per image of ours, of the plain form) for each operation of RandAugment."""
    style = augment.Style(reference=True, cutout=40)
    count, height, width, _ = images.shape
    words = tf.constant(1000, tf.uint32, (1, 2))
    choices = [
        randaug.reference_layer(name, 10, 1, height, width) for name in randaug.REFERENCE_OPS
    ]

    def ours(images, index):
        # The operation is chosen by a number at run time, as in training: one program has them all.
        def one(image):
            return augment.augment(image, augment.pick(choices, index[tf.newaxis]), style, words)

        return tf.map_fn(one, images)

    compiled = tf.function(ours, jit_compile=True, autograph=False)
    rows = []
    for i, name in enumerate(randaug.REFERENCE_OPS):
        at = tf.constant(i)
        plain = tf.function(lambda x, n=name: _input_peers.operations(x, 1.0)[n]())
        first = images[0]

        # Eight calls, as one takes less than the clock resolves.
        def repeat(plain=plain, first=first):
            for _ in range(8):
                plain(first)

        mine = best(lambda at=at: compiled(images, at), images=count, rounds=rounds)
        rows.append((name, mine, best(repeat, images=8, rounds=rounds)))
    return rows


def main(files: list[str], *, rounds: int) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    print("\nCPU time of the parts, ms per image, one thread")
    for name, text in PREFIXES.items():
        print(f"  {name:32} {pipe_time(files, text, rounds=rounds):6.3f}", flush=True)
    decoded = [tf.io.decode_jpeg(tf.io.read_file(path)) for path in files[:CHUNK]]
    images = tf.cast(tf.stack([tf.image.resize(image, (224, 224)) for image in decoded]), tf.uint8)
    print("  one operation of RandAugment at magnitude 10: here, and in the plain form")
    for name, ours, plain in operation_times(images, rounds=rounds):
        print(f"    {name:14} {ours:6.3f} {plain:6.3f}", flush=True)
