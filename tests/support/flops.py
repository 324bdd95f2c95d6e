"""The program of which FLOPs are counted."""

import tensorflow as tf

from vit_dist.model.vit import build_vit, named_weights

BATCH = 2


def program(network, *, trained=None, stage="hlo"):
    """A step's forward and backward pass as XLA gets it: text, or bytes for "hlo_serialized"."""
    model = build_vit(network)
    weights = [v.value for n, v in named_weights(model).items() if trained is None or n in trained]

    @tf.function(jit_compile=True, autograph=False)
    def step(images):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss = tf.reduce_sum(tf.sin(model(images, training=True)))
        return loss, tape.gradient(loss, weights)

    shape = (BATCH, *model.image_size, model.channels)
    return step.experimental_get_compiler_ir(tf.TensorSpec(shape))(stage=stage)
