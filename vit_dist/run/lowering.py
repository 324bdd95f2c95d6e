"""The programs of a run as a device would get them: HLO of one replica's share, without devices.

Nothing is run: TensorFlow traces a step for its CPU, with the layers' form for the wanted kind of
device, and XLA's bridge lowers it. What several replicas do together, the sum of gradients, is not
in the program: a single replica has none.
"""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from tensorflow.compiler.xla.service import hlo_pb2

from vit_dist.data.mixing import ROW_SPEC
from vit_dist.data.ops.pipe import Pipe, output_spec
from vit_dist.data.pipeline import MASK_SPEC
from vit_dist.data.sources.source import Source
from vit_dist.evaluators.classification import make_sums
from vit_dist.run.build import make_model, make_state
from vit_dist.run.options import Data, EvaluationOptions, RunOptions
from vit_dist.training.step import compiled, make_gradients
from vit_dist.training.update import make_update
from vit_dist.training.watch import Watch

Specs = Mapping[str, tf.TensorSpec]


class Lowered:
    """A function of a batch, for XLA.

    Args:
      function: of a dict of tensors; what it returns is the program's result.
      batch: the specs of that dict, of static shapes.
    """

    def __init__(self, function: Callable[[dict[str, tf.Tensor]], Any], batch: Specs):
        names = tuple(batch)
        self._function: Any = compiled(lambda *x: function(dict(zip(names, x, strict=True))))
        self._specs = tuple(batch.values())

    def text(self) -> str:
        """The program as text, for people."""
        return self._function.experimental_get_compiler_ir(*self._specs)(stage="hlo")

    def module(self) -> bytes:
        """The program as an HloModuleProto: the same bytes at each call, in each process."""
        lower = self._function.experimental_get_compiler_ir(*self._specs)
        return _without_counters(lower(stage="hlo_serialized"))


def lower_step(options: RunOptions, data: Data, *, share: int, kind: str) -> Lowered:
    """The training step of one replica: forward, backward, clip, update.

    Args:
      options, data: checked.
      share: images of the replica.
      kind: of device: "CPU", "GPU" or "TPU".
    """
    state = make_state(options, tf.distribute.OneDeviceStrategy("CPU:0"), kind=kind)
    gradients = make_gradients(
        state,
        options.loss,
        preprocess=options.input.pipe.device,
        batch_size=options.input.batch_size,
        accumulation=options.step.accumulation,
        seed=options.seed,
        mixing=options.input.mixing,
        masked=bool(data.damage),
    )
    update = make_update(
        state,
        schedule=options.schedule,
        clip_norm=options.step.clip_norm,
        ema_decay=options.step.ema_decay,
        ema_warmup=options.step.ema_warmup,
        watch=Watch(state, options.monitor.watch),
    )
    specs = _examples(data.sources["train"], options.input.pipe)
    if options.input.mixing is not None:
        specs["mix"] = ROW_SPEC
    if data.damage:
        specs["mask"] = MASK_SPEC
    # Without a strategy gradients and update follow each other in one program.
    return Lowered(
        lambda batch: update(*gradients(batch, tf.constant(0))).metrics, _batched(specs, share)
    )


def lower_evaluation(
    options: EvaluationOptions, source: Source, *, share: int, kind: str
) -> Lowered:
    """What a replica does with a batch of an evaluation.

    Args:
      options: checked.
      source: a split that is judged.
      share: images of the replica.
      kind: of device: "CPU", "GPU" or "TPU".
    """
    model = make_model(options.model, tf.distribute.OneDeviceStrategy("CPU:0"), kind=kind)
    sums = make_sums(model, options.loss, preprocess=options.pipe.device, verdicts=options.verdicts)
    specs = {**_examples(source, options.pipe), "mask": MASK_SPEC}
    return Lowered(
        lambda batch: sums(batch["image"], batch["label"], batch["mask"]), _batched(specs, share)
    )


def _examples(source: Source, pipe: Pipe) -> dict[str, tf.TensorSpec]:
    """What a replica takes of an example: other entries that a pipe keeps stay on the host."""
    spec = output_spec(source, pipe)
    return {key: spec[key] for key in ("image", "label")}


def _batched(specs: Specs, count: int) -> dict[str, tf.TensorSpec]:
    return {k: tf.TensorSpec((count, *spec.shape), spec.dtype) for k, spec in specs.items()}


def _without_counters(serialized: bytes) -> bytes:
    """The same module; numbers, names and origins of what TensorFlow has traced before are gone."""
    module = hlo_pb2.HloModuleProto.FromString(serialized)
    # Computations and instructions refer to each other by numbers that count on in the process.
    places = {c.id: i for i, c in enumerate(module.computations, 1)}
    module.name, module.id = "step", 0
    module.entry_computation_id = places[module.entry_computation_id]
    for computation in module.computations:
        computation.id = places[computation.id]
        computation.name = f"computation.{computation.id}"
        first = computation.id << 32  # a number says which computation the instruction is in
        numbers = {x.id: first + i for i, x in enumerate(computation.instructions)}
        computation.root_id = numbers[computation.root_id]
        for instruction in computation.instructions:
            instruction.ClearField("metadata")
            instruction.id = numbers[instruction.id]
            instruction.name = f"{instruction.opcode}.{instruction.id}"
            lists = (
                (instruction.operand_ids, numbers),
                (instruction.control_predecessor_ids, numbers),
                (instruction.called_computation_ids, places),
            )
            for ids, new in lists:
                ids[:] = [new[i] for i in ids]
    module.entry_computation_name = f"computation.{module.entry_computation_id}"
    return module.SerializeToString(deterministic=True)
