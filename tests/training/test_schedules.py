"""Learning-rate schedules against their formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import UserError
from fusion.training import Constant, Cosine

HORIZONS = st.integers(1, 5000)


def paper(update, warmup, horizon, floor):
    """SGDR's formula 5 with one period, eta_min = floor, eta_max = 1 (Loshchilov and Hutter, 2017), after the warm-up."""
    current, period = np.float64(update - warmup), np.float64(horizon - warmup)
    return floor + 0.5 * (1 - floor) * (1 + np.cos(current / period * np.pi))


@given(HORIZONS, st.floats(0, 1), st.floats(0, 0.9), st.data())
def test_cosine_is_the_closed_form_after_the_warm_up(horizon, floor, share, data):
    schedule = Cosine(warmup=share, floor=floor)
    warmup = schedule.warmup_updates(horizon)
    if warmup >= horizon:
        return
    update = data.draw(st.integers(warmup, horizon))
    assert schedule.factor(update, horizon) == pytest.approx(paper(update, warmup, horizon, floor), abs=1e-12)


@pytest.mark.parametrize("kind", [Constant, Cosine])
@given(horizon=st.integers(12, 500), warmup=st.integers(1, 10))
def test_warm_up_is_linear_from_the_first_update_and_reaches_the_peak(kind, horizon, warmup):
    factors = [kind(warmup=float(warmup)).factor(update, horizon) for update in range(warmup + 1)]
    assert factors[0] > 0
    assert factors[-1] == 1.0
    assert np.allclose(np.diff([0.0, *factors]), 1 / (warmup + 1), atol=1e-12)


@given(HORIZONS, st.floats(0, 1), st.integers(0, 10_000))
def test_floor_is_reached_at_the_horizon_and_held_beyond_it(horizon, floor, beyond):
    assert Cosine(floor=floor).factor(horizon + beyond, horizon) == pytest.approx(floor, abs=1e-12)


@given(HORIZONS, st.floats(0, 1), st.floats(0, 20))
def test_factor_stays_between_zero_and_the_peak(horizon, floor, warmup):
    factors = [Cosine(warmup=warmup, floor=floor).factor(update, horizon) for update in range(0, horizon + 2, max(1, horizon // 20))]
    assert all(0 <= factor <= 1 for factor in factors)


def test_cosine_falls_all_the_way():
    factors = [Cosine(warmup=3, floor=0.1).factor(update, 40) for update in range(3, 41)]
    assert all(a > b for a, b in pairwise(factors))


def test_constant_stays_at_the_peak():
    assert {Constant().factor(update, 10) for update in range(20)} == {1.0}


@pytest.mark.parametrize(
    ("warmup", "horizon", "updates"), [(0.1, 50, 5), (0.0, 50, 0), (0.5, 3, 2), (1.0, 50, 1), (5.0, 50, 5), (200.0, 50, 200)]
)
def test_warm_up_below_one_is_a_share_and_from_one_a_number_of_updates(warmup, horizon, updates):
    assert Cosine(warmup=warmup).warmup_updates(horizon) == updates


def test_a_warm_up_longer_than_the_training_never_passes_the_peak():
    factors = [Cosine(warmup=200).factor(update, 50) for update in range(60)]
    assert all(math.isfinite(f) and 0 < f <= 1 for f in factors)
    assert factors == sorted(factors)


def test_factor_depends_on_nothing_that_was_asked_before():
    schedule = Cosine(warmup=0.2, floor=0.05)
    there = [schedule.factor(update, 30) for update in range(31)]
    back = [schedule.factor(update, 30) for update in reversed(range(31))]
    assert there == back[::-1]


@pytest.mark.parametrize(
    "options", [{"warmup": -0.1}, {"floor": -0.01}, {"floor": 1.5}, {"warmup": math.nan}, {"warmup": math.inf}, {"floor": math.nan}]
)
def test_values_out_of_range_are_refused_with_what_was_expected(options):
    with pytest.raises(UserError, match="expected a") as caught:
        Cosine(**options)
    assert next(iter(options)) in str(caught.value)
