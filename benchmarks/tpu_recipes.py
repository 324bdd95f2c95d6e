"""What each published recipe takes of a chip of a v5e-8 or v5p-8, compiled without one.

    .venv/bin/python benchmarks/tpu_recipes.py [--target v5p-8] [--only NAME ...] [--write]

`python -m vit_dist.plan --compile` traces the step and the evaluation of each recipe at full depth,
in bfloat16, and libtpu's compiler makes programs of them: minutes each, less where its cache has
them. --write writes the table into docs/tpu.md. It fails where a recipe does not fit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import _smoke

from vit_dist.costs.compiled import CLOCKS, DEFAULT_PYTHON
from vit_dist.costs.targets import parse_target

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tpu.md"
# Of both kinds one host has all chips: eight, and four of two TensorCores.
TARGETS = ("v5e-8", "v5p-8")
BEGIN = "<!-- the table of {} begins: written by benchmarks/tpu_recipes.py -->\n"
END = "<!-- the table ends -->\n"
SMOKE = {"only": ["demo"], "target": "cpu"}


class Recipe(NamedTuple):
    """A config file of configs/, the data that it wants, and what makes it fit into the target.

    Attributes:
      name: the file's name and argument.
      num_examples, num_classes: of the data set, which is not here; None for what is.
      flags: of the config, beside bfloat16.
    """

    name: str
    num_examples: int | None
    num_classes: int | None
    flags: tuple[str, ...] = ()


_IMAGENET = (1_281_167, 1000)
_IMAGENET_21K = (14_197_122, 21_843)
RECIPES = (
    Recipe("vit_s16_i1k:90", *_IMAGENET),
    Recipe("augreg:data=i21k,model=Ti/16", *_IMAGENET_21K),
    Recipe("augreg:data=i21k,model=B/16", *_IMAGENET_21K, ("step.accumulation=4",)),
    Recipe("vit_i21k:L/16", *_IMAGENET_21K, ("step.accumulation=8",)),
    Recipe("finetune_384:imagenet2012", *_IMAGENET, ("step.accumulation=2",)),
    Recipe("deit:S/16", *_IMAGENET),
    Recipe("deit:B/16", *_IMAGENET),
    Recipe("deit3:B/16", *_IMAGENET, ("step.accumulation=4",)),
)
# Needs no data set: what --smoke plans.
_DEMO = Recipe("demo", None, None)
_HEADS = (
    "Recipe",
    "Flags",
    "Images a chip",
    "Memory GB",
    "Temp GB",
    "ms (plan expects)",
    "Images/s of the host",
    "Off-chip GB",
    "TFLOP",
    "Evaluation's temp MB",
)


def plan(recipe: Recipe, target: str, python: str) -> dict:
    """What plan says of the recipe; ends this program where it fails, or does not fit."""
    file, _, argument = recipe.name.partition(":")
    config = f"configs/{file}.py" + (f":{argument}" if argument else "")
    stand_in = {"num_examples": recipe.num_examples, "num_classes": recipe.num_classes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        command = [sys.executable, "-m", "vit_dist.plan", f"--config={config}", f"--json={path}"]
        command += [f"--target={target}", "--input_seconds=0", "--compile", f"--compiler={python}"]
        command += [f"--{key}={value}" for key, value in stand_in.items() if value]
        flags = ("precision=bfloat16", *recipe.flags)
        command += [f"--config.{flag}" for flag in flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{recipe.name}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return json.loads(path.read_text())


def cells(recipe: Recipe, found: dict, target: str) -> list[str]:
    """The recipe's row of the table."""
    figures = {row["name"]: row["value"] for row in found["figures"]}
    # A processor's compiler does not tell what leaves the chip.
    offchip = figures.get("step, bytes off the chip")
    # Where cycles have no known length, the time is the least that bytes and operations take.
    timed = parse_target(target).device.name in CLOCKS
    took = figures.get("step, time") if timed else None
    expected = figures["step, expected"]
    images_per_second = figures["images per second, expected"]
    if took:
        images_per_second *= expected / took
    return [
        f"`{recipe.name}`",
        " ".join(f"`{flag}`" for flag in recipe.flags),
        f"{figures['images of a device']:,}",
        f"{found['bytes_needed'] / 1e9:.1f}",
        f"{figures['step, temp']:.2f}",
        # Of a loop over micro-batches the compiler counts one turn.
        f"{took:.1f} ({expected:.1f})" if took else f"- ({expected:.1f})",
        f"{images_per_second:,.0f}",
        "-" if offchip is None else f"{offchip:.1f}",
        f"{figures['step, operations'] / 1e3:.2f}",
        f"{1e3 * figures['evaluation, temp']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--target", default=TARGETS[0], help="as plan's")
    parser.add_argument("--python", default=DEFAULT_PYTHON, help="that has JAX and libtpu")
    args = _smoke.parse(parser, SMOKE, kept=False)
    if args.write and (args.only or args.target not in TARGETS):
        parser.error(f"--write takes all recipes, for {' or '.join(TARGETS)}: leave --only out")
    known = {recipe.name: recipe for recipe in (*RECIPES, _DEMO)}
    unknown = [name for name in args.only or () if name not in known]
    if unknown:
        parser.error(f"no recipe {', '.join(unknown)}; there are: {', '.join(known)}")
    chosen = [known[name] for name in args.only] if args.only else RECIPES
    lines = [f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|"]
    print("\n".join(lines), flush=True)
    for number, recipe in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {recipe.name}", file=sys.stderr, flush=True)
        found = plan(recipe, args.target, args.python)
        lines.append(f"| {' | '.join(cells(recipe, found, args.target))} |")
        print(lines[-1], flush=True)
    if args.write:
        before, begin, rest = PAGE.read_text().partition(BEGIN.format(args.target))
        _, end, after = rest.partition(END)
        PAGE.write_text(before + begin + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    main()
