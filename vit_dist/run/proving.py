"""A plan proved: the programs of a training, compiled for the target by its own compiler.

The estimate comes first and says what is worth compiling, because a program takes seconds to
minutes. What is refused is answered with flags that make it fit, and these are compiled, too. How
much more than estimated a program took corrects the estimates of what is compiled next.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from vit_dist.config.errors import ConfigError
from vit_dist.costs.compiled import CLOCKS, TOPOLOGIES, Compiled, Compiler, TooLarge
from vit_dist.costs.targets import Target
from vit_dist.data.sources.source import Source
from vit_dist.run.input import eval_batch_size
from vit_dist.run.lowering import Lowered, lower_evaluation, lower_step
from vit_dist.run.options import Data
from vit_dist.run.planning import Change, Choice, Planner, Row, with_choice

# Estimates are high by up to a fifth. What is estimated at more than this many times the memory is
# not worth the minutes, and host memory, of a compilation.
_HOPELESS = 1.5
# Programs that are compiled at most for suggestions, and in a search.
_SUGGESTIONS, _SEARCHED = 3, 6
# A search aims at this share of a device's memory, goes upwards by at least the stride, and ends
# when the batches that fit and do not are so close.
_AIM, _STRIDE, _CLOSE = 0.97, 1.25, 1.1
# By how much the estimate is raised where what it suggests was refused.
_MOVE = 1.05

# A program's answer, and for a compiled one the bytes that a device needs with what lies beside it.
Answer = Compiled | TooLarge


class Proof(NamedTuple):
    """What the compiler said.

    Attributes:
      rows: its figures.
      fits: whether step and evaluation have room.
      need: bytes of a device; as estimated where the step was not compiled.
      available: bytes of a device.
      changes: ways to make the step fit, where it does not; those that come first were compiled, as
        far as the rows say so.
      evaluation: the flag with which an evaluation fits that does not; "" where it does.
    """

    rows: list[Row]
    fits: bool
    need: int
    available: float
    changes: list[Change]
    evaluation: str


def topology_of(target: Target) -> str:
    """What the compiler calls a chip of the target.

    Raises:
      ConfigError: no compiler is known that would not need the device.
    """
    if target.kind == "CPU":
        return "cpu"
    if target.device.name not in TOPOLOGIES:
        raise ConfigError(
            f"--compile cannot compile for {target.device.name}: without the device at hand there "
            f"are compilers for {', '.join(TOPOLOGIES)}, and for cpu"
        )
    return TOPOLOGIES[target.device.name]


class Prover:
    """Compiles the programs of a planned training.

    Args:
      planner: of the training; its correction is set from what is compiled.
      data: the opened data, of which only shapes and dtypes count.
      compiler: for the target's devices.
      say: told of each compilation, in whole lines.

    Raises:
      ConfigError: no compiler for this target, or state that is divided among devices.
    """

    def __init__(
        self, planner: Planner, data: Data, compiler: Compiler, *, say: Callable[[str], None]
    ):
        self._planner, self._data, self._compiler, self._say = planner, data, compiler, say
        self._topology = topology_of(planner.target)
        if planner.choice.shard_state:
            raise ConfigError(
                "--compile compiles what one device runs by itself; with optimizer.shard_state "
                "devices differ: leave one of the two out"
            )

    def step(self, choice: Choice, share: int) -> Answer:
        """The training step with `share` images of a device; corrects the planner's estimates."""
        planner = self._planner
        batch_size = share * planner.target.num_devices
        options = with_choice(planner.options, choice, batch_size=batch_size)
        expected = planner.memory(choice, batch_size=share)
        found = self._compile(
            f"the step, {share} images a device"
            + (f" in {choice.accumulation} micro-batches" if choice.accumulation > 1 else "")
            + f", estimated {_size(planner.need(choice, batch_size=share))}",
            lambda: lower_step(options, self._data, share=share, kind=planner.target.kind),
        )
        # An early refusal counts temporaries alone, as `temp` does. A late one counts arguments as
        # well, so the correction is on the safe side.
        temp = found.temp if isinstance(found, Compiled) else found.needed
        if temp:
            planner.correction = temp / max(expected.activations, expected.gradients)
        return found

    def evaluation(self, source: Source) -> tuple[Answer, int]:
        """What a device does with a batch of an evaluation, and how many images it has of it."""
        options, target = self._planner.options.evaluation, self._planner.target
        share = eval_batch_size(options, source, target.num_devices) // target.num_devices
        found = self._compile(
            f"the evaluation, {share} images a device",
            lambda: lower_evaluation(options, source, share=share, kind=target.kind),
        )
        return found, share

    def _compile(self, name: str, lower: Callable[[], Lowered]) -> Answer:
        began = time.monotonic()
        self._say(f"{name}: tracing ...")
        program = lower().module()
        before = self._compiler.kept(program, self._topology).exists()
        if not before:
            self._say(
                f"  traced in {time.monotonic() - began:.0f} s; compiling for {self._topology}, "
                "which may take minutes ..."
            )
        found = self._compiler.compile(program, self._topology)
        how = "compiled before" if before else f"compiled for {found.seconds:.0f} s"
        if isinstance(found, TooLarge):
            self._planner.limit = found.limit or math.inf
            self._say(f"  {_refusal(found)} ({how})")
        else:
            self._say(f"  {_size(found.memory)} ({how})")
        return found


