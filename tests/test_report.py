"""The report shows what the runs' folders hold, and needs nothing but itself."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from tests.support import processes
from vit_dist.config.defaults import get_defaults
from vit_dist.inspection.page import Page
from vit_dist.monitoring.history import read_history
from vit_dist.monitoring.writer import make_writer
from vit_dist.report import make_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
RECORD = {
    "began": 100.0,
    "until": 160.0,
    "reason": "done",
    "hosts": 1,
    "replicas": 1,
    "first_step": 0,
    "last_step": 8,
    "seconds": {"steps": 45.0},
}


def write_run(folder, *, rate, accuracies):
    config = get_defaults()
    config.optimizer.learning_rate = rate
    config.seed = 7
    with make_writer(folder) as writer:
        for step, accuracy in enumerate(accuracies, 1):
            writer.scalars(4 * step, {"train/loss": 1 / step, "val/accuracy": accuracy})
        writer.images(0, "train/batch", np.zeros((1, 4, 4, 3), np.uint8))
        writer.text(0, "run", "| command |\n| --- |\n| `train <script>alert(1)</script>` |")
    (folder / "config.json").write_text(config.to_json_best_effort())
    (folder / "starts.jsonl").write_text(json.dumps({"start": 0, **RECORD}) + "\n")
    return read_history(folder)


class Reader(html.parser.HTMLParser):
    """Keeps the tags with their attributes, the texts, and the rows of tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.rows = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append([])

    def handle_data(self, data):
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path):
    runs = [
        write_run(tmp_path / "one" / "run", rate=1e-3, accuracies=[0.25, 0.5]),
        write_run(tmp_path / "two" / "run", rate=3e-4, accuracies=[0.75, 0.5]),
    ]
    return make_report(runs)


def test_what_it_shows(page):
    read = Reader(page)
    head, first, second = read.rows[:3]
    results = [dict(zip(head, row, strict=True)) for row in (first, second)]
    assert [row["run"] for row in results] == ["run (1)", "run (2)"]
    assert [row["val/accuracy"] for row in results] == ["0.5", "0.5"]
    assert [row["best val/accuracy"] for row in results] == ["0.5 at step 8", "0.75 at step 4"]
    assert [row["goodput"] for row in results] == ["75.0%", "75.0%"]
    # A drawing for each metric, a curve of each run in it.
    assert sum(tag == "svg" for tag, _ in read.tags) == 2
    assert "train/loss" in page and page.lower().count("#d55e00") >= 4
    # What the runs differ in, and what differs from the defaults in both.
    assert ["optimizer.learning_rate", "0.001", "0.0003", "0.001"] in read.rows
    assert ["seed", "7", "7", "0"] in read.rows
    images = [attrs["src"] for tag, attrs in read.tags if tag == "img"]
    assert len(images) == 2 and all(x.startswith("data:image/png;base64,") for x in images)


def test_it_needs_nothing_but_itself(page):
    read = Reader(page)
    for tag, attrs in read.tags:
        assert tag not in ("script", "link", "iframe"), tag
        for name in ("src", "href", "xlink:href"):
            assert not re.match(r"\w+://|//", attrs.get(name) or ""), attrs
    assert "default-src 'none'" in page


def test_texts_are_no_markup():
    page = Page("<b>")
    page.heading("<i>")
    page.paragraph("a < b")
    page.preformatted("<pre>", folded="<u>")
    page.table([{"<k>": "<v>"}])
    found = {tag for tag, _ in Reader(page.to_html()).tags}
    assert not found & {"b", "i", "u", "k", "v"}


def test_what_was_planned_stands_beside_what_was_measured(tmp_path):
    with make_writer(tmp_path) as writer:
        # Compilation is in the first step's time.
        for step, seconds in ((1, 60.0), (2, 0.2), (3, 0.3), (4, 0.25), (5, 0.25)):
            row = {"train/seconds_per_step": seconds, "memory/device_peak": 2.0 + step}
            writer.scalars(step, row)
    planned = [
        {"figure": "s", "metric": "train/seconds_per_step", "limit": 0.1, "expected": 0.2},
        {"figure": "GiB", "metric": "memory/device_peak", "limit": None, "expected": 8.0},
        {"figure": "MFU", "metric": "speed/mfu", "limit": 1.0, "expected": 0.5},
    ]
    (tmp_path / "plan.json").write_text(json.dumps(planned))
    found = Reader(make_report([read_history(tmp_path)])).rows
    name = tmp_path.name
    assert [name, "s", "0.1", "0.2", "0.25", "1.25"] in found
    assert [name, "GiB", "", "8", "7", "0.875"] in found
    assert [name, "MFU", "1", "0.5", "", ""] in found


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "best val/accuracy" in done.stdout and done.stdout.count("<svg") == 2


def test_the_command(tmp_path):
    write_run(tmp_path / "a", rate=1e-3, accuracies=[0.5, 0.5])
    output = tmp_path / "new" / "page.html"
    flags = [f"--runs={tmp_path / 'a'}", f"--output={output}"]
    code, text = processes.run(*flags, module="vit_dist.report", log=tmp_path / "log")
    assert code == 0 and f"wrote {output}" in text, text
    assert "0.5 at step 8" in output.read_text() or "0.5 at step 4" in output.read_text()


@pytest.mark.parametrize(
    "flags, said", [((), "give the folders of runs"), (("--runs=absent",), "is no run's folder")]
)
def test_mistakes(tmp_path, flags, said):
    code, text = processes.run(*flags, module="vit_dist.report", log=tmp_path / "l", cwd=tmp_path)
    assert code == 2 and said in text and "Traceback" not in text
