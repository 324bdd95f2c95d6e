"""docs/extending.md: its modules, in a folder of a user's, serve every command of a run."""

import sys
from pathlib import Path

import pytest
import tensorflow as tf

from tests.support import tiny
from tests.support.documents import python_blocks
from vit_dist.config.errors import ConfigError
from vit_dist.data.ops import pipe
from vit_dist.data.sources.open import SOURCES
from vit_dist.evaluate import evaluate
from vit_dist.evaluators.registry import KINDS
from vit_dist.run.check import check
from vit_dist.run.facts import code_facts
from vit_dist.run.origins import open_origin
from vit_dist.run.sources import open_sources
from vit_dist.train import train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
MODULES = ("my_ops", "my_source", "my_evals")


def forget():
    """As in another process: nothing is imported or registered."""
    for name in MODULES:
        sys.modules.pop(name, None)
    pipe._REGISTRY.pop("invert", None)
    SOURCES.pop("shapes", None)
    KINDS.pop("nearest_mean", None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with the page's modules, where commands are started."""
    for name, code in python_blocks(PAGE.read_text()).items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()


def config(**changed):
    ops = f"resize(size)|{tiny.OPS}"
    options = {
        "imports": MODULES,
        "data__source": "shapes",
        "data__options": {"pixels": 12},
        "input__train_ops": f"invert(0.5)|{ops}",
        "input__eval_ops": f"invert(1.0)|{ops}",
        "total_steps": 2,
        "evals": {"mean": {"kind": "nearest_mean", "options": {"power": 1.0}}},
    }
    return tiny.make(**{**options, **changed})


def test_convert_opens_a_source_of_ones_own(folder):
    (source,) = open_sources(config(), training=False, splits=["train"]).values()
    assert source.name == "shapes"


def test_a_run_with_an_op_and_a_source_of_ones_own(folder):
    metrics = train(config(), str(folder / "run"))
    assert metrics["val_examples"] == metrics["mean_examples"] == 32
    # Squares and circles of many sizes: better than chance without training.
    assert 0.5 < metrics["mean_accuracy"] <= 1
    forget()  # the run itself knows what to import
    origin = open_origin(str(folder / "run"))
    assert origin.class_names == ["square", "circle"] and "invert" in str(origin.pipe)
    forget()
    found = evaluate(config(), str(folder / "run"), splits=["val"])
    assert found["val"]["loss"] == pytest.approx(metrics["val_loss"])
    assert found["mean"]["accuracy"] == metrics["mean_accuracy"]


def test_features_are_computed_anew_after_an_edit_of_ones_own_op(folder):
    train(config(), str(folder / "run"))
    kept, ops = str(folder / "kept"), folder / "my_ops.py"
    judged = config(evals={"near": {"kind": "knn", "options": {"k": (1,)}}})
    for edit in ("", "", "\n# edited\n"):
        forget()
        ops.write_text(ops.read_text() + edit)
        metrics = evaluate(judged, str(folder / "run"), splits=[], features_dir=kept)
        assert metrics["near"]["examples"] == 32
    # Of val and train, once for each of the two texts of the module.
    assert len(list((folder / "kept").glob("*.safetensors"))) == 4


def test_a_package_counts_as_a_whole(tmp_path, monkeypatch):
    for name in ("__init__", "ops", "helpers"):
        (tmp_path / "my_package").mkdir(exist_ok=True)
        (tmp_path / "my_package" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_facts(["my_package.ops"])
    assert before == code_facts(["my_package.ops"])
    assert "imports" not in code_facts() and before.items() > code_facts().items()
    (tmp_path / "my_package" / "helpers.py").write_text("x = 1")
    assert code_facts(["my_package.ops"])["imports"] != before["imports"]
    assert code_facts(["sys", "json"]) != before  # one of them has no file


def test_the_op_does_what_it_says(folder):
    check(config())
    image = tf.fill((2, 2, 3), tf.constant(10, tf.uint8))
    for probability, expected in ((0.0, 10), (1.0, 245)):
        made = pipe.parse(f"invert({probability})").host({"image": image, "seed": [0, 1]})
        assert set(made["image"].numpy().ravel()) == {expected}


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"imports": ("no_such_module",)}, "'no_such_module', which is no module here.*PYTHONPATH"),
        ({"imports": ("my-ops",)}, "must be a list of modules"),
        ({"imports": ("../my_ops",)}, "must be a list of modules"),
        ({"imports": ("/runs/my_ops.py",)}, "must be a list of modules"),
        ({"imports": 3}, "must be a list of modules"),
        ({"data__options": {"pixel": 12}}, "takes no option 'pixel', did you mean 'pixels'"),
        (
            {"evals": {"mean": {"kind": "nearest_mean", "options": {"power": 0.0}}}},
            "config.evals.mean.options: power must be above 0",
        ),
        ({"data__options": 3}, "config.data.options must be a dict"),
        ({"input__train_ops": f"invert(2)|{tiny.ANY_SIZE}"}, r"probability must be in \[0, 1\]"),
    ],
)
def test_mistakes(folder, changed, words):
    with pytest.raises(ValueError, match=words):
        check(config(**changed))


def test_a_module_that_is_wrong_inside_keeps_its_traceback(folder):
    (folder / "my_ops.py").write_text("import no_such_library")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        check(config())
    assert not issubclass(ModuleNotFoundError, ConfigError)
