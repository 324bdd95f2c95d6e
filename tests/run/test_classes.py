"""Classes are compared by name: in another order they are mapped, under other names refused."""

import shutil

import numpy as np
import pytest

from tests.support import images, tiny
from vit_dist.config.errors import UserError
from vit_dist.evaluate import evaluate
from vit_dist.train import train

COUNT = 30


def config(root, classes, labels, **changed):
    """A run on records whose class c stands in line c of `classes`."""
    root.mkdir()
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split in ("train", "val"):
        images.write_tfrecords(root / split, (COUNT,), split=split, labels=labels)
    ops = f"decode|{tiny.ANY_SIZE}"
    return tiny.make(
        data__source="tfrecord",
        data__files=f"{root}/{{split}}/{{split}}-*",
        data__class_file=f"{root}/classes.txt",
        input__train_ops=ops,
        input__eval_ops=ops,
        **{"total_steps": 10, "optimizer__learning_rate": 0.01, **changed},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    labels = [number % 3 for number in range(COUNT)]
    train(config(root / "data", ["ant", "bee", "cat"], labels), str(root / "run"))
    return root / "run", labels


def test_another_order_is_mapped(trained, tmp_path, caplog):
    """The same images with the classes numbered otherwise: the same loss and accuracy."""
    run, labels = trained
    order = [2, 0, 1]  # the line at which ant, bee and cat stand
    other = config(tmp_path / "data", ["bee", "cat", "ant"], [order[label] for label in labels])
    (row,) = [row for row in tiny.rows(run) if "val/loss" in row]
    found = evaluate(other, str(run))["val"]
    assert found["accuracy"] == row["val/accuracy"]
    np.testing.assert_allclose(found["loss"], row["val/loss"], rtol=1e-5)
    assert "its classes by name in the order of the data" in caplog.text
    # Fine-tuning begins there: with a rate of 0 it is the model of before.
    other = config(
        tmp_path / "again",
        ["bee", "cat", "ant"],
        [order[label] for label in labels],
        init_from=str(run),
        total_steps=1,
        optimizer__learning_rate=0.0,
    )
    metrics = train(other, str(tmp_path / "tuned"))
    assert metrics["val_accuracy"] == row["val/accuracy"]
    np.testing.assert_allclose(metrics["val_loss"], row["val/loss"], rtol=1e-5)


def test_other_names_are_refused(trained, tmp_path):
    run, labels = trained
    other = config(tmp_path / "data", ["ant", "bee", "dog"], labels)
    with pytest.raises(UserError, match="'dog' is not in it"):
        evaluate(other, str(run))
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UserError, match="class"):
        train(
            config(tmp_path / "more", ["ant", "bee", "dog"], labels, total_steps=21),
            tmp_path / "run",
        )
