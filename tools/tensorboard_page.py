"""Opens a real TensorBoard in a headless Chromium: looks at its pages, and photographs them.

    python -m tools.tensorboard_page runs/demo            says what the pages of a log folder show
    python -m tools.tensorboard_page runs/demo --write    after `make demo`: docs/tensorboard.png

Wants chromium or google-chrome. The folder's path stands in the picture as it is given.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tools.browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "tensorboard.png"

# Tab -> what it shows, as a CSS selector. Time series are Angular's, the other tabs Polymer's.
PAGES = {
    "timeseries": "scalar-card, image-card",
    "scalars": "tf-scalar-card",
    "images": "tf-image-loader",
    "text": "tf-text-loader",
    "hparams": "tf-hparams-table-view",
}
# Pages are trees within trees: elements have shadow roots, where querySelectorAll does not look.
_SCRIPT = """(() => {
  const found = [], words = [], images = [], UNSEEN = ['SCRIPT', 'STYLE', 'NOSCRIPT', 'HEAD'];
  const walk = root => {
    for (const child of root.childNodes) {
      if (child.nodeType === 3) words.push(child.textContent.trim());
      if (child.nodeType !== 1 || UNSEEN.includes(child.tagName)) continue;
      if (child.matches(SELECTOR)) found.push(child);
      if (child.tagName === 'IMG') images.push(child);
      walk(child);
      if (child.shadowRoot) walk(child.shadowRoot);
    }
  };
  walk(document);
  return {
    shown: found.length,
    words: words.filter(w => w).join('\\n'),
    images: images.filter(i => i.complete && i.naturalWidth > 1).length,
  };
})()"""

# Clicks on the box of a name in the list of HParams.
_CLICK = """(() => {
  const walk = root => {
    for (const child of root.querySelectorAll('*')) {
      if (/CHECKBOX/.test(child.tagName) && child.textContent.trim() === NAME) child.click();
      if (child.shadowRoot) walk(child.shadowRoot);
    }
  };
  walk(document);
})()"""
WIDTH = 1100  # pixels of a part of the picture


@contextlib.contextmanager
def serve(folder: str) -> Iterator[str]:
    """Runs TensorBoard on a log folder as a process of its own; yields its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", "--port=0"]
    with subprocess.Popen(
        [*command, f"--logdir={folder}"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None, "it was asked for"
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"TensorBoard \S+ at (http\S+)", line):
                    break
            else:
                raise RuntimeError(f"TensorBoard did not start: {''.join(said[-5:])}")
            yield found[1]
        finally:
            process.kill()


def open_tab(browser: Browser, url: str, tab: str, *, filter: str = "") -> None:
    """Goes to a tab of TensorBoard, with a regular expression for the tags to show."""
    # By way of an empty page: an address that differs only behind # would not load anew.
    browser.open("about:blank")
    browser.open(f"{url}#{tab}" + (f"&tagFilter={filter}" if filter else ""))


def look(
    browser: Browser, tab: str, *words: str, images: int = 0, seconds: float = 60.0
) -> dict[str, Any]:
    """Waits until the tab shows something, so many pictures and the words, and changes no more.

    Returns:
      "shown", how many of the selector in PAGES; "images", how many pictures; "words", all text.

    Raises:
      TimeoutError: that did not come.
    """
    script = _SCRIPT.replace("SELECTOR", json.dumps(PAGES[tab]))
    wanted = json.dumps(words)
    # `before` is what the last look saw: charts and pictures come one after the other.
    browser.wait_for(
        f"""(now => {{
          const same = JSON.stringify(now) === window.before;
          window.before = JSON.stringify(now);
          return same && now.shown && now.images >= {images}
            && {wanted}.every(w => now.words.includes(w));
        }})({script})""",
        seconds=seconds,
        pause=1.0,
    )
    return browser.ask(script)


# Name of a part of the picture -> tab, tags, least number of pictures, what is cut off on the left.
_PARTS = (
    ("scalars", "train/loss|val/accuracy$|speed/mfu|speed/examples_per_second$", 0, 0),
    ("hparams", "", 0, 285),
    ("images", "figures/(filters|positions|distances|attention)", 4, 0),
    ("images", "train/batch|val/(worst|conf)", 4, 0),
)
_HEIGHTS = (740, 740, 1740, 1740)  # pixels of each part
# HParams shows what runs differ in. The folder that a run began with says nothing to a reader.
_HIDDEN = "init_from"


def photograph(browser: Browser, url: str) -> Image.Image:
    """Four parts of TensorBoard after the demo, as one picture."""
    parts = []
    for (tab, filter, images, left), height in zip(_PARTS, _HEIGHTS, strict=True):
        browser.resize((WIDTH + left, height))
        open_tab(browser, url, tab, filter=filter)
        look(browser, tab, "pretrain", "finetune", images=images)
        if tab == "hparams":
            browser.ask(_CLICK.replace("NAME", json.dumps(_HIDDEN)))
            look(browser, tab)
        part = Image.open(io.BytesIO(browser.photograph())).convert("RGB")
        parts.append(part.crop((left, 0, *part.size)))
    sheet = Image.new("RGB", (2 * WIDTH, _HEIGHTS[0] + _HEIGHTS[2]), "white")
    for i, part in enumerate(parts):
        sheet.paste(part, (i % 2 * WIDTH, i // 2 * _HEIGHTS[0]))
    # A palette is a third of the bytes; readers see it at half its size or less.
    return sheet.reduce(2).quantize(192)


def main() -> int:
    """The command; returns its exit code: 1 where a page is empty or says an error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="log folder, such as runs/demo")
    parser.add_argument("--write", action="store_true", help=f"write {PICTURE.relative_to(ROOT)}")
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        print("there is no chromium or google-chrome here", file=sys.stderr)
        return 1
    with serve(options.folder) as url, Browser(program) as browser:
        for tab in PAGES:
            open_tab(browser, url, tab)
            found = look(browser, tab, images=int(tab == "images"))
            print(f"{tab}: {found['shown']} of {PAGES[tab]}, {found['images']} images")
        if options.write:
            photograph(browser, url).save(PICTURE, optimize=True)
        for error in browser.errors:
            print(f"error: {error}", file=sys.stderr)
        return 1 if browser.errors else 0


if __name__ == "__main__":
    sys.exit(main())
