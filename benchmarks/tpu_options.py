"""What each option does to a training step on a TPU v5e: memory, bytes, cycles, against bounds.

    make test-tpu-compile   or   .venv/bin/python benchmarks/tpu_options.py [--only NAME ...]

Each row of ROWS is a step that libtpu's compiler turns into a TPU program, on a machine without a
TPU (see tpu_compile.py). A row's bounds say what the option is there for: one that is meant to save
memory and does not is a failure, and so is a figure that is not the one in docs/tpu_options.md
any more. --write writes that page. A compilation takes a minute or more, so its figures are kept by
a hash of the program and of the compiler's version, in the cache of `python -m vit_dist.plan`.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _smoke
from _tpu_step import TOPOLOGY, Compiler, Setting, compile_step, export_step, open_compiler

from vit_dist.costs.compiled import DEFAULT_PYTHON

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tpu_options.md"
BEGIN = "<!-- the table begins: written by benchmarks/tpu_options.py -->\n"
END = "<!-- the table ends -->"
# How far a figure may be from the page's. The compiler's choices move by a little with small
# changes of the program.
TOLERANCE = 0.03
COLUMNS = {
    "temp": ("Temp MB", 1e6, ".0f"),
    "arguments": ("Arguments MB", 1e6, ".0f"),
    "accessed": ("Accessed GB", 1e9, ".2f"),
    "offchip": ("Off-chip GB", 1e9, ".2f"),
    "cycles": ("Million cycles", 1e6, ".2f"),
    "flops": ("GFLOP", 1e9, ".0f"),
}
# Those that the table compares with another row's.
COMPARED = ("temp", "offchip", "cycles", "flops")
SMOKE = {"only": ["plain", "remat full"], "depth": 1, "batch_size": 2}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: what the step has that the one of `base` does not, as in the config.
      setting: the step.
      bounds: figure -> the largest that it may be, over that of `base`.
      base: the name of the row that it is compared with; its own for none.
    """

    name: str
    setting: Setting
    bounds: Mapping[str, float]
    base: str = "plain"


# What big_vision's step has, and all rows but those of the float32 softmax: its dtype is bfloat16.
SOFTMAX = {"softmax": "compute"}


def row(
    name: str,
    bounds: Mapping[str, float],
    *,
    base: str = "plain",
    model: Mapping[str, Any] | None = None,
    **setting: Any,
) -> Row:
    return Row(name, Setting(model={**SOFTMAX, **(model or {})}, **setting), bounds, base)


def rows() -> list[Row]:
    """The table: each option alone, and the combinations that belong together."""

    def model(**options: Any) -> dict[str, Any]:
        return {"model": options}

    def shallow(**options: Any) -> dict[str, Any]:
        return model(depth=2, **options)  # compiles sooner than twelve

    def optimizer(**options: Any) -> dict[str, Any]:
        return {"optimizer": options}

    def blocks_of_keys(pixels: int, batch_size: int) -> list[Row]:
        name = f"{pixels} px, 2 blocks"
        setting: dict[str, Any] = {"image_size": pixels, "batch_size": batch_size}
        return [
            row(name, {}, base=name, **shallow(), **setting),
            row(
                f"{name}, attention_block 256",
                {"temp": 0.9, "offchip": 0.5} if pixels >= 768 else {},
                base=name,
                **shallow(attention_block=256),
                **setting,
            ),
        ]

    return [
        row("plain", {"temp": 1}),
        # Meant to save memory.
        row("remat full", {"temp": 0.3, "offchip": 0.4, "cycles": 1.3}, **model(remat="full")),
        row("remat attention_mlp", {"temp": 0.65}, **model(remat="attention_mlp")),
        row("remat attention", {"temp": 0.9}, **model(remat="attention")),
        row("accumulation 4", {"temp": 0.4}, accumulation=4),
        row("momentum_dtype bfloat16", {"arguments": 0.9}, **optimizer(momentum_dtype="bfloat16")),
        # Meant to cost little.
        row("dropout 0.1", {"temp": 1.2, "cycles": 1.15}, **model(dropout=0.1)),
        row("attention_dropout 0.1", {"temp": 1.35, "cycles": 1.6}, **model(attention_dropout=0.1)),
        row("dropout 0.1, remat full", {"temp": 0.35}, **model(dropout=0.1, remat="full")),
        row("drop_path 0.1", {"temp": 1.05, "accessed": 1.05}, **model(drop_path=0.1)),
        row("ema_decay", {"temp": 1.02, "cycles": 1.05, "arguments": 1.4}, ema=True),
        row("mixup_alpha 0.2", {"temp": 1.05, "accessed": 1.05}, mixing={"mixup_alpha": 0.2}),
        # Many tokens: from where on blocks of keys pay.
        row("attention_block 64", {}, **model(attention_block=64)),
        *blocks_of_keys(384, 8),
        *blocks_of_keys(512, 4),
        *blocks_of_keys(768, 2),
        # What does not grow with the depth, or grows as the blocks do.
        row("2 blocks", {}, base="2 blocks", **shallow()),
        row("2 blocks, registers 4", {"accessed": 1.2}, base="2 blocks", **shallow(registers=4)),
        row("2 blocks, pool tok", {"accessed": 1.2}, base="2 blocks", **shallow(pool="tok")),
        row("2 blocks, pool map", {"accessed": 1.3}, base="2 blocks", **shallow(pool="map")),
        row("2 blocks, float16", {}, base="2 blocks", precision="float16", **shallow()),
        # Optimizers, in place of AdamW.
        *(
            row(
                f"2 blocks, {name}",
                bounds,
                base="2 blocks",
                **shallow(),
                **optimizer(name=name),
            )
            for name, bounds in (
                ("sgd", {"temp": 1.05, "arguments": 0.8}),
                ("lamb", {"temp": 1.1, "accessed": 1.1}),
                ("lion", {"temp": 1.05, "arguments": 0.8}),
                ("adafactor", {"temp": 1.1, "arguments": 0.6}),
                ("adafactor_vit", {"temp": 1.15, "arguments": 0.8}),
                ("muon", {"temp": 1.2, "arguments": 0.85}),
            )
        ),
    ]


