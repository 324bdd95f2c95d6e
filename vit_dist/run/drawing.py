"""The figures of inspection/ as images in TensorBoard while a model is trained.

The training thread only copies the weights. Another thread has a second model on the CPU, runs some
images through it and draws. Nothing of it is part of the compiled step.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.data.ops.pipe import Pipe
from vit_dist.inspection.draw import draw_images, draw_weights, pixels
from vit_dist.inspection.look import look_at_images, look_at_weights
from vit_dist.model.vit import ViT, build_vit, named_weights
from vit_dist.monitoring.writer import Writer
from vit_dist.run.background import Background


class Drawing:
    """Draws a model's inside now and then, one drawing at a time.

    A drawing that is due while the last one is still being made is left out.

    Args:
      network: the arguments of ViT.
      pipe: scales images as the model takes them.
      read_images: gives uint8 (n, height, width, C); called once, in the thread.
      writer: gets the images; its `images` may be called from another thread.
      background: has the thread.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        pipe: Pipe,
        read_images: Callable[[], np.ndarray],
        writer: Writer,
        background: Background,
    ):
        self._network, self._pipe, self._read = dict(network), pipe, read_images
        self._writer, self._background = writer, background
        self._model: ViT | None = None
        self._images: np.ndarray | None = None
        self._busy = False  # until the drawing that was begun is made

    def begin(self, step: int, model: ViT) -> None:
        """Copies the model's weights, and begins to draw them; waits for the device alone."""
        if self._busy:
            return
        self._busy = True
        # numpy() may show the variable's own memory, which the next step changes.
        weights = {
            name: np.array(variable.value.numpy(), "float32")
            for name, variable in named_weights(model).items()
        }
        self._background.start("figures", functools.partial(self._run, step, weights))

    def _run(self, step: int, weights: Mapping[str, np.ndarray]) -> None:
        try:
            self._draw(step, weights)
        finally:
            self._busy = False

    def _draw(self, step: int, weights: Mapping[str, np.ndarray]) -> None:
        if self._model is None:
            self._model = build_vit(self._network)
        for name, variable in named_weights(self._model).items():
            variable.assign(weights[name])
        self._write(step, draw_weights(look_at_weights(self._model)))
        # After the figures of the weights: these are there even where no image can be read.
        if self._images is None:
            self._images = self._read()
        scaled = self._pipe.device(tf.constant(self._images))
        look = look_at_images(self._model, self._images, scaled, on_block=self._background.go_on)
        self._write(step, draw_images(look))

    def _write(self, step: int, figures: Iterator[tuple[str, Any]]) -> None:
        for name, figure in figures:
            self._background.go_on()
            self._writer.images(step, f"figures/{name}", pixels(figure)[np.newaxis])
