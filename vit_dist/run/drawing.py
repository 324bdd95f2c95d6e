"""The figures of inspection/ as images in TensorBoard while a model is trained.

The training thread only copies the weights. A thread of its own has a second model on the CPU, runs
a few images through it and draws. Nothing of it is part of the compiled step.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from vit_dist.data.ops.pipe import Pipe
from vit_dist.inspection.draw import draw_images, draw_weights, pixels
from vit_dist.inspection.look import look_at_images, look_at_weights
from vit_dist.model.vit import ViT, build_vit, named_weights
from vit_dist.monitoring.writer import Writer

# How long the end of a run waits for a drawing to notice that it is given up. That takes a block of
# the network or a figure, a second or two; more only if reading the images hangs.
_LAST_SECONDS = 30.0


class _GivenUpError(Exception):
    """The run ends, and nobody waits for the drawing."""


class Drawing:
    """Draws a model's inside now and then, one drawing at a time.

    A drawing that is due while the last one is still being made is left out. One that fails stops
    nothing: the first failure is told, and the next drawing is tried as usual.

    Args:
      network: the arguments of ViT.
      pipe: scales images as the model takes them.
      read_images: gives uint8 (n, height, width, C); called once, in the thread.
      writer: gets the images; its `images` may be called from another thread.
      note: tells the user a line.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        pipe: Pipe,
        read_images: Callable[[], np.ndarray],
        writer: Writer,
        *,
        note: Callable[..., None],
    ):
        self._network, self._pipe, self._read = dict(network), pipe, read_images
        self._writer, self._note = writer, note
        self._thread: threading.Thread | None = None
        self._model: ViT | None = None
        self._images: np.ndarray | None = None
        self._given_up = threading.Event()
        # What went wrong first in the thread, and whether it has been told.
        self._failure: Exception | None = None
        self._told = False

    def begin(self, step: int, model: ViT) -> None:
        """Copies the model's weights, and begins to draw them; waits for the device alone."""
        self._tell()
        if self._thread is not None and self._thread.is_alive():
            return
        # numpy() may show the variable's own memory, which the next step changes.
        weights = {
            name: np.array(variable.value.numpy(), "float32")
            for name, variable in named_weights(model).items()
        }
        # A daemon: a process that ends does not wait for it longer than `close` does.
        self._thread = threading.Thread(
            target=self._run, args=(step, weights), name="figures", daemon=True
        )
        self._thread.start()

    def finish(self, *, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits for the drawing that is being made, if there is one, or until `stop` is true."""
        while self._thread is not None and self._thread.is_alive() and not stop():
            self._thread.join(0.1)
        self._tell()

    def close(self) -> None:
        """Gives up the drawing that is being made, if there is one.

        A thread that were still in TensorFlow when Python ends could take the exit code with it.
        """
        self._given_up.set()
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)

    def _go_on(self) -> None:
        """Called now and then in the thread; raises where the drawing is given up."""
        if self._given_up.is_set():
            raise _GivenUpError

    def _tell(self) -> None:
        if self._failure is not None and not self._told:
            self._told = True
            failure = self._failure
            text = f"{type(failure).__name__}: {failure}".splitlines()[0]
            self._note(f"warning: figures could not be drawn ({text}); the training goes on")

    def _run(self, step: int, weights: Mapping[str, np.ndarray]) -> None:
        try:
            # On the CPU, beside whatever trains on an accelerator.
            with tf.device("CPU:0"):
                self._draw(step, weights)
        except _GivenUpError:
            return
        # Of any kind, since a picture is not worth a run; `_tell` says it from the training thread.
        except Exception as error:
            self._failure = self._failure or error

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
        look = look_at_images(self._model, self._images, scaled, on_block=self._go_on)
        self._write(step, draw_images(look))

    def _write(self, step: int, figures: Iterator[tuple[str, Any]]) -> None:
        for name, figure in figures:
            self._go_on()
            self._writer.images(step, f"figures/{name}", pixels(figure)[np.newaxis])
