"""docs/config.md is what the defaults say, and holds every key."""

from tools.config_page import PAGE, make_page
from vit_dist.config.defaults import DEFAULTS


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == make_page(), "run python tools/config_page.py --write"


def test_every_key_has_a_row_with_a_comment():
    rows = {}
    for line in make_page().splitlines():
        if line.startswith("| `"):
            key, _, _, comment = line.replace("\\|", "/").strip("| ").split(" | ", 3)
            rows[key.strip("`")] = comment
    keys = {k for k, v in DEFAULTS.items() if not isinstance(v, dict)}
    keys |= {f"{s}.{k}" for s, v in DEFAULTS.items() if isinstance(v, dict) for k in v}
    shown = {k if k in rows else f"{k.rsplit('_', 1)[0]}_*" for k in keys}
    assert set(rows) == shown
    assert all(rows.values()), [key for key, comment in rows.items() if not comment]
