"""Commands that documents show."""

import re
import shlex


def commands_of(text: str) -> list[list[str]]:
    """The words of each command in the indented or fenced blocks of a text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    fenced = "\n".join(code for language, code in blocks if not language)
    indented = "\n".join(re.findall(r"^    (.*)$", text, re.M)) if not fenced else ""
    lines = re.sub(r"\\\n\s*", " ", fenced or indented).splitlines()
    lines = [line for line in lines if line.startswith(("python -m vit_dist.", "launch/"))]
    return [shlex.split(line, comments=True) for line in lines if "--config FILE" not in line]


def python_blocks(text: str) -> dict[str, str]:
    """The fenced blocks of Python of a page: name (or number) -> code."""
    blocks = re.findall(r"^```python ?(\S*)\n(.*?)^```$", text, re.M | re.S)
    return {name or str(i): code for i, (name, code) in enumerate(blocks)}
