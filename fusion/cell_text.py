"""The canonical text of a cell: the same for equal values, whichever file, column or argument they come from."""

import re
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

PYTHON_VALUES = (str, bool, int, float, Decimal, date, time, timedelta)  # pandas' times are datetimes, which are dates
VALUES = (*PYTHON_VALUES, np.bool_, np.integer, np.floating, np.datetime64, np.timedelta64)  # no complex numbers, bytes or structures
MAY_BE_NAN = (float, np.floating, np.datetime64, np.timedelta64, Decimal)
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # as float() accepts it, except 1_000, nan and inf
WHOLE = re.compile(r"(-?[0-9]+)\.0+")
DURATION = re.compile(r"(-?[0-9]+ days) ([+]?[0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?")
TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}[ T])?([0-9]{2}:[0-9]{2}:[0-9]{2})(\.[0-9]+)?([+-][0-9]{2}:[0-9]{2}|Z)?")
FIRST = frozenset("-0123456789")  # the first characters of numbers and times


def cell_text(cell: Any) -> str | None:
    """The text of a value, None for a null.

    Booleans are True and False. A whole number has no .0; other floats have the fewest digits that identify them at their own precision.
    A time is written as pandas writes it to CSV (with a space where ISO 8601 has a T, and +00:00 for its Z), without zeros at the end of
    its fraction; midnight is the date alone, and a duration of whole days the days alone. Text that is entirely such a number or time is
    written in the same way, because a CSV file contains only text; any other text is unchanged.

    >>> [cell_text(cell) for cell in ("3", 3, 3.0, "3.0", "v3.0", 0.5, np.float32(0.1), True, "true", None, float("nan"), "nan")]
    ['3', '3', '3', '3', 'v3.0', '0.5', '0.1', 'True', 'true', None, None, 'nan']
    >>> [cell_text(np.datetime64(cell)) for cell in ("2024-01-31", "2024-01-31T00:00:00.000", "2024-01-31T10:00:00.500")]
    ['2024-01-31', '2024-01-31', '2024-01-31 10:00:00.5']
    """
    if is_null(cell):
        return None
    if isinstance(cell, timedelta | np.timedelta64):
        exact = cell.to_timedelta64() if hasattr(cell, "to_timedelta64") else cell  # pandas' has nanoseconds, which NumPy would drop
        return duration_text(int(np.timedelta64(exact, "ns").astype(np.int64)))
    text = str(cell)
    return canonical(text.replace("T", " ") if isinstance(cell, np.datetime64) else text)


def duration_text(ns: int) -> str:
    """A duration as pandas writes it to CSV, without zeros at the end of its fraction; whole days alone, as pandas writes a column of them.

    >>> duration_text(1_500_000_000), duration_text(-1_000_000_000), duration_text(2 * 86_400 * 10**9)
    ('0 days 00:00:01.5', '-1 days +23:59:59', '2 days')
    """
    days, rest = divmod(ns, 86_400 * 10**9)
    if not rest:
        return f"{days} days"
    seconds, fraction = divmod(rest, 10**9)
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}" + (f".{fraction:09}".rstrip("0") if fraction else "")
    return f"{days} days {'+' if days < 0 else ''}{clock}"


def is_null(cell: Any) -> bool:
    """Whether it is None, NaN, NaT or pandas' NA (recognised by its type's name, without importing pandas)."""
    if type(cell) is float or isinstance(cell, MAY_BE_NAN):
        return bool(cell != cell)
    return cell is None or type(cell).__name__ in ("NAType", "NaTType")


def canonical(text: str) -> str:
    """A number or time in its canonical spelling; any other text unchanged."""
    if not text or text[0] not in FIRST:
        return text
    if number := WHOLE.fullmatch(text):
        return "0" if number[1] == "-0" else number[1]
    if " days " in text and (duration := DURATION.fullmatch(text)):
        clock = duration[2] + (duration[3] or "").rstrip("0").rstrip(".")
        return duration[1] if clock in ("00:00:00", "+00:00:00") else f"{duration[1]} {clock}"
    if ":" in text and (moment := TIME.fullmatch(text)):
        day, clock, fraction, zone = (part or "" for part in moment.groups())
        day, zone = day.replace("T", " "), zone.replace("Z", "+00:00")
        fraction = fraction.rstrip("0").rstrip(".")
        return day.rstrip() if day and not zone and clock + fraction == "00:00:00" else day + clock + fraction + zone
    return text