def prove(
    planner: Planner,
    data: Data,
    compiler: Compiler,
    *,
    evaluated: Source | None,
    search: bool = False,
    say: Callable[[str], None] = print,
) -> Proof:
    """Compiles a training's step and evaluation; where the step does not fit, what makes it fit.

    Args:
      planner: of the training.
      data: opened.
      compiler: see costs.compiled.
      evaluated: a split that is judged; None if there is none.
      search: whether the largest batch of a device is looked for.
      say: told of each compilation.

    Raises:
      ConfigError: nothing can be compiled for this target, see Prover.
      UserError: the compiler broke.
    """
    prover = Prover(planner, data, compiler, say=say)
    section = f"compiled for {planner.target.device.name}"
    rows: list[Row] = []
    need, fits = planner.memory().total, False
    if need > _HOPELESS * planner.available:
        note = f"estimated at {need / planner.available:.1f} times what there is"
        rows.append(Row(section, "step", "not compiled", "", "estimated", note))
    else:
        found = prover.step(planner.choice, planner.share)
        rows += _step_rows(section, planner, planner.choice, found)
        need = _need(planner, found)
        fits = isinstance(found, Compiled) and need <= _memory(planner)
    changes: list[Change] = []
    if not fits:
        changes, more = _suggest(prover, planner, section)
        rows += more
    smaller = ""
    if evaluated is not None:
        more, smaller = _evaluation(prover, planner, section, evaluated)
        rows, fits = rows + more, fits and not smaller
    if search:
        rows += _search(prover, planner, section)
    return Proof(rows, fits, need, _memory(planner), changes, smaller)


def _suggest(prover: Prover, planner: Planner, section: str) -> tuple[list[Change], list[Row]]:
    """Ways to make the step fit, the first of which was compiled and fits, if any does."""
    changes, tried = planner.changes(), 0
    while changes and tried < _SUGGESTIONS:
        first = changes[0]
        tried += 1
        found = prover.step(first.choice, planner.share)
        if isinstance(found, Compiled) and _need(planner, found) <= _memory(planner):
            rows = _step_rows(section, planner, first.choice, found, name=f"step, {first.flags}")
            return changes, rows
        # What was refused is not suggested again, however little the refusal tells.
        while (changes := planner.changes()) and changes[0].choice == first.choice:
            planner.correction *= _MOVE
    refused = Row(section, "suggestions", "refused", "", "compiled", f"{tried} programs compiled")
    return changes, [refused] * bool(tried)


def _search(prover: Prover, planner: Planner, section: str) -> list[Row]:
    """The largest batch of a device in one piece."""
    mixing = planner.options.input.mixing
    unit = math.lcm(8, mixing.group_size if mixing else 1, planner.options.input.repeats)
    choice = planner.choice.whole
    fitting, refused, compiled = 0, math.inf, 0
    while compiled < _SEARCHED:
        share = next_batch(planner, choice, unit=unit, fitting=fitting, refused=refused)
        if share is None:
            break
        found = prover.step(choice, share)
        compiled += 1
        if isinstance(found, Compiled) and _need(planner, found, choice, share) <= _memory(planner):
            fitting = share
        else:
            refused = share
    note = f"{compiled} programs compiled"
    if refused < math.inf:
        note += f"; {refused} images do not fit"
    name = f"largest of a device in one piece, model.remat={choice.remat}"
    return [Row(section, name, fitting, "", "compiled", note)]


