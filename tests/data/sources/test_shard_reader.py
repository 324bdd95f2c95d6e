"""Many shards with few open files: nothing is read wrongly, and no good image is called damaged."""

import errno
import os
import resource
import threading
from concurrent import futures

import numpy as np
import pytest
import tensorflow as tf
from array_record.python import array_record_module

from tests.support import images, processes, tiny
from vit_dist.config.errors import DataError
from vit_dist.data.sources import shard_reader
from vit_dist.data.sources.array_record import convert
from vit_dist.data.sources.open import open_source
from vit_dist.data.sources.shard_reader import OpenShard, Shard, ShardReader
from vit_dist.data.sources.source import read_records

NUM_SHARDS, EACH = 40, 3


@pytest.fixture
def shards(tmp_path):
    """40 files of three records; of each the first is left out."""
    found = []
    for i in range(NUM_SHARDS):
        name = str(tmp_path / f"{i} [x],caf\udce9.array_record")
        writer = array_record_module.ArrayRecordWriter(os.fsencode(name), "group_size:1")
        for j in range(EACH):
            writer.write(b"%d of %d" % (j, i))
        writer.close()
        found.append(Shard(name, 1, EACH - 1))
    return found


def expected(number):
    return b"%d of %d" % (number % (EACH - 1) + 1, number // (EACH - 1))


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("most", [2, 5, 1000])
def test_threads_share_few_files(shards, most, monkeypatch):
    monkeypatch.setattr(shard_reader, "max_open", lambda: most)
    reader, before = ShardReader(shards), open_files()
    assert len(reader) == NUM_SHARDS * (EACH - 1)

    def read(seed, reader=reader):
        numbers = np.random.default_rng(seed).integers(0, len(reader), 12).tolist()
        assert reader.read(numbers) == [expected(n) for n in numbers]
        return open_files()

    with futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(40)))
    del read
    # Those in use are beyond the limit at worst; afterwards it holds for all that are kept.
    reader.read([0])
    assert open_files() - before <= min(most, NUM_SHARDS)
    del reader
    assert open_files() <= before


def test_a_reader_may_go_while_its_thread_looks_for_a_file(shards):
    """The garbage collector closes a reader's files in whatever a thread is doing."""
    files, before = shard_reader._OpenFiles(), open_files()
    with files.borrow(1, shards[0].filename):
        assert open_files() > before

    def forget():
        with files._lock:
            files.forget(1)

    thread = threading.Thread(target=forget, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for itself"
    with files.borrow(2, shards[1].filename):
        assert [key[0] for key in files._files] == [2]
    files.forget(2)
    assert open_files() <= before


def test_a_file_that_was_replaced_is_read_anew(shards):
    assert ShardReader(shards[:1]).read([0]) == [expected(0)]
    writer = array_record_module.ArrayRecordWriter(os.fsencode(shards[0].filename), "group_size:1")
    for i in range(EACH):
        writer.write(b"new %d" % i)
    writer.close()
    assert ShardReader(shards[:1]).read([0, 1]) == [b"new 1", b"new 2"]


def test_damage_is_told_from_a_system_that_fails(shards):
    with pytest.raises(FileNotFoundError):
        ShardReader([Shard("/nowhere", 0, 1)]).read([0])
    with pytest.raises(IsADirectoryError):
        ShardReader([Shard(os.path.dirname(shards[0].filename), 0, 1)]).read([0])
    os.truncate(shards[3].filename, 1000)
    with pytest.raises(DataError, match="at least 64KB"):
        ShardReader(shards).read(range(20))
    with OpenShard(shards[0].filename) as shard:
        assert len(shard) == EACH and shard.read([2]) == [b"2 of 0"]


def read_with_all_files_open(shards):
    ShardReader(shards).read([0])
    number = tf.constant([4], tf.int64)  # TensorFlow opens files of its own at first
    lowest = os.dup(0)  # the number that the next file would get
    os.close(lowest)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, old[1]))
    with pytest.raises(OSError, match=r"Too many open files.*ulimit -n") as error:
        ShardReader(shards).read([4])
    assert error.value.errno == errno.EMFILE and error.value.filename == shards[2].filename
    # As TensorFlow puts it, or as it was, if TensorFlow called the reader in this thread.
    with pytest.raises((OSError, tf.errors.UnknownError), match="Too many open files"):
        read_records(ShardReader(shards).read, number)


def test_too_many_open_files(shards, tmp_path):
    """Said, and not called damage: neither by the reader nor by the pipeline.

    In a process of its own, where no other thread opens or closes a file meanwhile.
    """
    code, text = processes.call(read_with_all_files_open, shards, log=tmp_path / "log")
    assert code == 0, text


def train_with_few_files(flags, limit):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    processes.main("vit_dist.train", *flags)


def test_a_run_on_more_shards_than_files(tmp_path):
    images.write_folder(tmp_path / "in", count=120)
    source = open_source("folder", split="train", data_dir=str(tmp_path / "in"))
    convert(source, tmp_path / "shards", split="train", examples_per_shard=1)
    flags = [f"--config={processes.TINY}", "--config.data.source=array_record"]
    flags += [f"--config.data.data_dir={tmp_path}/shards", "--config.data.val_split="]
    flags += ["--config.total_steps=10", f"--workdir={tmp_path}/run"]
    flags += [f"--config.input.train_ops=decode|{tiny.ANY_SIZE}"]
    flags += ["--config.input.on_bad_example=mask"]
    code, text = processes.call(train_with_few_files, flags, 110, log=tmp_path / "log")
    assert code == 0, text[-2000:]
    assert "done: step 10" in text and "masked" not in text.replace('"mask', "")
