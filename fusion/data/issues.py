"""Issues of the data: samples that could not be used, each with file, row, id and reason; and notes on samples that were used."""

import csv
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from fusion.errors import UserError, nearest

MAX_CATEGORIES = 5
ACTIONS = ("drop", "error")


class Issue(NamedTuple):
    """One sample that was left out. row: line of the file, as the manifest's reader counts; None where it has none."""

    file: str
    row: int | None
    id: str
    reason: str


class DataIssues:
    """Collects issues of samples, or raises at the first.

    on_bad_sample: "drop" collects into `issues`; "error" makes the first `add` raise UserError. `notes` are sentences about samples that
    are used nevertheless; they never raise.

    >>> issues = DataIssues("drop")
    >>> issues.add("m.csv", 2, "a", "image missing: /data/a.png")
    >>> issues.add("m.csv", 3, "b", "image corrupt: truncated (/data/b.png)")
    >>> issues.add("m.csv", 7, "c", "image missing: /data/c.png")
    >>> issues.summary()
    '3 samples dropped: 2 image missing, 1 image corrupt; see data_issues.csv'
    """

    def __init__(self, on_bad_sample: Literal["drop", "error"] = "drop") -> None:
        if on_bad_sample not in ACTIONS:
            raise UserError(f"on_bad_sample is '{on_bad_sample}'. {nearest(on_bad_sample, ACTIONS)}")
        self.on_bad_sample = on_bad_sample
        self.dropped: list[Issue] = []
        self.notes: list[str] = []

    def add(self, file: str, row: int | None, id: str, reason: str) -> None:
        """Record one sample. Raises UserError, naming all four, where bad samples are errors."""
        issue = Issue(file, row, id, reason)
        if self.on_bad_sample == "error":
            raise UserError(f"{place(issue)}: {reason}. Fix it, or drop such samples: --data.on_bad_sample=drop")
        self.dropped.append(issue)

    def note(self, text: str) -> None:
        """Record a sentence about data that is used nevertheless; duplicates are ignored."""
        if text not in self.notes:
            self.notes.append(text)

    def write(self, path: str | Path) -> None:
        """Write CSV with columns file, row, id, reason; the file is written atomically. Raises OSError where it can't be written."""
        folder, name = os.path.split(os.path.abspath(path))
        # In the destination's folder, because a rename is atomic only within one file system.
        part = os.path.join(folder, f".{name}-{os.getpid()}")
        try:
            # An id may hold invalid text, which is escaped.
            with open(part, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                csv.writer(file).writerows([Issue._fields, *self.dropped])
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part)
            raise

    def summary(self) -> str:
        """One line: the number of samples by category of reason, the most frequent first."""
        if not self.dropped:
            return "no samples dropped"
        categories = Counter(category(issue.reason) for issue in self.dropped).most_common()
        shown = [f"{count:,} {name}" for name, count in categories[:MAX_CATEGORIES]]
        if len(categories) > MAX_CATEGORIES:
            shown.append(f"{sum(count for _, count in categories[MAX_CATEGORIES:]):,} for other reasons")
        return f"{len(self.dropped):,} sample{'s' * (len(self.dropped) > 1)} dropped: {', '.join(shown)}; see data_issues.csv"


def category(reason: str) -> str:
    """The category of a reason: the part before its details, which follow a colon or stand in parentheses.

    >>> category("image corrupt: truncated (/data/b.png)"), category("not UTF-8 (byte 0xe9 in column text)")
    ('image corrupt', 'not UTF-8')
    """
    return reason.partition(":")[0].partition(" (")[0]


def place(issue: Issue) -> str:
    row = "" if issue.row is None else f", row {issue.row}"
    return f"{issue.file}{row}" + (f", id '{issue.id}'" if issue.id else "")
