"""Watches a new version: whether its recent requests exceed a limit, so that it is rolled back."""

from collections import deque
from dataclasses import dataclass, fields
from typing import NamedTuple

from fusion.errors import UserError


@dataclass(frozen=True)
class RollbackLimits:
    """When a canary, a shadow, or a version that was just promoted is rolled back. Raises UserError for values out of range.

    Args:
        max_errors: a canary is rolled back when a larger share of its last requests failed.
        max_latency_ms: a canary is rolled back when the 95th percentile of its latency is higher.
        max_disagreement: a canary is rolled back when a larger share of its answers differ from the main version's.
        canary_window: how many of a canary's last requests count.
        canary_least: number of requests before which a canary is not judged.
    """

    max_errors: float = 0.02
    max_latency_ms: float = 2000.0
    max_disagreement: float = 0.25
    canary_window: int = 500
    canary_least: int = 50

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("max_errors", "max_disagreement") and not 0 <= value <= 1:
                raise UserError(f"--{field.name} is {value}; expected a share between 0 and 1")
            if field.name not in ("max_errors", "max_disagreement") and not value > 0:
                raise UserError(f"--{field.name} is {value}; expected a number above 0")
        if self.canary_least > self.canary_window:
            raise UserError(f"--canary_least is {self.canary_least}, above --canary_window, {self.canary_window}: none would be judged")


SLOW = 0.05  # share of the requests above the 95th percentile


class Verdict(NamedTuple):
    """Why a version is rolled back: one word, and a sentence."""

    reason: str
    message: str


class Shares:
    """The share of True among the last values."""

    def __init__(self, window: int) -> None:
        self.values: deque[bool] = deque(maxlen=window)
        self.true = 0

    def add(self, value: bool) -> None:
        if len(self.values) == self.values.maxlen:
            self.true -= self.values[0]
        self.values.append(value)
        self.true += value

    def __len__(self) -> int:
        return len(self.values)

    @property
    def share(self) -> float:
        return self.true / max(len(self.values), 1)


class Watch:
    """The outcomes of a version's last requests.

    >>> watch = Watch(RollbackLimits(max_errors=0.1, canary_window=20, canary_least=10))
    >>> for i in range(10):
    ...     watch.ended(failed=i >= 8, seconds=0.01)
    >>> watch.verdict()
    Verdict(reason='errors', message='20.0 % of its last 10 requests failed, limit 10 %')
    """

    def __init__(self, limits: RollbackLimits) -> None:
        self.limits = limits
        self.failed, self.slow, self.differing = (Shares(limits.canary_window) for _ in range(3))

    def ended(self, *, failed: bool, seconds: float | None = None) -> None:
        """Adds a request; of a copy that answers nobody, without seconds."""
        self.failed.add(failed)
        if seconds is not None:
            self.slow.add(seconds > self.limits.max_latency_ms / 1000)

    def compared(self, *, agreed: bool) -> None:
        """Adds a comparison with the main version's answer."""
        self.differing.add(not agreed)

    def verdict(self) -> Verdict | None:
        """Why the version exceeds a limit; None while it doesn't, or too few requests have ended."""
        limits = self.limits
        judged = {
            "errors": (self.failed, limits.max_errors, "requests failed"),
            "latency": (self.slow, SLOW, f"requests took longer than {limits.max_latency_ms:g} ms"),
            "disagreement": (self.differing, limits.max_disagreement, "answers differed from the main version's"),
        }
        for reason, (shares, limit, what) in judged.items():
            if len(shares) >= limits.canary_least and shares.share > limit:
                return Verdict(reason, f"{shares.share:.1%} of its last {len(shares)} {what}, limit {limit:.0%}".replace("%", " %"))
        return None

    def summary(self) -> dict[str, float]:
        """The shares so far, and of how many."""
        counts = {"requests": len(self.failed), "compared": len(self.differing)}
        return counts | {"errors": self.failed.share, "slow": self.slow.share, "disagreement": self.differing.share}