def next_batch(
    planner: Planner, choice: Choice, *, unit: int, fitting: int, refused: float
) -> int | None:
    """The batch of a device that is worth compiling next; None if the search is at its end.

    Args:
      planner: whose correction is that of what was compiled last.
      choice: the other keys.
      unit: that a batch is a multiple of.
      fitting: the largest batch known to fit; 0 for none.
      refused: the smallest known not to; inf for none.
    """
    if refused <= _CLOSE * fitting:
        return None
    share = planner.largest_batch(choice, limit=_AIM * _memory(planner), unit=unit)
    if refused == math.inf:
        # Upwards in large strides: a refusal takes the compiler seconds, an answer minutes. Under
        # pressure it finds room that the estimate does not know of.
        share = max(share, int(_STRIDE * fitting) // unit * unit)
    elif not _CLOSE * fitting < share < refused:
        share = int((fitting + refused) / 2) // unit * unit
    return share if fitting < share < refused else None


def _evaluation(
    prover: Prover, planner: Planner, section: str, source: Source
) -> tuple[list[Row], str]:
    """The rows of an evaluation, and the flag that makes it fit where a training has no room."""
    found, share = prover.evaluation(source)
    rows = [Row(section, "evaluation, images of a device", share, "", "exact")]
    # Weights are an argument of the program. The optimizer's state waits for the next step, and of
    # weights and moving average the one that is not judged.
    beside = planner.state().optimizer + planner.state().average
    limit = _memory(planner) - beside
    if isinstance(found, Compiled) and found.memory <= limit:
        note = f"in training {(found.memory + beside) / 1e9:.2f}, with what waits for the next step"
        rows.append(_row(section, "evaluation, memory", found.memory, note))
        rows.append(_row(section, "evaluation, temp", found.temp))
        rows.append(_row(section, "evaluation, bytes accessed", found.accessed))
        return rows, ""
    temp = found.temp if isinstance(found, Compiled) else found.needed
    batch = planner.target.num_devices * 8
    if temp:
        # Activations of an evaluation grow with its batch.
        room = max(limit - planner.state().weights, 0)
        batch = max(int(share * min(_AIM * room / temp, 1)) // 8 * 8, 1)
        batch *= planner.target.num_devices
    flag = f"--config.input.eval_batch_size={batch}"
    value = found.memory if isinstance(found, Compiled) else found.needed
    return [*rows, _row(section, "evaluation, memory", value, f"DOES NOT FIT: {flag}")], flag


def _step_rows(
    section: str, planner: Planner, choice: Choice, found: Answer, *, name: str = "step"
) -> list[Row]:
    """The figures of a step beside their estimates."""
    estimated = planner.memory(choice)
    if isinstance(found, TooLarge):
        return [Row(section, name, "refused", "", "compiled", _refusal(found))]
    arguments = estimated.weights + estimated.optimizer + estimated.average + estimated.batch // 2
    temp = max(estimated.activations, estimated.gradients)
    rows = [
        _row(section, f"{name}, memory", found.memory, _beside(found.memory, arguments + temp)),
        _row(section, f"{name}, arguments", found.arguments, _beside(found.arguments, arguments)),
        _row(section, f"{name}, temp", found.temp, _beside(found.temp, temp)),
        Row(section, f"{name}, code", found.code / 1e6, "MB", "compiled"),
    ]
    looped = choice.accumulation > 1
    flops = planner.share * planner.flops(choice.remat)
    note = "of one micro-batch and the update" if looped else _beside(found.flops, flops)
    rows.append(Row(section, f"{name}, operations", found.flops / 1e9, "GFLOP", "compiled", note))
    device = planner.target.device
    moved = planner.time(choice)
    # Bytes are compared with nothing: the expected time goes by passes, wherever they happen.
    note = "of one micro-batch and the update" if looped else ""
    rows.append(_row(section, f"{name}, bytes accessed", found.accessed, note))
    if found.offchip and not looped:
        rows.append(_row(section, f"{name}, bytes off the chip", found.offchip))
    peak = device.peak(choice.precision)
    if moved and peak and device.bandwidth and not looped:
        # On a TPU most of what is accessed never leaves the chip. Other compilers do not tell the
        # two apart, and give 0.
        crossing = found.offchip or found.accessed
        seconds = max(found.flops / peak, crossing / (device.bandwidth * 1e9))
        if device.name in CLOCKS:
            seconds = max(seconds, found.cycles / CLOCKS[device.name])
        seconds += moved.all_reduce
        note = f"by operations, bytes and cycles; estimated {moved.expected * 1e3:.4g}"
        rows.append(Row(section, f"{name}, time", seconds * 1e3, "ms", "compiled", note))
    return rows


def _need(
    planner: Planner, found: Answer, choice: Choice | None = None, share: int | None = None
) -> int:
    """Bytes of a device with a program, and the next batch beside it."""
    estimated = planner.memory(choice, batch_size=share)
    if isinstance(found, Compiled):
        return int(found.memory) + estimated.batch // 2
    return max(int(found.needed), planner.need(choice, batch_size=share))


def _memory(planner: Planner) -> float:
    """Bytes that a compiled program may need: the compiler takes off itself what none gets."""
    return min(planner.device_memory, planner.limit)


def _row(section: str, name: str, value: float, note: str = "") -> Row:
    return Row(section, name, value / 1e9, "GB", "compiled", note)


def _beside(found: float, estimated: float) -> str:
    return f"estimated {estimated / 1e9:.4g}, {estimated / found:.2f} of it" if found else ""


def _refusal(found: TooLarge) -> str:
    if not found.needed:
        return "the compiler finds no room for it"
    return f"the program needs {_size(found.needed)} of {_size(found.limit)}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
