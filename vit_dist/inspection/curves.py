"""Draws metrics of several runs over each other, with matplotlib."""

import io
from collections.abc import Mapping, Sequence

# Okabe and Ito's colours, which colour-blind readers can tell apart; then other kinds of lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINES = ("-", "--", ":", "-.")
# More points than a curve is pixels wide are no more to see, and make a large file.
_POINTS = 1000


def draw_curves(title: str, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> str:
    """An SVG with a curve for each run.

    Args:
      title: name of the metric.
      curves: run -> (steps, values). Its place in the mapping decides a run's colour, so that it is
        the same in all drawings; a run without the metric has ([], []).
    """
    # Slow to import, and optional: see check_matplotlib of draw.py.
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for i, (run, (steps, values)) in enumerate(curves.items()):
        stride = -(-len(steps) // _POINTS)
        if not steps:
            continue
        # The last point stays: it is what is reported.
        kept = sorted({*range(0, len(steps), stride), len(steps) - 1})
        colour = _COLOURS[i % len(_COLOURS)]
        line = _LINES[i // len(_COLOURS) % len(_LINES)]
        marker = "o" if len(kept) == 1 else None
        x, y = [steps[k] for k in kept], [values[k] for k in kept]
        axes.plot(x, y, line, color=colour, marker=marker, markersize=4, linewidth=1.3, label=run)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    buffer = io.StringIO()
    # By default an SVG holds the time, and names drawn at random.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    # Within HTML stands the drawing alone, without the head of an XML file.
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def colour_of(index: int) -> str:
    """The colour of the run at this place of `curves`."""
    return _COLOURS[index % len(_COLOURS)]
