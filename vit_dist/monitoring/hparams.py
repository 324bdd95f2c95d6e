"""What TensorBoard's HParams tab shows of a run: its config, beside its last metrics.

The tab compares runs: a column for each key of the config, those that differ from run to run first,
and one for each curve, by which runs can be sorted.
"""

import json
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.summary import session_end_pb, session_start_pb

from vit_dist.monitoring.history import flatten


def session_start(config: Mapping[str, Any], *, devices: Mapping[str, Any]) -> summary_pb2.Summary:
    """The beginning of a run.

    Args:
      config: as JSON values.
      devices: what else tells runs apart, such as the number of replicas.
    """
    values = {**flatten(config), **devices}
    # The plugin takes bool, numbers and text. None is text as well: a column has one type, and a
    # key that is None in one run may be a number in another, which then is text too.
    plain = {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in values.items()
    }
    return session_start_pb(plain)


def session_end() -> summary_pb2.Summary:
    """The end of a run that is done; one that stopped or broke may be resumed, and has none."""
    # TensorBoard keeps the first end that it reads, so an earlier one could not be taken back.
    return session_end_pb(api_pb2.STATUS_SUCCESS)
