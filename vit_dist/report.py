"""One page about runs: python -m vit_dist.report --runs runs/first,runs/second --output FILE.

Curves of all runs over each other, evaluations, what their configs differ in, the last images that
they showed in TensorBoard (the first batch, figures, validation images), goodput and restarts, and
where and with what they ran. The page needs no network and no other file. It is made from the runs'
folders alone: no model is built, and no device is touched.
"""

import json
import statistics
from collections.abc import Mapping, Sequence

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
from absl import flags
from tensorboard import plugin_util

from vit_dist.config.defaults import as_json, get_defaults
from vit_dist.config.errors import ConfigError
from vit_dist.inspection.curves import colour_of, draw_curves
from vit_dist.inspection.draw import check_matplotlib
from vit_dist.inspection.page import Page
from vit_dist.monitoring.goodput import format_table, measure
from vit_dist.monitoring.history import History, flatten, read_history
from vit_dist.paths import expand
from vit_dist.storage.files import write_output

# What stands in the first table where a run has it.
_RESULTS = ("val/accuracy", "val/loss", "test/accuracy", "test/loss", "train/loss")
# Texts of TensorBoard that a section of their own shows better.
_SHOWN_TEXTS = ("config", "config_changes", "plan")


def define_flags() -> None:
    """Defines this command's flags; not at import: other commands have flags of the same names."""
    flags.DEFINE_list("runs", None, "folders of runs, with commas between")
    flags.DEFINE_string("output", "report.html", "the page")


def main() -> int:
    """The command; returns its exit code."""
    if not flags.FLAGS.runs:
        raise ConfigError("give the folders of runs: --runs runs/first,runs/second")
    check_matplotlib("python -m vit_dist.report")
    page = make_report([read_history(expand(folder)) for folder in flags.FLAGS.runs])
    output = write_output(flags.FLAGS.output, page.encode())
    print(f"wrote {output} ({len(page) / 1e6:.1f} MB)")
    return 0


def make_report(runs: Sequence[History]) -> str:
    """The page, as HTML.

    Args:
      runs: at least one; their names differ, or are made to.
    """
    names = _distinct([run.name for run in runs])
    of = dict(zip(names, runs, strict=True))
    page = Page(f"Training: {', '.join(names)}")
    _add_results(page, of)
    _add_plans(page, of)
    _add_curves(page, of)
    _add_configs(page, of)
    for name, run in of.items():
        if run.images:
            page.heading(f"Images: {name}")
        for tag, (step, files) in sorted(run.images.items()):
            page.heading(f"{tag}, step {step}", level=3)
            for png in files:
                page.image(png, name=f"{tag} of {name}")
    for name, run in of.items():
        if run.starts:
            page.heading(f"Goodput and restarts: {name}")
            page.preformatted(format_table(run.starts))
    for name, run in of.items():
        texts = {k: v for k, v in run.texts.items() if k not in _SHOWN_TEXTS}
        if texts:
            page.heading(f"How it was run: {name}")
        for tag, text in sorted(texts.items()):
            page.heading(tag, level=3)
            # TensorBoard's own conversion, which keeps no script and no image from elsewhere.
            page.markup(plugin_util.markdown_to_safe_html(text))
    return page.to_html()


def _add_results(page: Page, runs: Mapping[str, History]) -> None:
    shown = [key for key in _RESULTS if any(key in run.curves for run in runs.values())]
    rows = []
    for name, run in runs.items():
        steps = max((found[-1] for found, _ in run.curves.values()), default=None)
        row = {"run": name, "steps": steps, **{key: run.last.get(key) for key in shown}}
        found, values = run.curves.get("val/accuracy", ([], []))
        best = max(zip(values, found, strict=True), default=None)
        row["best val/accuracy"] = best and f"{best[0]:.4g} at step {best[1]}"
        goodput = measure(run.starts) if run.starts else None
        row["hours"] = goodput and goodput.wall / 3600
        row["goodput"] = goodput and f"{goodput.share:.1%}"
        row["restarts"] = goodput and goodput.restarts
        rows.append(row)
    page.heading("Results")
    page.table(rows, colours=[colour_of(i) for i in range(len(rows))])
    # Evaluations by name, and whatever else was measured: the last value of each.
    metrics = sorted({name for run in runs.values() for name in run.curves})
    rest = [{"metric": key, **{n: run.last.get(key) for n, run in runs.items()}} for key in metrics]
    page.markup("<details><summary>The last value of every metric</summary>")
    page.table(rest)
    page.markup("</details>")


def _add_plans(page: Page, runs: Mapping[str, History]) -> None:
    rows = []
    for name, run in runs.items():
        for planned in run.plan:
            _, values = run.curves.get(planned["metric"], ([], []))
            # Most of a run, and not its first steps, which compile, or its last one. Memory is a
            # peak, of which the largest counts.
            peak = planned["metric"].startswith("memory/")
            measured = (max(values) if peak else statistics.median(values)) if values else None
            rows.append(
                {
                    "run": name,
                    "figure": planned["figure"],
                    "planned limit": planned["limit"],
                    "planned": planned["expected"],
                    "measured": measured,
                    "measured / planned": measured and measured / planned["expected"],
                }
            )
    if rows:
        page.heading("Planned and measured")
        page.table(rows)


def _add_curves(page: Page, runs: Mapping[str, History]) -> None:
    page.heading("Curves")
    if len(runs) > 1:
        page.table(
            [{"run": name} for name in runs], colours=[colour_of(i) for i in range(len(runs))]
        )
    metrics = {name for run in runs.values() for name in run.curves}
    # A single point is in the tables, and how many examples were judged is no curve.
    curves = [
        name
        for name in sorted(metrics, key=_rank)
        if not name.endswith("/examples")
        and any(len(run.curves.get(name, ([], []))[0]) > 1 for run in runs.values())
    ]
    page.drawings(
        [
            draw_curves(metric, {n: run.curves.get(metric, ([], [])) for n, run in runs.items()})
            for metric in curves
        ]
    )


def _rank(metric: str) -> tuple[int, str]:
    """What is trained comes first, then what is judged, then the rest by name."""
    first = ("train/loss", "val/loss", "train/accuracy", "val/accuracy")
    return (first.index(metric) if metric in first else len(first), metric)


def _add_configs(page: Page, runs: Mapping[str, History]) -> None:
    page.heading("Config")
    configs = {name: run.config for name, run in runs.items()}
    keys = sorted({key for config in configs.values() for key in config})
    defaults = flatten(as_json(get_defaults()))

    def row(key: str) -> dict[str, str]:
        values = {n: _shown(config.get(key)) for n, config in configs.items()}
        return {"key": key, **values, "default": _shown(defaults.get(key))}

    differ = [k for k in keys if len({_shown(c.get(k)) for c in configs.values()}) > 1]
    if len(runs) > 1:
        page.heading("What the runs differ in", level=3)
        page.table([row(key) for key in differ])
        if not differ:
            page.paragraph("Nothing: the configs are the same.")
    page.heading("What differs from the defaults", level=3)
    changed = [row(key) for key in keys if key not in differ]
    page.table([each for each in changed if any(each[n] != each["default"] for n in configs)])
    for name, config in configs.items():
        page.preformatted(json.dumps(config, indent=1, sort_keys=True), folded=f"All keys: {name}")


def _shown(value: object) -> str:
    return json.dumps(value)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, numbered where two are the same."""
    return [
        f"{name} ({i})" if list(names).count(name) > 1 else name for i, name in enumerate(names, 1)
    ]


def script() -> None:
    """The program vit-dist-report: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
