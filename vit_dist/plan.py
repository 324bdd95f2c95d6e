"""What a training would take of a machine, before it is rented: python -m vit_dist.plan.

    python -m vit_dist.plan --config configs/vit_s16_i1k.py --target v5e-8

Prints the memory of each device and the largest batch, the time of a step and of the run and what
it is bound by, the images that the input must make and what this machine's processor makes of them,
sizes of checkpoints, and, where the training does not fit, the flags that make it. Each figure says
whether it is exact, measured here or estimated. No step is run, and no accelerator is needed. Where
the data is not on this machine, --num_examples and --num_classes stand in for it.

    python -m vit_dist.plan --config configs/vit_s16_i1k.py --target v5e-8 --compile

asks a TPU's own compiler besides, which needs no TPU, but an environment of its own and minutes.

Exit codes: 0 it fits, 1 it does not, 2 a mistake that a person has to mend.
"""

import itertools
import json
import math
import os
import time
from typing import Any, NamedTuple

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from vit_dist.config.defaults import finalize, get_defaults
from vit_dist.config.errors import ConfigError, DataError
from vit_dist.costs.compiled import DEFAULT_PYTHON, HOW_TO_INSTALL, Compiler
from vit_dist.costs.targets import EXAMPLES, parse_target
from vit_dist.data.pipeline import make_train_data
from vit_dist.data.sources.cache import FORMS
from vit_dist.data.sources.source import Source
from vit_dist.run.check import check
from vit_dist.run.options import Data, RunOptions
from vit_dist.run.planning import Change, Planner, Row, rows_of
from vit_dist.run.planning_host import host_rows, input_rows
from vit_dist.run.proving import prove, topology_of
from vit_dist.run.sources import check_slice
from vit_dist.storage.files import write_output

DOES_NOT_FIT = 1
# Keys that name other data, other runs, or what is judged on other data.
_FROM_ELSEWHERE = ("evals", "keep_best", "patience", "init_from", "resume_from")
# Images whose files' sizes are averaged.
_SAMPLE = 64
_LONGEST = 600  # seconds that an input may be measured


class Plan(NamedTuple):
    """What `plan` found.

    Attributes:
      rows: all figures.
      fits: whether a device has room for its share.
      need, available: bytes of a device; `available` is inf where the table does not tell.
      changes: ways to make it fit, where it does not.
      compiled: whether the compiler was asked.
      evaluation: the flag with which an evaluation fits that does not; "" where it does.
    """

    rows: list[Row]
    fits: bool
    need: int
    available: float
    changes: list[Change]
    compiled: bool = False
    evaluation: str = ""


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config()
    flags.DEFINE_string("target", None, f"the machine: {EXAMPLES}")
    flags.DEFINE_integer("num_examples", None, "of an epoch, where the data is not here")
    flags.DEFINE_integer("num_classes", None, "of the data, where it is not here")
    flags.DEFINE_float("price", None, "of an hour of the whole machine, in any currency")
    flags.DEFINE_float("input_seconds", 3.0, "how long the input is measured here; 0: not at all")
    flags.DEFINE_integer("host_cores", None, "cores of a host of the target")
    flags.DEFINE_float("network", None, "of each of several hosts of cards, Gbit/s")
    flags.DEFINE_bool("compile", False, "ask the TPU's compiler, which needs no TPU: minutes")
    flags.DEFINE_string("compiler", DEFAULT_PYTHON, "Python of the environment that has it")
    flags.DEFINE_bool("search", False, "with --compile: look for the largest batch that compiles")
    flags.DEFINE_string("json", "", "file that gets all figures, too")


def main() -> int:
    """The command; returns its exit code."""
    given = flags.FLAGS
    if not given.target:
        raise ConfigError(f"give the machine to plan for: --target such as {EXAMPLES}")
    for name in ("search", "compiler"):
        if flags.FLAGS[name].present and not given.compile:
            raise ConfigError(f"--{name} goes with --compile: add that, or leave it out")
    compiler = Compiler(given.compiler) if given.compile else None
    if given.input_seconds:
        print(f"the input is measured for {given.input_seconds:g} seconds ...", flush=True)
    found = plan(
        cli.load_config(),
        given.target,
        num_examples=given.num_examples,
        num_classes=given.num_classes,
        price=given.price,
        input_seconds=given.input_seconds,
        host_cores=given.host_cores,
        network=given.network,
        compiler=compiler,
        search=given.search,
    )
    show(found, title=given.target)
    if given.json:
        write_output(given.json, (json.dumps(as_json(found), indent=2) + "\n").encode())
    return 0 if found.fits else DOES_NOT_FIT


