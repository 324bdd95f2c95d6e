"""Two runs in TensorBoard's HParams tab, by TensorBoard's own backend."""

from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import (
    api_pb2,
    backend_context,
    get_experiment,
    list_session_groups,
)

from vit_dist.monitoring import hparams
from vit_dist.monitoring.writer import make_writer

CONFIG = {"seed": 0, "optimizer": {"name": "adamw", "learning_rate": 1e-3}, "data": {"parts": None}}


def write(folder, *, rate, accuracy, done=True):
    config = {**CONFIG, "optimizer": {**CONFIG["optimizer"], "learning_rate": rate}}
    with make_writer(folder) as writer:
        writer.summary(0, lambda: hparams.session_start(config, devices={"replicas": 1}))
        writer.scalars(10, {"val/accuracy": accuracy - 0.1})
        writer.scalars(20, {"val/accuracy": accuracy})
        if done:
            writer.summary(20, hparams.session_end)


def opened(root):
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(root))
    provider = data_provider.MultiplexerDataProvider(multiplexer.Reload(), str(root))
    return backend_context.Context(base_plugin.TBContext(data_provider=provider))


def test_runs_are_compared_and_sorted(tmp_path):
    write(tmp_path / "slow", rate=1e-4, accuracy=0.5)
    write(tmp_path / "fast", rate=1e-3, accuracy=0.7, done=False)
    context, request = opened(tmp_path), RequestContext()
    experiment = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest()).run()
    infos = {info.name: info for info in experiment.hparam_infos}
    # What differs comes first.
    assert experiment.hparam_infos[0].name == "optimizer.learning_rate"
    assert [name for name, info in infos.items() if info.differs] == ["optimizer.learning_rate"]
    assert set(infos) == {
        "seed", "optimizer.name", "optimizer.learning_rate", "data.parts", "replicas"
    }  # fmt: skip
    metric = api_pb2.MetricName(tag="val/accuracy")
    assert metric in [info.name for info in experiment.metric_infos]
    column = api_pb2.ColParams(metric=metric, order=api_pb2.ORDER_DESC)
    listing = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        col_params=[column],
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN],
    )
    groups = list_session_groups.Handler(request, context, "", listing).run().session_groups
    shown = [
        (group.hparams["optimizer.learning_rate"].number_value, group.sessions[0].status)
        for group in groups
    ]
    assert shown == [(1e-3, api_pb2.STATUS_UNKNOWN), (1e-4, api_pb2.STATUS_SUCCESS)]