def measure(chosen: list[Row], compiler: Compiler, topology: str) -> dict[str, dict[str, float]]:
    """Name of a row -> its figures, from the cache or the compiler; says how far it is."""
    found = {}
    for number, one in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {one.name}", end=": ", flush=True)
        step, _ = export_step(one.setting)
        found[one.name] = dataclasses.asdict(compile_step(compiler, step, topology))
        told = [
            f"{head} {found[one.name][key] / unit:{form}}"
            for key, (head, unit, form) in COLUMNS.items()
        ]
        print(f"{', '.join(told)} (compiled in {found[one.name]['seconds']:.0f} s)", flush=True)
    return found


def table(chosen: list[Row], found: Mapping[str, Mapping[str, float]]) -> str:
    """The table of the page, in Markdown."""
    heads = [head for head, *_ in COLUMNS.values()]
    lines = [
        f"| Step | {' | '.join(heads)} | Over its base: {', '.join(COMPARED)} | Bounds |",
        "|---|" + "---|" * (len(heads) + 2),
    ]
    for one in chosen:
        figures, base = found[one.name], found[one.base]
        cells = [f"{figures[key] / unit:{form}}" for key, (_, unit, form) in COLUMNS.items()]
        # A processor's compiler tells neither bytes off the chip nor cycles.
        ratios = [f"{figures[key] / base[key]:.2f}" if base[key] else "-" for key in COMPARED]
        bounds = ", ".join(f"{key} {limit:g}" for key, limit in one.bounds.items())
        lines.append(f"| {one.name} | {' | '.join(cells)} | {', '.join(ratios)} | {bounds} |")
    return "\n".join(lines) + "\n"


def failures(
    chosen: list[Row], found: Mapping[str, Mapping[str, float]], page: Mapping[str, list[str]]
) -> list[str]:
    """What is above its bound, or no longer what the page says."""
    out = []
    for one in chosen:
        figures, base = found[one.name], found[one.base]
        for key, limit in one.bounds.items():
            ratio = figures[key] / base[key]
            if ratio > limit:
                out.append(
                    f"{one.name}: {key} is {ratio:.2f} times that of {one.base}, over {limit}"
                )
        if one.name not in page:
            out.append(f"{one.name}: not in {PAGE.name}; --write writes it")
            continue
        for (key, (head, unit, _)), cell in zip(COLUMNS.items(), page[one.name], strict=False):
            # The page rounds: by up to half of its last digit.
            rounded = 0.5 * 10.0 ** -len(cell.partition(".")[2])
            if abs(figures[key] / unit - float(cell)) > TOLERANCE * float(cell) + rounded:
                out.append(
                    f"{one.name}: {head} {figures[key] / unit:.2f}, and {cell} in {PAGE.name}; "
                    "--write writes it anew"
                )
    return out


def read_page() -> dict[str, list[str]]:
    """Name of a row -> its cells, as the page has them."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [re.split(r" *\| *", x.strip("| ")) for x in text.splitlines()[2:] if "|" in x]
    return {name: cells for name, *cells in lines}


def write_page(text: str) -> None:
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(before + begin + text + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of rows; their bases come along")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--depth", type=int, help="blocks of each model, in place of the variant's")
    parser.add_argument("--batch_size", type=int, help="of each step, in place of the row's")
    parser.add_argument("--cache", default="", help="folder of what was compiled before")
    parser.add_argument("--topology", default=TOPOLOGY, help="also v5p:2x2x1, v6e:1x1, ..., cpu")
    parser.add_argument("--python", default=DEFAULT_PYTHON, help="that has JAX, and libtpu")
    args = _smoke.parse(parser, SMOKE, kept=False)
    compiler = open_compiler(args.python, args.cache or None)
    chosen = choose(args.only)
    other = bool(args.depth or args.batch_size or args.topology != TOPOLOGY)
    if args.write and (args.only or other):
        raise SystemExit("--write takes all rows, at their own sizes: leave the other flags out")
    changed = {"batch_size": args.batch_size} if args.batch_size else {}
    depth = {"depth": args.depth} if args.depth else {}
    chosen = [
        dataclasses.replace(
            one,
            setting=dataclasses.replace(
                one.setting, model={**one.setting.model, **depth}, **changed
            ),
        )
        for one in chosen
    ]
    found = measure(chosen, compiler, args.topology)
    text = table(chosen, found)
    print(text, end="", flush=True)
    if args.write:
        write_page(text)
    # The bounds and the page are of the steps at their own sizes, for a v5e.
    wrong = [] if other else failures(chosen, found, read_page())
    if wrong:
        raise SystemExit("\n".join(wrong))


def choose(only: list[str] | None) -> list[Row]:
    known = {one.name: one for one in rows()}
    if only is None:
        return list(known.values())
    unknown = [name for name in only if name not in known]
    if unknown:
        raise SystemExit(f"no row {', '.join(map(repr, unknown))}; there are: {', '.join(known)}")
    bases = {known[name].base for name in only}
    return [one for one in known.values() if one.name in {*only, *bases}]


if __name__ == "__main__":
    sys.exit(main())
