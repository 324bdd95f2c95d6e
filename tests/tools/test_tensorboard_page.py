"""What a person sees who opens TensorBoard after training: in a real one, in a real browser."""

import pytest

from tests.support import tiny
from tools.browser import Browser, find_chromium
from tools.tensorboard_page import PAGES, look, open_tab, serve
from vit_dist.monitoring.curves import GROUPS
from vit_dist.train import train

CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
RATES = {"slow": 0.001, "fast": 0.003}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A log folder with two short runs that draw all there is."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in RATES.items():
        changed = {"optimizer__learning_rate": rate, "figures_steps": 3}
        train(tiny.make(total_steps=6, log_steps=2, eval_steps=2, **changed), str(folder / name))
    return folder


@pytest.fixture(scope="module")
def tensorboard(runs):
    with serve(str(runs)) as url:
        yield url


@pytest.fixture
def browser():
    """High enough for all that a tab shows: pictures come only when they are in sight."""
    with Browser(CHROMIUM, size=(1400, 6000)) as browser:
        yield browser


@needs_chromium
@pytest.mark.spawns
@pytest.mark.exhaustive  # 30 s of CPU; what the files hold: tests/monitoring/test_tensorboard.py
def test_no_page_is_empty_and_none_says_an_error(tensorboard, browser):
    # Only the first groups are open; of the others their names are shown.
    expected = {
        "timeseries": ("train", "speed", "fast", "slow"),
        "scalars": GROUPS,
        "images": ("figures", "test", "train", "val"),
        "text": ("config_changes", "model", "weights"),
        "hparams": ("optimizer.learning_rate", "0.0010000", "0.0030000", "fast", "slow"),
    }
    assert set(expected) == set(PAGES)
    for tab, words in expected.items():
        open_tab(browser, tensorboard, tab)
        found = look(browser, tab, *words, images=4 if tab == "images" else 0)
        assert found["shown"] > 0
    for filter, tag in (
        ("train/batch", "train/batch"),
        ("figures/positions", "figures/positions"),
        ("figures/distances", "figures/distances"),
        ("figures/filters", "figures/filters"),
        ("val/worst", "val/worst_and_best"),
        ("val/confusions", "val/confusions"),
        ("val/calibration", "val/calibration"),
    ):
        open_tab(browser, tensorboard, "images", filter=filter)
        # Tags that match stand above the groups: one of each run.
        assert look(browser, "images", tag, images=2)["words"].count(tag) >= len(RATES)
    for curve in ("speed/mfu", "speed/examples_per_second"):
        open_tab(browser, tensorboard, "scalars", filter=f"{curve}$")
        words = look(browser, "scalars", curve)["words"].split()
        # Beside "Tags matching /speed/mfu$/".
        assert any(word.endswith(curve) for word in words)
    assert not browser.errors


@needs_chromium
@pytest.mark.spawns
def test_errors_of_a_page_are_kept(browser):
    browser.open("data:text/html,<p>all is well</p>")
    assert browser.wait_for("document.body.innerText") == "all is well"
    assert not browser.errors
    browser.open("data:text/html,<p>ill</p><script>console.error('so', 5); absent()</script>")
    browser.wait_for("document.body.innerText === 'ill'")
    first, second = browser.errors
    assert first == "so 5" and "absent is not defined" in second
    with pytest.raises(TimeoutError, match="not true after 0 seconds: 1 > 2"):
        browser.wait_for("1 > 2", seconds=0)
    assert browser.photograph().startswith(b"\x89PNG")
