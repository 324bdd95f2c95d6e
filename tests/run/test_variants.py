"""The runs of a sweep: what --set means, what runs are called, which is best."""

import pytest

from vit_dist.config.errors import ConfigError
from vit_dist.run.variants import (
    as_variants,
    name_variants,
    parse_choices,
    product,
    sort_rows,
    table,
    words_of,
)


@pytest.mark.parametrize(
    "text, key, values",
    [
        ("seed=0,1", "seed", ["0", "1"]),
        ("--config.seed=0", "seed", ["0"]),
        ("optimizer.learning_rate=1e-3, 3e-4", "optimizer.learning_rate", ["1e-3", "3e-4"]),
        ("input.train_ops=a(1, 2)|b,c", "input.train_ops", ["a(1, 2)|b", "c"]),
        ("input.eval_ops=keep('a,b'),x", "input.eval_ops", ["keep('a,b')", "x"]),
        ("data.val_split=,val", "data.val_split", ["", "val"]),
        ("image_size=(8, 16),8", "image_size", ["(8, 16)", "8"]),
    ],
)
def test_what_set_means(text, key, values):
    assert parse_choices(text) == (key, values)


@pytest.mark.parametrize(
    "text, said",
    [
        ("seed", "is not KEY=VALUE"),
        ("=1", "is not KEY=VALUE"),
        ("a b=1", "is not KEY=VALUE"),
        ("seed=0,0", "names the value '0' twice"),
        ("a=x(1", "do not match"),
        ("a=x)", "do not match"),
        ("a='x", "do not match"),
    ],
)
def test_what_it_does_not_mean(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_choices(text)


def test_all_combinations():
    found = product([("a", ["1", "2"]), ("b.c", ["x", "y"])])
    assert [words_of(v) for v in found] == [
        ["--config.a=1", "--config.b.c=x"],
        ["--config.a=1", "--config.b.c=y"],
        ["--config.a=2", "--config.b.c=x"],
        ["--config.a=2", "--config.b.c=y"],
    ]
    with pytest.raises(ConfigError, match="names a twice"):
        product([("a", ["1"]), ("a", ["2"])])


def test_names_tell_runs_apart():
    variants = [
        {"step.name": "a b", "loss.name": "x", "seed": "0"},
        {"step.name": "a/b", "loss.name": "x", "seed": "0"},
        {"step.name": "c", "loss.name": "y" * 300, "seed": "0"},
        {"step.name": "c", "loss.name": "y" * 301, "seed": "0"},
        {},
    ]
    names = name_variants(variants)
    assert names[0] == "000,step.name=a_b,loss.name=x,seed=0"
    assert names[1] == "step.name=a_b,loss.name=x,seed=0"
    assert names[4] == "as_configured"
    assert len(set(names)) == 5 and max(map(len, names)) == 120
    assert name_variants([{"optimizer.learning_rate": "3e-4"}]) == ["learning_rate=3e-4"]
    with pytest.raises(ConfigError, match="holds a run twice: --config"):
        name_variants([{"a": "1"}, {"a": "1"}])


def test_a_list_of_the_config_file():
    found = as_variants([{"seed": 1, "image_size": (8, 16), "loss.name": "softmax"}], file="c.py")
    assert found == [{"seed": "1", "image_size": "(8, 16)", "loss.name": "softmax"}]
    for wrong in (None, [], {"seed": 1}, [3], [{1: 2}]):
        with pytest.raises(ConfigError, match="get_variants"):
            as_variants(wrong, file="c.py")


def test_the_best_comes_first():
    rows = [
        {"run": "a", "val/accuracy": 0.5, "val/loss": 1.0},
        {"run": "b", "val/accuracy": None, "val/loss": None},
        {"run": "c", "val/accuracy": float("nan"), "val/loss": float("nan")},
        {"run": "d", "val/accuracy": 0.75, "val/loss": 2.0},
    ]
    assert [row["run"] for row in sort_rows(rows, "val/accuracy")] == ["d", "a", "b", "c"]
    assert [row["run"] for row in sort_rows(rows, "val/loss")] == ["a", "d", "b", "c"]
    lines = table(rows, metric="val/accuracy").splitlines()
    assert lines[0].split() == ["run", "val/accuracy", "val/loss"]
    assert lines[1].split() == ["d", "0.75", "2"] and lines[3].split() == ["b", "-", "-"]
