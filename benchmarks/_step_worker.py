"""Our side of train_step.py and workers.py: the training step of vit_dist on one CPU device.

With TF_CONFIG it is one of several workers, each of which takes its share of the batch. Reads
numbers of steps from stdin, runs each number in one call and prints the seconds, until stdin ends.
"""

import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from vit_dist.cluster.strategy import make_strategy
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.losses import make_loss
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.schedules import Schedule
from vit_dist.training.state import TrainState
from vit_dist.training.step import make_train_step


def main() -> None:
    variant, size, depth, batch_size, threads = sys.argv[1], *map(int, sys.argv[2:])
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    strategy = make_strategy(name="multiworker" if "TF_CONFIG" in os.environ else "single")
    with strategy.scope():
        # As timm's model: cls token, erf GELU.
        options = {"pool": "tok", "gelu": "erf", "depth": depth}
        config = vit_config(variant, image_size=size, num_classes=1000, **options)
        model = build_vit(config)
        state = TrainState(
            model, make_optimizer(named_weights(model), OptimizerOptions(weight_decay=0.1))
        )
    train_steps = make_train_step(
        state,
        make_loss(),
        strategy=strategy,
        schedule=Schedule(1e-3, total_steps=10**6, name="constant"),
        preprocess=lambda images: tf.cast(images, tf.float32) / 127.5 - 1,
        batch_size=batch_size,
        seed=0,
    )
    share = batch_size // strategy.num_replicas_in_sync
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.integers(0, 256, (share, size, size, 3)).astype(np.uint8),
        "label": generator.integers(0, 1000, (share,)).astype(np.int32),
    }
    data = tf.data.Dataset.from_tensors(batch).cache().repeat()
    batches = iter(strategy.distribute_datasets_from_function(lambda _: data))
    # Traces and compiles; numpy() waits until the step has been done.
    train_steps(batches, tf.constant(1, tf.int64))["loss"].numpy()
    print("ready", model.count_params(), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        train_steps(batches, tf.constant(int(line), tf.int64))["loss"].numpy()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
