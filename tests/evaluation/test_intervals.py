"""Intervals over a few seeds are Student's, and cover as often as they say."""

import math

import numpy as np
import pytest

from fusion.evaluation.intervals import t_interval, t_quantile


@pytest.mark.parametrize("degrees", [1, 2, 5, 30])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995])
def test_quantiles_are_those_of_scipy(probability, degrees):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-6)


def test_intervals_of_six_differences_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [t_interval(rng.normal(0.01, 0.02, 6).tolist()) for _ in range(2000)]
    covered = sum(low <= 0.01 <= high for _, low, high in found) / len(found)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_a_single_value_has_no_interval():
    assert t_interval([0.5]) == (0.5, -math.inf, math.inf)
