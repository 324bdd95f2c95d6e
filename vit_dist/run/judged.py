"""Pictures of evaluations in TensorBoard: worst and best images, confusions, calibration.

An evaluation on several hosts gathers what the model said of all examples, so the first host, which
has the writer, shows the worst and best ones of them all. It reads these few images once more, by
their places in the source, in the thread that draws.
"""

import functools

import numpy as np

from vit_dist.data.ops.pipe import Pipe
from vit_dist.data.sources.source import Source
from vit_dist.evaluators.calibration import reliability
from vit_dist.evaluators.verdicts import Verdicts
from vit_dist.inspection.draw import pixels
from vit_dist.inspection.judged import (
    describe_verdict,
    draw_confusions,
    draw_reliability,
    draw_worst_and_best,
)
from vit_dist.inspection.sheet import Cell
from vit_dist.monitoring.writer import Writer
from vit_dist.run.background import Background
from vit_dist.run.input import read_images
from vit_dist.run.options import Data, EvaluationOptions

# Of a source that can only be streamed the worst and best of so many first examples are shown: to
# reach one image all before it have to be read.
STREAMED = 1000


class Judged:
    """Keeps the newest verdicts of each evaluation, and draws them when it is told to.

    Args:
      options, data: of the run.
      writer: gets the pictures.
      background: has the thread.
      count: how many worst and how many best images; 0 for no sheet.
      figures: whether confusions and calibration are drawn, which takes matplotlib.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        data: Data,
        writer: Writer,
        background: Background,
        *,
        count: int,
        figures: bool,
    ):
        self._options, self._data = options, data
        self._writer, self._background = writer, background
        self._count, self._figures = count, figures
        # Name of the evaluation -> its step and what was said, until that is drawn.
        self._newest: dict[str, tuple[int, Verdicts]] = {}

    def keep(self, name: str, step: int, verdicts: Verdicts) -> None:
        """Keeps the verdicts of an evaluation at a step, in the place of earlier ones."""
        self._newest[name] = (step, verdicts)

    def draw(self) -> None:
        """Lets the thread draw what has been kept since the last call."""
        for name, (step, verdicts) in self._newest.items():
            # One after the other, so that a sheet whose images cannot be read takes no figure away.
            if self._figures:
                draw = functools.partial(self._draw_figures, name, step, verdicts)
                self._background.start(f"confusions of {name}", draw)
            if self._count:
                draw = functools.partial(self._draw_sheet, name, step, verdicts)
                self._background.start(f"worst and best images of {name}", draw)
        self._newest = {}

    def _read_from(self, name: str) -> tuple[Source, Pipe]:
        """The source that an evaluation judges, and its pipe."""
        if name in self._options.evals:
            entry = self._options.evals[name]
            return self._data.sources[entry.split], entry.pipe
        return self._data.sources[name], self._options.pipe

    def _draw_figures(self, name: str, step: int, verdicts: Verdicts) -> None:
        names = self._read_from(name)[0].class_names
        counted = reliability(verdicts.confidence, verdicts.hits)
        figures = {
            "confusions": draw_confusions(verdicts.labels, verdicts.predictions, names, title=name),
            "calibration": draw_reliability(*counted, title=name),
        }
        for kind, figure in figures.items():
            self._background.go_on()
            self._writer.images(step, f"{name}/{kind}", pixels(figure)[np.newaxis])

    def _draw_sheet(self, name: str, step: int, verdicts: Verdicts) -> None:
        source, pipe = self._read_from(name)
        before = source.num_examples if source.indexable else STREAMED
        extremes = verdicts.extremes(self._count, before=before)
        places = verdicts.indices[np.concatenate(extremes)]
        # Without any there is nothing to show: all of a stream's first examples are damaged.
        if not len(places):
            return
        images = read_images(source, pipe, np.sort(places))
        self._background.go_on()
        worst, best = (
            [
                self._cell(images[verdicts.indices[i]], source.class_names, verdicts, i)
                for i in found
                if verdicts.indices[i] in images
            ]
            for found in extremes
        )
        sheet = np.asarray(draw_worst_and_best(worst, best))
        self._writer.images(step, f"{name}/worst_and_best", sheet[np.newaxis])

    @staticmethod
    def _cell(image: np.ndarray, names: tuple[str, ...], verdicts: Verdicts, example: int) -> Cell:
        label, said = verdicts.labels[example], verdicts.predictions[example]
        caption = describe_verdict(names[label], names[said], verdicts.confidence[example])
        # Of channels that are no colours their mean is shown, in grey.
        grey = image.shape[-1] != 3
        return Cell(image.mean(axis=-1).round().astype(np.uint8) if grey else image, caption)