def plan(
    config: ConfigDict,
    target: str,
    *,
    num_examples: int | None = None,
    num_classes: int | None = None,
    price: float | None = None,
    input_seconds: float = 0.0,
    host_cores: int | None = None,
    network: float | None = None,
    compiler: Compiler | None = None,
    search: bool = False,
) -> Plan:
    """Plans a training; touches no accelerator.

    Args:
      config: see config.get_defaults.
      target: name of a machine, see costs.targets.parse_target.
      num_examples, num_classes: stand in for the data; made-up images take its place.
      price: of an hour of the whole machine.
      input_seconds: how long to measure the input on this machine; 0 for not at all.
      host_cores: of a host of the target, which the input may need more than.
      network: of each of several hosts of cards, to the others, Gbit/s.
      compiler: compiles step and evaluation for the target, and says so; None for estimates alone.
      search: whether the largest batch that compiles is looked for.

    Raises:
      ConfigError: a mistake in the config or an argument, an unknown target, or a batch that cannot
        be divided among its devices.
      DataError: the data is not here, and its size was not given.
    """
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price must be a number from 0 on, got {price}")
    if not 0 <= input_seconds <= _LONGEST:
        raise ConfigError(f"--input_seconds must be from 0 to {_LONGEST}, got {input_seconds}")
    if host_cores is not None and host_cores < 1:
        raise ConfigError(f"--host_cores must be 1 or more, got {host_cores}")
    options, data = _check(config, num_examples, num_classes)
    machine = parse_target(target, options.monitor.devices, network=network)
    if compiler is not None:
        # Before the input is measured: a target that no compiler knows is told at once.
        topology_of(machine)
    source, section = data.sources["train"], finalize(config).input
    if machine.is_slice:
        check_slice({"train": source}, section, cached=section.cache != "off")
        check_slice({k: v for k, v in data.sources.items() if k != "train"}, section)
    planner = Planner(options, source.num_examples, machine)
    rows = rows_of(planner, price=price)
    rows += host_rows(
        planner,
        source,
        cache=section.cache,
        cache_dir=section.cache_dir,
        image_bytes=_mean_bytes(source),
        host_cores=host_cores,
        made_up=num_examples is not None,
    )
    if input_seconds:
        rows += input_rows(
            planner,
            images_per_second=_measure_input(source, options, input_seconds),
            cache=section.cache,
            host_cores=host_cores,
        )
    if compiler is None:
        changes = [] if planner.fits else planner.changes()
        return Plan(rows, planner.fits, planner.need(), planner.available, changes)
    # Made-up images stand for those of all splits.
    made_up = [] if num_examples is None else ["train"]
    judged = [split for split in ("val", "test", *made_up) if split in data.sources]
    evaluated = data.sources[judged[0]] if judged else None
    proof = prove(planner, data, compiler, evaluated=evaluated, search=search)
    rows += proof.rows
    _, fits, need, available, changes, evaluation = proof
    return Plan(rows, fits, need, available, changes, compiled=True, evaluation=evaluation)


def _check(
    config: ConfigDict, num_examples: int | None, num_classes: int | None
) -> tuple[RunOptions, Data]:
    """Checks the config, with made-up images for its data if that is not here."""
    if num_examples is None and num_classes is None:
        try:
            return check(_without_cache(config))
        except DataError as error:
            raise DataError(
                f"{error}\nTo plan without the data, give its size: "
                "--num_examples=1281167 --num_classes=1000"
            ) from None
    for flag, value, least in (("num_examples", num_examples, 1), ("num_classes", num_classes, 2)):
        if value is None or value < least:
            raise ConfigError(
                f"--num_examples and --num_classes go together: --{flag} must be {least} or more, "
                f"got {value}"
            )
    return check(_made_up(config, num_examples, num_classes))


