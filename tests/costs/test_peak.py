"""The peak of a device: by the table, or measured."""

import numpy as np
import pytest

from vit_dist.costs.peak import MeasuredPeak, known_peak, measure_product


def test_accelerators_are_looked_up():
    peak = known_peak("NVIDIA A100-SXM4-40GB", "bfloat16")
    assert peak.flops == 312e12 and "by the table" in peak.source


@pytest.mark.parametrize(("name", "dtype"), [("Voodoo 2", "float32"), ("Tesla T4", "bfloat16")])
def test_nobody_guesses(name, dtype):
    peak = known_peak(name, dtype)
    assert peak.flops is None and "no MFU" in peak.source


def test_the_fastest_product_counts():
    times = iter([0.0, 3.0, 10.0, 12.0, 20.0, 25.0])
    assert measure_product(size=10, tries=3, clock=lambda: next(times)) == 2 * 10**3 / 2.0


def test_a_cpu_is_measured_and_shared_by_its_replicas():
    measured = MeasuredPeak(4, measure=lambda: 8e9)
    measured.wait()
    assert measured.peak().flops == 2e9 and "measured" in measured.peak().source


def test_a_peak_below_what_the_run_does_is_measured_again():
    found = iter([1e9, 6e9])
    measured = MeasuredPeak(1, measure=lambda: next(found))
    measured.wait()
    assert measured.peak(reached=0.9e9).flops == 1e9
    # Others had the processor: no MFU of 5 is told.
    again = measured.peak(reached=5e9)
    assert again.flops is None and "again" in again.source
    measured.wait()
    assert measured.peak(reached=5e9).flops == 6e9


def test_a_run_that_is_faster_than_the_product_has_no_mfu():
    """Measuring again and again would take the time of the steps."""
    found = []
    measured = MeasuredPeak(1, measure=lambda: found.append(1) or 1e9)
    for _ in range(4):
        measured.wait()
        assert measured.peak(reached=2e9).flops is None
    assert len(found) == 2 and "faster than NumPy's product" in measured.peak(reached=2e9).source
    assert measured.peak(reached=0.5e9).flops == 1e9


def test_a_real_product():
    flops = measure_product(size=64, tries=2)
    assert np.isfinite(flops) and flops > 1e6
