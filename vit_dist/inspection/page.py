"""An HTML page that needs nothing but itself: no network, no script, no other file."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em;
  color: #222; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; border-bottom: 1px solid #ccc; margin-top: 2em; }
h3 { font-size: 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .6em 0; }
th, td { text-align: left; padding: .2em .7em; border-bottom: 1px solid #e4e4e4;
  vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: .7em; overflow-x: auto; font-size: 13px; }
.drawings { display: flex; flex-wrap: wrap; gap: .5em; }
.drawings svg { width: 25em; height: auto; }
img { max-width: 100%; image-rendering: pixelated; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


class Page:
    """Collects what stands on a page, from the top down.

    All texts are taken as they are, and escaped; only what is called `markup` is HTML.
    """

    def __init__(self, title: str):
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str, *, level: int = 2) -> None:
        """A heading; 2 begins a section, 3 a part of one."""
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def paragraph(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def markup(self, text: str) -> None:
        """HTML from a source that escapes by itself."""
        self._parts.append(text)

    def preformatted(self, text: str, *, folded: str = "") -> None:
        """Text in columns; with `folded`, under that title, which opens it."""
        shown = f"<pre>{html.escape(text)}</pre>"
        if folded:
            shown = f"<details><summary>{html.escape(folded)}</summary>{shown}</details>"
        self._parts.append(shown)

    def table(self, rows: Sequence[Mapping[str, Any]], *, colours: Sequence[str] = ()) -> None:
        """A row for each mapping; all have the same keys, the head of the table.

        Args:
          rows: None is an empty cell, a float is shown with 4 digits.
          colours: one for each row, shown before its first cell.
        """
        if not rows:
            return
        lines = ["<tr>" + "".join(f"<th>{html.escape(key)}</th>" for key in rows[0]) + "</tr>"]
        for i, row in enumerate(rows):
            cells = [html.escape(cell(value)) for value in row.values()]
            if colours:
                cells[0] = f'<span class="key" style="background:{colours[i]}"></span>{cells[0]}'
            lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in cells) + "</tr>")
        self._parts.append(f"<table>{''.join(lines)}</table>")

    def drawings(self, drawings: Sequence[str]) -> None:
        """SVG drawings beside each other."""
        self._parts.append(f'<div class="drawings">{"".join(drawings)}</div>')

    def image(self, png: bytes, *, name: str) -> None:
        """A PNG file, held by the page itself."""
        data = base64.b64encode(png).decode()
        self._parts.append(
            f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>'
        )

    def to_html(self) -> str:
        """The whole page."""
        # The policy forbids the page to fetch anything, whatever stands in a text.
        return "\n".join(
            [
                '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
                '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
                "img-src data:; style-src 'unsafe-inline'\">",
                f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style></head><body>",
                *self._parts,
                "</body></html>\n",
            ]
        )


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
