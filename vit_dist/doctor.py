"""Checks whether this machine, or this cluster, is fit to train.

python -m vit_dist.doctor [--quick]

Prints a verdict for each check, and at the end a block to paste into a report. On several hosts
start it on each, under the same variables or by the same scheduler as a training. Exit code 0 when
all is well, 1 when something is WRONG.
"""

import contextlib
import functools

from vit_dist.run import cli  # imported before TensorFlow, to hide TensorFlow's start-up notices

# isort: split
from absl import flags
from ml_collections import ConfigDict

from vit_dist.cluster import gpus
from vit_dist.cluster.hosts import device_kind
from vit_dist.cluster.meeting import meet
from vit_dist.cluster.strategy import choose_cluster, make_strategy
from vit_dist.config import get_defaults
from vit_dist.run import machine
from vit_dist.run.check import check
from vit_dist.run.health import Examination
from vit_dist.run.options import Data, RunOptions

# By kind of device: bytes that an all-reduce sums, and images a replica of the step that is timed.
# A ViT-Ti/16 has 23 MB of gradients.
_SIZES = {"CPU": (2**24, 8), "GPU": (2**26, 128), "TPU": (2**26, 128)}


def get_config() -> ConfigDict:
    """The doctor's own config: a ViT-Ti/16 on made-up images."""
    config = get_defaults()
    config.total_steps = 100
    config.data.source = "synthetic"
    config.data.image_format = "array"
    config.data.height = config.data.width = 32
    config.data.num_examples = 64
    config.data.test_split = ""
    config.input.batch_size = config.input.eval_batch_size = 64
    config.input.train_ops = "resize(size)|value_range(-1, 1)|keep('image', 'label')"
    config.input.eval_ops = config.input.train_ops
    config.model.variant = "Ti/16"
    # A person waits: ten minutes are enough for any check, and hosts come within five.
    config.strategy.timeout_seconds = 300.0
    return config


def define_flags() -> None:
    """Defines this command's flags."""
    cli.define_config(built_in=get_config())
    flags.DEFINE_boolean("quick", False, "leave out the speed of a training, which takes longest")


def main() -> int:
    """The command; returns its exit code."""
    options, data = check(cli.load_config())
    strategy = options.evaluation.strategy
    examination = Examination(seconds=2 * strategy["timeout_seconds"])
    examination.check("versions", machine.versions)
    found = gpus.look()
    examination.check("cards", functools.partial(machine.cards, found))
    _examine(examination, options, data, quick=flags.FLAGS.quick)
    _print_report(examination)
    return 1 if examination.wrong else 0


def _examine(examination: Examination, options: RunOptions, data: Data, *, quick: bool) -> None:
    """The checks that all hosts make together."""
    given, do = options.evaluation.strategy, functools.partial
    seconds = given["timeout_seconds"]
    with contextlib.ExitStack() as stack:

        def links() -> str:
            meeting = meet(choose_cluster(given["name"], given["tpu"]), timeout_seconds=seconds)
            examination.meeting = stack.enter_context(meeting)
            return machine.links(meeting, timeout_seconds=seconds)

        if not examination.check("links", links):
            return
        if not examination.check("alike", do(machine.alike, examination.meeting)):
            return
        made = []

        def devices() -> str:
            made.append(make_strategy(**given))
            return machine.devices(made[0])

        examination.check("devices", devices)
        if not made:
            return
        (strategy,) = made
        num_bytes, per_replica = _SIZES[device_kind(strategy)]
        examination.check("collectives", do(machine.collectives, strategy, num_bytes=num_bytes))
        examination.check("compile", do(machine.compiles, strategy))
        needs = ("collectives", "compile")
        examination.check("step", do(machine.step_numbers, options, data, strategy), needs=needs)
        if not quick:
            timed = do(machine.throughput, options, data, strategy, per_replica=per_replica)
            examination.check("throughput", timed, needs=needs)
        examination.check("memory", do(machine.memory, strategy))


def _print_report(examination: Examination) -> None:
    wrong = ", ".join(examination.wrong)
    print(f"\n{f'WRONG: {wrong}' if wrong else 'all is well'}. For a report, paste this:\n```text")
    print("\n".join([*machine.machine(), *examination.lines]))
    print("```", flush=True)


def script() -> None:
    """The program vit-dist-doctor: its flags, then main."""
    define_flags()
    cli.run(main)


if __name__ == "__main__":
    script()
