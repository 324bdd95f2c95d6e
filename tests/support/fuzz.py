"""Command lines and config files that a tired user might write, made from the defaults."""

import contextlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.support import processes
from vit_dist.config.defaults import DEFAULTS, _Key

ANYTHING = [
    *("", "x", "é", "a b", "None", "True", "0", "-1", "1", "2.5", "1e999", "nan", "-inf", "1_0"),
    *("99999999999999999999", "0x10", "[]", "()", "(1,", "(1, 2)", "{", "{'a': 1}", "'x'", "'"),
    *(
        "(",
        "[a-",
        "|",
        "a|b",
        "a(",
        "a(1)|",
        "~",
        "~/x",
        "/nowhere/x",
        "../..",
        ".",
        "*",
        "\\",
        "%",
    ),
    *("{split}", "{", "s3://b/x", "ftp://b/x", "http://x", "file.py:x", "👍", "a" * 300, "a/b/c"),
]
# What a config file might assign to a key.
OBJECTS = [
    *("None", "True", "0", "-1", "3", "2.5", "float('nan')", "float('inf')", "10**30", "''", "'x'"),
    *("()", "[]", "[1, 'a']", "(1, 2)", "{}", "{'a': 1}", "{1: 2}", "object()", "b'x'", "len", "c"),
    *("('(', 1.0)", "(('(', 1.0),)", "(('a', 'b'),)", "[{'source': 'demo'}]", "({'weight': 1},)"),
    *("lambda: 0", "int", "1j", "range(3)", "{'source', 1}", "'demo'", "Ellipsis"),
]
STATEMENTS = [
    *("    return", "    return 3", "    return {}", "    return get_defaults", "    c = None"),
    *(
        "    raise KeyError('no')",
        "    raise SystemExit(3)",
        "    c.unlock(); c.odd = 1",
        "    1 +",
    ),
    *(
        "    del c.seed",
        "    c.unlock(); del c.model.width",
        "    c.model = None",
        "    c.nope.x = 1",
    ),
    *(
        "    c.input = {}",
        "    c.data = get_defaults()",
        "    c.step.update({'jit': 3})",
        "\tx = 1",
    ),
    *("    import nowhere", "    assert False", "    open('nowhere')", "    c.model.widht = 3"),
    *("    c.update(get_defaults().model)", "    return c, 1", "    yield c", "    c.lock()"),
]
FLAGS = {
    "train": ("workdir",),
    "evaluate": ("checkpoint", "splits"),
    "predict": ("checkpoint", "images", "top", "image"),
    "export": (
        *("checkpoint", "format", "output", "image_size", "save_dtype", "num_heads", "gelu"),
        *("mean", "std", "ignore", "value_range"),
    ),
    "convert": ("output", "splits", "examples_per_shard", "short_side", "quality", "format"),
    "show": ("output", "split", "step", "count"),
}


class Case(NamedTuple):
    """One command: its module's name, its arguments, and the config file that it may name."""

    module: str
    arguments: list[str]
    file: str


