"""All that a step changes goes into a checkpoint and comes back, or nothing does."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support.stepping import assert_bits
from vit_dist.model.variants import vit_config
from vit_dist.model.vit import build_vit, named_weights
from vit_dist.training.checkpoint import Checkpointer, open_checkpoint
from vit_dist.training.optimizer import OptimizerOptions, make_optimizer
from vit_dist.training.state import INITIAL_LOSS_SCALE, TrainState


@pytest.fixture
def make_state():
    def make(*, seed=0, ema=True, precision="float32", optimizer="adamw", **options):
        config = vit_config(
            "mu/4", image_size=8, num_classes=5, width=8, mlp_dim=16, pool="tok", **options
        )
        models = [build_vit(config, seed=seed, precision=precision) for _ in range(1 + ema)]
        rule = make_optimizer(named_weights(models[0]), OptimizerOptions(name=optimizer))
        return TrainState(models[0], rule, *models[1:])

    return make


def disturb(state):
    """Every value its own, none as it was made."""
    for i, variable in enumerate(state.variables().values()):
        shape = tuple(variable.shape)
        draw = np.random.default_rng(i).standard_normal(shape)
        draw = np.round(1000 * draw) if "int" in str(variable.dtype) else draw
        variable.assign(draw.astype(str(getattr(variable.dtype, "name", variable.dtype))))
    return state


@pytest.mark.parametrize(
    "options", [{}, {"ema": False, "optimizer": "sgd"}, {"precision": "float16"}], ids=str
)
def test_the_state_comes_back_to_the_bit(tmp_path, make_state, options):
    arrays = disturb(make_state(**options)).to_arrays()
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(arrays, step=3, notes={})
    checkpointer.wait()
    found = open_checkpoint(str(tmp_path))
    assert_bits(found.arrays, arrays)
    other = make_state(seed=1, **options)
    assert any(np.any(v != arrays[n]) for n, v in other.to_arrays().items())
    other.from_arrays(found.arrays)
    assert_bits(other.to_arrays(), arrays)
    for name in ("step", "updates", "first_bad_step", "good_steps", "loss_scale"):
        assert arrays[name].shape == ()


def test_what_the_state_holds(make_state):
    state = make_state()
    names = set(named_weights(state.model))
    arrays = state.to_arrays()
    assert set(arrays) == {
        *(f"{part}/{name}" for part in ("model", "ema") for name in names),
        *(f"optimizer/{name}/{slot}" for name in names for slot in ("momentum", "velocity")),
        *("step", "updates", "first_bad_step", "good_steps", "loss_scale"),
    }
    assert (arrays["step"], arrays["first_bad_step"], arrays["loss_scale"]) == (0, -1, 1)
    assert make_state(precision="float16").loss_scale.numpy() == INITIAL_LOSS_SCALE
    assert state.eval_model is state.ema and make_state(ema=False).eval_model is not None


def test_the_average_begins_at_the_weights(make_state):
    state = make_state(ema=False)
    average = make_state(seed=1, ema=False).model
    started = TrainState(state.model, state.optimizer, average).to_arrays()
    for name in named_weights(state.model):
        np.testing.assert_array_equal(started[f"ema/{name}"], started[f"model/{name}"])


def test_arrays_are_a_copy(make_state):
    state = make_state()
    arrays = state.to_arrays()
    before = {name: value.copy() for name, value in arrays.items()}
    disturb(state)
    assert_bits(arrays, before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ema": False}, r"ema/\S+: not in the checkpoint.* and \d+ more"),
        ({"optimizer": "sgd"}, r"optimizer/\S+/velocity: not in the checkpoint"),
        ({"depth": 2}, "encoderblock_1/.*: only in the checkpoint"),
        ({"image_size": 16}, r"pos_embedding: \(1, 17, 8\) in the checkpoint, \(1, 5, 8\) in"),
    ],
)
def test_a_state_of_another_config(make_state, changed, message):
    size = {"image_size": changed.pop("image_size", 8)}
    config = vit_config(
        "mu/4", num_classes=5, width=8, mlp_dim=16, pool="tok", **size,
        **{k: v for k, v in changed.items() if k == "depth"},
    )  # fmt: skip
    models = [build_vit(config) for _ in range(1 + changed.get("ema", True))]
    rule = make_optimizer(
        named_weights(models[0]), OptimizerOptions(name=changed.get("optimizer", "adamw"))
    )
    arrays = TrainState(models[0], rule, *models[1:]).to_arrays()
    state = disturb(make_state())
    before = state.to_arrays()
    with pytest.raises(ValueError, match=message) as error:
        state.from_arrays(arrays)
    assert "config.init_from to take over the weights only" in str(error.value)
    assert_bits(state.to_arrays(), before)


def test_every_replica_gets_the_state():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    config = vit_config("mu/4", image_size=8, num_classes=5, width=8, mlp_dim=16)
    with strategy.scope():
        model = build_vit(config)
        state = TrainState(model, make_optimizer(named_weights(model)))
    arrays = {n: np.full_like(v, i) for i, (n, v) in enumerate(state.to_arrays().items())}
    state.from_arrays(arrays)
    for name, variable in state.variables().items():
        value = variable if isinstance(variable, tf.Variable) else variable.value
        for local in strategy.experimental_local_results(value):
            np.testing.assert_array_equal(local.numpy(), arrays[name])
