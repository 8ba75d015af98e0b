"""The result of a check of `fusion benchmark gpu`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """good: whether the check passed; None for a measurement without a target, at least on this machine."""

    good: bool | None
    what: str
    detail: str

    def __str__(self) -> str:
        mark = {True: "pass", False: "FAIL", None: "figure"}[self.good]
        return f"{mark:<7}{self.what}: {self.detail}"
