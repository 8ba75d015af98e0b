"""What a check of `fusion benchmark gpu` has found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """good: whether it is as it must be; None for a figure that nothing is asked of, here at least."""

    good: bool | None
    what: str
    told: str

    def __str__(self) -> str:
        mark = {True: "pass", False: "FAIL", None: "figure"}[self.good]
        return f"{mark:<7}{self.what}: {self.told}"