def _without_cache(config: ConfigDict) -> ConfigDict:
    """The config without a cache, for which this machine may have no room, and others have."""
    changed = ConfigDict(finalize(config))
    if changed.input.cache in FORMS:
        changed.input.update({"cache": "off", "cache_dir": ""})
    return finalize(changed)


def _made_up(config: ConfigDict, num_examples: int | None, num_classes: int | None) -> ConfigDict:
    """The config with made-up images in place of all data, and nothing read from other runs."""
    changed = ConfigDict(_without_cache(config))
    changed.data = get_defaults().data
    changed.data.update({"source": "synthetic", "val_split": "", "test_split": ""})
    changed.data.update({"num_examples": num_examples, "num_classes": num_classes})
    changed.input.service = ""
    defaults = get_defaults()
    changed.update({key: defaults[key] for key in _FROM_ELSEWHERE})
    return finalize(changed)


def _measure_input(source: Source, options: RunOptions, seconds: float) -> float:
    """Images per second of the training's input on this machine, on all its cores."""
    size = min(options.input.batch_size, _SAMPLE)
    batches = iter(
        make_train_data(
            source,
            options.input.pipe,
            batch_size=size,
            seed=options.seed,
            num_threads=options.input.num_threads,
        )
    )
    # The first batch is late: what makes it starts only now.
    next(batches)
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        next(batches)
        count += 1
    return count * size / spent


def _mean_bytes(source: Source) -> float | None:
    """Of a stored image, on average over a sample; None where they are arrays, or a stream."""
    if not (source.encoded and source.indexable):
        return None
    picked = np.unique(np.linspace(0, source.num_examples - 1, _SAMPLE).astype(int))
    return float(np.mean([len(source.load(int(i))[0]) for i in picked]))


def show(found: Plan, *, title: str) -> None:
    """Prints the figures by section, and whether it fits."""
    table = Table(title=title)
    for column in ("", "figure", "value", "unit", "how", "note"):
        # Folded rather than cut: two figures may differ in their last word.
        table.add_column(column, justify="right" if column == "value" else "left", overflow="fold")
    for section, rows in itertools.groupby(found.rows, key=lambda row: row.section):
        table.add_section()
        for i, row in enumerate(rows):
            first = "" if i else section
            table.add_row(first, row.name, _text(row.value), row.unit, row.how, row.note)
    Console().print(table)
    there = f"{found.available / 1e9:.2f} GB" if found.available != math.inf else "an unknown size"
    need = f"{found.need / 1e9:.2f} GB of {there} on each device"
    print(f"it fits: {need}" if found.fits else f"IT DOES NOT FIT: {need}")
    for change in found.changes:
        gigabytes = change.need / 1e9
        print(f"  {gigabytes:.2f} GB, {change.flops:.2f} x the operations: {change.flags}")
    if found.evaluation:
        print(f"  an evaluation has no room in the training: {found.evaluation}")
    elif not found.fits and not found.changes:
        print("  nothing that keeps the global batch makes it fit: take more or larger devices, a")
        print("  smaller --config.input.batch_size, --config.image_size or --config.model.variant")
    if found.compiled:
        print("Nothing ran on that machine: see docs/plan.md on what was compiled.")
        return
    print("Nothing was compiled, and nothing ran on that machine: see docs/plan.md on estimates.")
    if os.path.exists(DEFAULT_PYTHON):
        print("For TPUs --compile asks their compiler, which is installed here.")
    else:
        print(f"For TPUs --compile asks their compiler. {HOW_TO_INSTALL} as --compiler.")


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def as_json(found: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "fits": found.fits,
        "compiled": found.compiled,
        "evaluation": found.evaluation,
        "bytes_needed": found.need,
        "bytes_available": None if found.available == math.inf else found.available,
        "figures": [row._asdict() for row in found.rows],
        "changes": [
            {"flags": x.flags, "bytes": x.need, "operations": x.flops} for x in found.changes
        ],
    }


def script() -> None:
    """The program vit-dist-plan: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
