"""Runs a notebook's code cells in this process and stores their outputs; needs no Jupyter.

    .venv/bin/python tools/run_notebook.py docs/walkthrough.ipynb [OUTPUT]

Outputs are what the cells print and show. Files that cells write go into the current folder. If no
OUTPUT is given, the notebook itself is rewritten with the outputs.
"""

import ast
import base64
import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image


def main() -> int:
    """The command; returns its exit code."""
    source, *rest = map(Path, sys.argv[1:])
    notebook, began = json.loads(source.read_text()), time.monotonic()
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    # All cells share one namespace, as in a notebook.
    names: dict[str, Any] = {"__name__": "__main__"}
    for count, cell in enumerate(cells, start=1):
        cell["outputs"], cell["execution_count"] = run("".join(cell["source"]), names, count), count
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    (rest[0] if rest else source).write_text(text + "\n")
    print(f"{len(cells)} cells, {time.monotonic() - began:.0f} seconds")
    return 0


def run(code: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Runs a cell in the namespace `names`; returns its outputs as notebooks store them."""
    body = ast.parse(code).body
    # As in a notebook, the value of a last line that is an expression is shown.
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), f"cell {count}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        shown = {"data": as_mime(value), "execution_count": count, "metadata": {}}
        outputs.append({**shown, "output_type": "execute_result"})
    return outputs


def as_mime(value: Any) -> dict[str, Any]:
    """MIME type -> content: an image as PNG, anything else as its text."""
    if not isinstance(value, Image.Image):
        return {"text/plain": repr(value)}
    buffer = io.BytesIO()
    value.save(buffer, format="PNG")
    text = f"<{value.width} x {value.height} pixels>"
    return {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": text}


if __name__ == "__main__":
    sys.exit(main())
