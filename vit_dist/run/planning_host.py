"""What a training takes of its hosts: memory, storage, and cores that make the batches."""

import os

from vit_dist.data.pipeline import MAX_CHUNK
from vit_dist.data.sources.cache import check_cacheable, needed_bytes
from vit_dist.data.sources.source import Source
from vit_dist.run.planning import Planner, Row

_CACHE = "config.input.cache"


def host_rows(
    planner: Planner,
    source: Source,
    *,
    cache: str,
    cache_dir: str,
    image_bytes: float | None,
    host_cores: int | None,
    made_up: bool,
) -> list[Row]:
    """What a host keeps in memory, and reads from storage.

    Args:
      planner: of the training.
      source: the training examples, without a cache.
      cache: "off", "raw" or "decoded".
      cache_dir: "" for a cache in memory.
      image_bytes: of a stored image, on average; None where images are not files.
      host_cores: of a host; None for as many as this machine has.
      made_up: whether made-up images stand for the data.

    Raises:
      ConfigError: a cache of what needs none.
    """
    options, hosts = planner.options, planner.target.hosts
    batch = options.input.batch_size / hosts
    height, width = options.image_size
    pixels = height * width * planner.network["channels"]
    threads = options.input.num_threads or host_cores or os.cpu_count() or 1
    # Of each batch `prefetch` are ready, one is being put together, and one goes to the devices.
    kept = (options.input.prefetch + 2) * batch * pixels
    making = threads * MAX_CHUNK * (pixels + (image_bytes or 0))
    found = {
        "batches that are kept ready": (kept, "input.prefetch, and two on their way"),
        "chunks in the making": (making, f"{threads} threads, {MAX_CHUNK} images each"),
        "buffer to shuffle": (0, "none: an epoch's order is computed"),
        "a checkpoint while it is written": (planner.checkpoint, "the chief's host"),
    }
    stand_ins = ", by made-up JPEGs of 375 x 500" if made_up else ""
    rows = []
    if cache != "off":
        check_cacheable(source, cache)
        need = needed_bytes(source, cache)
        if cache_dir:
            note = f"{_CACHE}={cache}: disk in cache_dir; memory as far as there is some{stand_ins}"
            rows.append(Row("host", "cache, on disk", need / 1e9, "GB", "estimated", note))
        else:
            note = f"{_CACHE}={cache}, of the whole data set{stand_ins}"
            found["cache"] = (need, note)
    rows += [
        Row("host", name, value / 1e9, "GB", "estimated" if value else "exact", note)
        for name, (value, note) in found.items()
    ]
    total = sum(value for value, _ in found.values())
    note = "beside TensorFlow itself, about 1 GB"
    rows.append(Row("host", "memory, all of these", total / 1e9, "GB", "estimated", note))
    return rows + _reading_rows(planner, source, cache, image_bytes, stand_ins)


def _reading_rows(
    planner: Planner, source: Source, cache: str, image_bytes: float | None, stand_ins: str
) -> list[Row]:
    """Bytes from storage: in each second, or once where a cache keeps them."""
    time, hosts = planner.time(), planner.target.hosts
    if image_bytes is None:
        return []
    rows = []
    if cache != "off":
        size = image_bytes * source.num_examples / 1e9
        note = f"each host, before the first step; nothing later{stand_ins}"
        rows.append(Row("host", "reads from storage, once", size, "GB", "estimated", note))
    elif time is not None:
        read = planner.options.input.batch_size / time.expected / hosts * image_bytes / 1e6
        note = f"for the expected images per second{stand_ins}"
        rows.append(Row("host", "reads from storage", read, "MB/s", "estimated", note))
    return rows


def input_rows(
    planner: Planner,
    *,
    images_per_second: float,
    cache: str,
    host_cores: int | None = None,
) -> list[Row]:
    """The figures of the input, from a measurement of this machine's.

    Args:
      planner: of the training.
      images_per_second: that this process makes, with the config's threads, without a cache.
      cache: "off", "raw" or "decoded".
      host_cores: of the target; None if nobody tells.
    """
    # Of the machine's cores a container, taskset or Slurm may leave this process some.
    cores, time = len(os.sched_getaffinity(0)), planner.time()
    cores = min(planner.options.input.num_threads or cores, cores)
    note = f"{cores} cores of this machine"
    if cache != "off":
        note += f"; without {_CACHE}={cache}"
    rows = [
        Row("input", "images per second here", images_per_second, "", "measured", note),
        Row("input", "images per second of a core here", images_per_second / cores, "", "measured"),
    ]
    if time is not None:
        needed = planner.options.input.batch_size / time.expected / planner.target.hosts
        rows.append(Row("input", "images per second that a host needs", needed, "", "estimated"))
        count = needed / (images_per_second / cores)
        note = "of this machine's kind, scaled"
        if host_cores is not None and count > host_cores:
            helps = ["a smaller first side (decode ops of docs/ops.md)"]
            # A slice of several hosts has neither, as both run Python.
            if not planner.target.is_slice:
                if cache != "decoded":
                    helps.insert(0, f"--{_CACHE}=decoded")
                helps.append("or --config.input.service=HOST:PORT")
            note = f"MORE THAN ITS {host_cores}: {', '.join(helps)}"
        rows.append(Row("input", "cores that a host needs", count, "", "estimated", note))
    return rows
