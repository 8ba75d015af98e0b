"""Parametrised tests whose cases take seconds each: a few of them run by default, the others with the slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases of a parametrisation, all but `kept` marked as slow. Raises ValueError where one of `kept` is none of the cases."""
    listed = list(cases)
    for one in kept:
        listed.index(one)
    return [one if one in kept else pytest.param(*one if isinstance(one, tuple) else (one,), marks=pytest.mark.slow) for one in listed]
