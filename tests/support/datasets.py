"""Small data sets of TFDS, prepared without a network."""

import tensorflow_datasets as tfds


def prepare_dummy(data_dir, file_format):
    builder = tfds.testing.DummyMnist(data_dir=str(data_dir), file_format=file_format)
    builder.download_and_prepare()
    return {"name": "dummy_mnist", "data_dir": str(data_dir)}
