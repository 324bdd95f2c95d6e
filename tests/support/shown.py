"""What TensorBoard shows of a run, read back from its event files."""

import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def pictures(workdir):
    """Name -> step -> pixels, of all images."""
    events = EventAccumulator(str(workdir), {"tensors": 0}).Reload()
    found = {}
    for name in events.Tags()["tensors"]:
        if events.SummaryMetadata(name).plugin_data.plugin_name == "images":
            # The width, the height, and each image as PNG; of these pictures there is one.
            found[name] = {
                event.step: tf.io.decode_png(event.tensor_proto.string_val[2]).numpy()
                for event in events.Tensors(name)
            }
    return found
