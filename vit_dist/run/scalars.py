"""The scalars that a training logs beside those of its step: speed, memory, norms, examples."""

import tensorflow as tf

from vit_dist.cluster.hosts import device_kind, device_name, host_replicas
from vit_dist.costs.flops import train_flops
from vit_dist.costs.peak import MeasuredPeak, Peak, known_peak
from vit_dist.monitoring.log import detail
from vit_dist.monitoring.memory import Memory
from vit_dist.monitoring.meter import Meter
from vit_dist.run.options import RunOptions
from vit_dist.training.state import TrainState


class Scalars:
    """Makes the rows of a log step; its names are those of docs/monitoring.md.

    Args:
      options: of the run.
      state: its model, optimizer and moving average.
      strategy: its devices.
      meter: measures the run's speed.
    """

    def __init__(
        self,
        options: RunOptions,
        state: TrainState,
        strategy: tf.distribute.Strategy,
        meter: Meter,
    ):
        self._options, self._state, self._meter = options, state, meter
        kind = device_kind(strategy)
        # Weights that do not train cost no backward pass.
        self._flops = train_flops(options.model.network, trained=set(state.optimizer.variables))
        devices = [] if kind == "CPU" else tf.config.list_logical_devices(kind)
        self._memory = Memory([device.name for device in devices])
        self._measured: MeasuredPeak | None = None
        self._known = Peak(None, "")
        self._told = ""
        if kind == "CPU":
            self._measured = MeasuredPeak(len(host_replicas(strategy)))
        else:
            name, dtype = device_name(strategy), options.model.precision
            self._known = known_peak(name, dtype, options.monitor.devices)

    def peak(self, reached: float) -> Peak:
        """What one device can do, as far as is known; `reached` FLOP/s is what it does."""
        return self._measured.peak(reached) if self._measured else self._known

    def read(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The scalars at `step`.

        Args:
          step: the steps that have been done.
          metrics: of the step and the meter. "update_norm", which the step computes where it is
            asked for, is taken out of it.
        """
        limit = self._options.step.clip_norm
        found = {"data/examples_seen": float(step * self._options.input.batch_size)}
        if "update_norm" in metrics:
            found["optimizer/update_norm"] = metrics.pop("update_norm")
        if limit is not None:
            # What clipping leaves of it; NaN stays NaN.
            norm = metrics["grad_norm"]
            found["optimizer/grad_norm_clipped"] = limit if norm > limit else norm
        if self._state.ema is not None:
            found["optimizer/ema_distance"] = self._ema_distance()
        return {**found, **self._speed(metrics), **self._memory.read()}

    def _speed(self, metrics: dict[str, float]) -> dict[str, float]:
        rate = metrics["examples_per_second_per_device"] * self._flops
        found = {"speed/tflops_per_device": rate / 1e12}
        peak = self.peak(rate)
        if peak.flops is not None:
            found["speed/mfu"] = rate / peak.flops
        # Into the log of the run, with the number that MFU was divided by.
        if peak.source != self._told:
            detail("MFU: %s", peak.source)
        self._told = peak.source
        for kind, seconds in self._meter.seconds.items():
            found[f"speed/seconds_in_{kind}"] = seconds
        return found

    def _ema_distance(self) -> float:
        """Norm of the difference between the weights and their moving average."""
        ema = self._state.ema
        assert ema is not None
        # One variable after the other, so that only one difference is in memory at a time. At log
        # steps alone, outside of the step, whose program stays as it is.
        squares = [
            tf.reduce_sum(tf.square(tf.convert_to_tensor(w.value) - tf.convert_to_tensor(a.value)))
            for w, a in zip(self._state.model.weights, ema.weights, strict=True)
        ]
        return float(tf.sqrt(tf.add_n(squares)))
