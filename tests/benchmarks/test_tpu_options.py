"""The table of options: what is held to its bounds and to the page."""

import re
import sys

import pytest

from tests.support.benchmarks import BENCHMARKS


@pytest.fixture
def options(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tpu_options

    yield tpu_options
    for name in [n for n, m in sys.modules.items() if str(BENCHMARKS) in str(m)]:
        del sys.modules[name]


def figures(options, **changed):
    """Made-up figures of every row, of a size where the page's rounding is a large part of them."""
    one = dict.fromkeys(options.COLUMNS, 1.0) | {"offchip": 0.0657e9, "temp": 3.64e7, **changed}
    return {row.name: dict(one) for row in options.rows()}


def read(options, text, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{options.BEGIN}{text}{options.END}")
    monkeypatch.setattr(options, "PAGE", page)
    return options.read_page()


def wrong(options, found, page):
    rows = [one for one in options.rows() if not one.bounds]
    return options.failures(rows, found, page)


def test_a_page_holds_what_was_written_and_a_change_beyond_rounding_fails(
    options, monkeypatch, tmp_path
):
    found = figures(options)
    page = read(options, options.table(options.rows(), found), monkeypatch, tmp_path)
    assert wrong(options, found, page) == []
    (said, *_) = wrong(options, figures(options, temp=3.64e7 * 1.06), page)
    assert re.search(r"Temp MB 38.58, and 36 in page.md; --write", said)
    # 0.0657 is 0.07 on the page, and so is anything to 0.075: rounding, not a change.
    assert wrong(options, figures(options, offchip=0.0741e9), page) == []
    assert wrong(options, figures(options, offchip=0.0778e9), page)


def test_a_bound_is_held(options):
    rows = [one for one in options.rows() if one.name in ("plain", "remat full")]
    found = figures(options)
    said = options.failures(rows, found, {})
    assert "remat full: temp is 1.00 times that of plain, over 0.3" in said
    assert "plain: not in tpu_options.md; --write writes it" in said
