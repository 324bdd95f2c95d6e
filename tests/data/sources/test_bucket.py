"""Runs whose folder is in a bucket: what they write there, and what reads it again."""

import errno
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.bucket import copy
from tests.support.tiny import arrays, assert_same, make_folder, of_folder, rows, without_evaluation
from tests.support.waiting import wait_for
from vit_dist.cluster.preemption import Preemption
from vit_dist.config.errors import ConfigError, StorageError
from vit_dist.evaluate import evaluate
from vit_dist.export import export
from vit_dist.monitoring.files import FLUSH_SECONDS, RemoteFile
from vit_dist.monitoring.writer import make_writer
from vit_dist.predict import predict
from vit_dist.run import cli
from vit_dist.storage.errors import check_bucket
from vit_dist.train import train


def test_a_run_resumes_to_the_bit(remote, tmp_path, monkeypatch):
    """And leaves there what it leaves on a disk."""
    config = without_evaluation(save_steps=3)
    train(config, str(tmp_path))
    with monkeypatch.context() as patch:
        # After the third call, which ends with step 4: the first has one step, the second two.
        patch.setattr(Preemption, "noticed", property(lambda _: saw.append(1) or len(saw) == 3))
        saw = []
        assert train(config, f"{remote}/run")["preempted"] == 1.0
    metrics = train(config, f"{remote}/run")
    assert metrics["step"] == 12 and "preempted" not in metrics
    assert_same(arrays(remote / "run"), arrays(tmp_path))
    logged = [3, 4, 6, 8, 12]  # after the first steps of each start, and every 4
    assert [row["step"] for row in rows(remote / "run")] == logged
    found = {str(path.relative_to(remote / "run")) for path in (remote / "run").glob("*")}
    plain = {"checkpoints", "config.json", "log.txt", "metrics.jsonl", "plan.json"}
    plain.add("starts.jsonl")
    for names in (found, {path.name for path in tmp_path.iterdir()}):
        assert {name for name in names if not name.startswith("events.out.tfevents.")} == plain
    kept = [path.name for path in (remote / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == ["000000009", "000000012"]
    events = EventAccumulator(f"{remote}/run").Reload()
    assert [e.step for e in events.Scalars("train/loss")] == logged


@pytest.mark.exhaustive
def test_from_photographs_to_predictions(remote, tmp_path):
    """Data, run, weights to begin with and images: all in buckets."""
    copy(make_folder(tmp_path), remote / "photos")
    config = of_folder(remote / "photos")
    metrics = train(config, f"{remote}/run")
    found = evaluate(config, f"{remote}/run")["val"]
    assert found == {key: metrics[f"val_{key}"] for key in found}

    images = list(predict(f"{remote}/run", [f"{remote}/photos/val/*/*.jpg"]))
    assert len(images) == 16 and set(images[0].classes) <= {"cats", "dogs"}

    with pytest.raises(ValueError, match="--output must be a local path, got gs://"):
        export(f"{remote}/run", "timm", f"{remote}/weights")
    export(f"{remote}/run", "timm", str(tmp_path / "weights"))
    copy(tmp_path / "weights", remote / "weights")
    weights = {"init_from": f"{remote}/weights", "optimizer__learning_rate": 0.0}
    again = train(of_folder(remote / "photos", total_steps=1, **weights), f"{remote}/tuned")
    assert again["val_loss"] == pytest.approx(metrics["val_loss"])


def test_metrics_are_sent_now_and_then(remote, bucket):
    """A bucket gets the whole file each time: so not at each row."""
    path, now = remote / "metrics.jsonl", [0.0]

    def uploads():
        name = str(path).removeprefix("gs://bucket/")
        sent = f"POST /upload/storage/v1/b/bucket/o?uploadType=resumable&name={name}"
        return bucket.requests().count(sent)

    rows = RemoteFile(path, "ab", clock=lambda: now[0])
    rows.add("0\n")
    wait_for(uploads)
    now[0] += FLUSH_SECONDS
    for i in range(1, 100):
        rows.add(f"{i}\n")
    rows.close()
    assert uploads() == 3  # the first, the first that is due, and at the end
    assert path.read_text().split() == [str(i) for i in range(100)]


def test_a_bucket_that_fails_ends_the_run(remote, bucket):
    """At the next row, and in any case at the end."""
    bucket.refuse(403, r"POST .*metrics\.jsonl")
    writer = make_writer(remote / "run")
    with pytest.raises(StorageError, match=r"cannot write gs://.*metrics.jsonl.*403"), writer:
        writer.scalars(1, {"loss": 1.0})


def test_a_row_that_is_lost_is_an_error_at_the_end(remote, monkeypatch):
    """Though the bucket takes the others: TensorFlow collects them on a disk, which may be full."""
    rows, added = RemoteFile(remote / "metrics.jsonl", "ab"), threading.Event()

    def full(row):
        added.wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows, "_write", full)
    rows.add("1\n")
    added.set()
    with pytest.raises(OSError, match="No space left"):
        rows.close()


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (0, ConfigError, "there is no bucket gs://elsewhere"),
        (403, ConfigError, "403"),
        (503, StorageError, "attempts failed"),
    ],
)
def test_a_bucket_that_cannot_be_reached(remote, bucket, status, kind, words):
    """To make a folder in one that is not there would never end."""
    bucket.refuse(status)
    with pytest.raises(kind, match=rf"--workdir=gs://elsewhere/run.*{words}") as error:
        train(without_evaluation(), "gs://elsewhere/run")
    assert "gcloud" in str(error.value)


def test_a_folder_is_enough_where_the_bucket_may_not_be_seen(remote, bucket):
    """As with the role Storage Object Admin alone."""
    bucket.refuse(403, "/b/bucket$")
    check_bucket(remote, "--workdir")
    with pytest.raises(ValueError, match="Storage Legacy Bucket Reader"):
        check_bucket(remote / "another", "--workdir")


def test_commands_explain_what_a_bucket_says(remote, bucket, capsys):
    bucket.refuse(403)
    with pytest.raises(SystemExit) as exit_:
        cli._guard(lambda _: next(predict(f"{remote}/run", [f"{remote}/x.jpg"])))(None)
    assert exit_.value.code == cli.FAILURE
    message = capsys.readouterr().err
    assert message.startswith("error: gs://bucket/") and "HTTP response code 403" in message
    assert "gcloud auth application-default login" in message and "Traceback" not in message