def leaves(section=DEFAULTS, prefix=""):
    """(dotted name, default or _Key) of every key of the config."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


LEAVES = list(leaves())


def make_cases(count: int, seed: int = 0) -> list[Case]:
    """The same cases for the same seed. BASE and FOLDER stand for a good config and a folder."""
    draw = random.Random(seed)
    return [_case(draw) for _ in range(count)]


def _case(draw: random.Random) -> Case:
    module = draw.choices(list(FLAGS), [12, 1, 1, 1, 1, 1])[0]
    arguments, file = [], ""
    if draw.random() < 0.3 and module != "predict":
        file = _file(draw)
        arguments.append("--config=FOLDER/config.py")
    elif draw.random() < 0.95:
        arguments.append(draw.choice(["--config=BASE"] * 8 + ["--config=BASE:x", "--config=."]))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3]) if not file else draw.choice([0, 0, 1])):
        name, key = draw.choice(LEAVES)
        arguments.append(f"--config.{_misspelt(draw, name)}={_value(draw, key)}")
    for name in FLAGS[module]:
        if module == "train" and draw.random() < 0.95:
            arguments.append(f"--{name}=FOLDER/run")
        elif draw.random() < 0.5:
            value = draw.choice([*ANYTHING, "FOLDER", "FOLDER/run", "FOLDER/out", "npz", "train"])
            arguments.append(f"--{_misspelt(draw, name)}={value}")
    if draw.random() < 0.1:
        arguments.insert(
            draw.randrange(len(arguments) + 1),
            draw.choice(
                ["x", "--", "-", "--seed=1", "-c", "--config", "--config.seed", "=", "---x"]
            ),
        )
    return Case(module, arguments, file)


def _misspelt(draw: random.Random, name: str) -> str:
    if draw.random() < 0.95:
        return name
    at = draw.randrange(len(name))
    return name[:at] + draw.choice(["", "x", ".", "_"]) + name[at + 1 :]


def _value(draw: random.Random, key: object) -> str:
    """In the key's range half of the time, at or beyond its ends or of another type otherwise."""
    default = key.default if isinstance(key, _Key) else key
    interval = key.range if isinstance(key, _Key) else ""
    if interval and draw.random() < 0.7:
        low, high = (float(end) for end in interval[1:-1].split(", "))
        low = max(low, -5.0)
        high = min(high, low + 50)
        number = draw.choice([low, high, low - 1, high + 1, draw.uniform(low, high)])
        return str(int(number) if key.type is int else number)
    if draw.random() < 0.4:
        return str(default)
    if isinstance(default, str) and default and draw.random() < 0.5:
        at = draw.randrange(len(default))  # one letter less, or one twice
        return draw.choice(
            [default[:at] + default[at + 1 :], default[:at] + default[at] + default[at:]]
        )
    return draw.choice(ANYTHING)


def _file(draw: random.Random) -> str:
    lines = ["from tests.support.tiny import get_config as get_defaults"]
    lines.append(draw.choice(["def get_config():"] * 19 + ["def get_confg():"]))
    lines.append("    c = get_defaults()")
    for _ in range(draw.choice([0, 1, 1, 2])):
        name, _ = draw.choice(LEAVES)
        lines.append(f"    c.{name} = {draw.choice(OBJECTS)}")
    if draw.random() < 0.5:
        lines.append(draw.choice(STATEMENTS))
    return "\n".join([*lines, "    return c", ""])


class _Checked(BaseException):
    """The command got past its checks: it would now meet the other hosts and train."""


def run_cases(
    numbered: list[tuple[int, Case]], folder: str, results: str, limit: int, train: bool
) -> None:
    """Runs each case in a fork of this process, for `processes.call`; a row of JSON for each.

    Unless `train` is set, training ends where it would begin, for it takes seconds: what is asked
    is what a command makes of its input.
    """
    if not train:
        sys.modules["vit_dist.train"].meet = _stop
    with open(results, "w") as file:
        for number, case in numbered:
            home = Path(folder) / str(number)
            home.mkdir()
            (home / "config.py").write_text(case.file)
            child = os.fork()
            if not child:
                _be(case, home, limit)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            text = (home / "log").read_text(errors="replace")
            file.write(json.dumps([number, code, text]) + "\n")


def _be(case: Case, home: Path, limit: int) -> None:
    """Becomes the command; never returns. It ends itself with SIGALRM after `limit` seconds."""
    code = 99
    try:
        processes._print_into(str(home / "log"), str(home / "log"))
        os.chdir(home)
        signal.alarm(limit)
        stand_for = {"BASE": processes.TINY, "FOLDER": str(home)}
        words = [_fill(word, stand_for) for word in case.arguments]
        code = 0
        with contextlib.suppress(_Checked):
            processes.main(f"vit_dist.{case.module}", *words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stop(*args: object, **options: object) -> None:
    raise _Checked


def _fill(word: str, stand_for: dict[str, str]) -> str:
    for name, value in stand_for.items():
        word = word.replace(name, value)
    return word
