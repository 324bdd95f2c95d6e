"""A run that goes on with another number of hosts or replicas: the same step, cut up otherwise.

The global batch stays as it is, because it decides which examples a step sees (law 1 in
docs/design.md) and what a step means. So a replica gets more examples where there are fewer of
them, and its memory was found to be enough for the micro-batches of the first start only. Each
checkpoint carries that size along, and a resume takes as many micro-batches as keep below it.
"""

from typing import NamedTuple

from vit_dist.config.errors import ConfigError
from vit_dist.run.check import check_parts
from vit_dist.run.options import RunOptions
from vit_dist.run.start import Start


class Cut(NamedTuple):
    """How the global batch is cut up.

    Attributes:
      accumulation: micro-batches per replica and step.
      micro_batch: the most examples of a micro-batch that the run has had; for its checkpoints.
      note: a line for the user where the config's number of micro-batches is not the one taken.
    """

    accumulation: int
    micro_batch: int
    note: str = ""


def cut_batch(options: RunOptions, start: Start, *, num_replicas: int) -> Cut:
    """Cuts the global batch for this start's replicas.

    A run that begins, or goes on with another step.accumulation than before, takes what the config
    says. Otherwise as few micro-batches are taken as are no larger than the run's first ones.

    Raises:
      ConfigError: the batch does not come out even.
    """
    batch, asked = options.input.batch_size, options.step.accumulation
    group = options.input.mixing.group_size if options.input.mixing else 1
    notes = start.checkpoint.notes if start.checkpoint and start.how == "resume" else {}
    if notes and batch % (num_replicas * group):
        raise ConfigError(_uneven(batch, num_replicas, group))
    # Checkpoints of version 0.1 do not tell the size.
    known = "micro_batch" in notes and notes["config"]["step"]["accumulation"] == asked
    if not known:
        check_parts(
            batch,
            options.step,
            options.input.mixing,
            num_replicas=num_replicas,
            shard_state=options.optimizer.shard_state,
        )
        return Cut(asked, batch // (num_replicas * asked))
    largest, share = notes["micro_batch"], batch // num_replicas
    # A part of one group always fits, even if the config's groups have grown since.
    most = min(max(largest, group), share)
    sizes = [size for size in range(group, most + 1, group) if share % size == 0]
    accumulation = share // max(sizes)
    note = ""
    if accumulation != asked:
        note = (
            f"{accumulation} micro-batches of {max(sizes)} for each of {num_replicas} replicas, no "
            f"larger than the {largest} examples of this run's first; another "
            f"config.step.accumulation than {asked} would be taken as it is"
        )
    return Cut(accumulation, largest, note)


def _uneven(batch: int, num_replicas: int, group: int) -> str:
    fits = [n for n in range(1, batch // group + 1) if batch % (n * group) == 0]
    # The nearest numbers below and above.
    near = [*[n for n in fits if n < num_replicas][-1:], *[n for n in fits if n > num_replicas][:1]]
    groups = f" in whole groups of mixing.group_size={group}" if group > 1 else ""
    return (
        f"this run's batches of {batch} examples cannot be divided among {num_replicas} "
        f"replicas{groups}: go on with {' or '.join(map(str, near))} replicas. (Another "
        "input.batch_size makes another run: in another workdir, with config.resume_from)"
    )
