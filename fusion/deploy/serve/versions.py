"""The versions that are served: the main one, canaries, a shadow; promotion, rollback and reload."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion.deploy.serve.answers import Answer, answers_of
from fusion.deploy.serve.batcher import Row
from fusion.deploy.serve.canary import RollbackLimits, Verdict, Watch
from fusion.deploy.serve.limits import Rejected
from fusion.deploy.serve.model import Loaded, Reads
from fusion.errors import UserError, first_line

Load = Callable[[str | Path], Loaded]


class Version:
    """A loaded model with its name and path.

    watch: the outcomes of its requests, None for a version that is not watched.
    """

    def __init__(self, loaded: Loaded, path: str | Path) -> None:
        self.model, self.name = loaded
        self.path = str(path)
        self.watch: Watch | None = None

    @property
    def inputs(self) -> Mapping[str, Reads]:
        return self.model.preprocessors

    @property
    def answers_known(self) -> list[str]:
        """The classes, labels or targets that it knows."""
        return list(self.model.names)

    @property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Its inputs, with their kinds and columns of a table."""
        return {name: (one.form, *(getattr(one, "names", ()) if one.form == "table" else ())) for name, one in self.inputs.items()}

    def row(self, values: Mapping[str, Any]) -> Row:
        """A sample's preprocessed inputs, from its raw values. Raises Rejected for what can't be read."""
        inputs = {}
        for name, preprocessor in self.inputs.items():
            value = values.get(name)
            if preprocessor.form == "table" and value is not None:
                value = {column: [cell] for column, cell in value.items()}
            try:
                cells = [None] if value is None else preprocessor.raw(value if isinstance(value, dict) else [value], name)
                unreadable: dict[int, UserError] = {}
                inputs[name] = preprocessor.batch(cells, unreadable)
            except UserError as error:
                raise Rejected(422, "invalid", f"{name}: {str(error).removeprefix('sample 0: ')}") from None
            if unreadable:
                raise Rejected(422, "unreadable", f"its {name} can't be read: {unreadable[0]}")
        return row_of(inputs)

    def answers(self, rows: Sequence[Row]) -> list[Answer | None]:
        """The answers of a batch; None for one that is not finite."""
        inputs = {name: one.concat([row.inputs[name] for row in rows]) for name, one in self.inputs.items()}
        predictions = self.model.gather([self.model.run(inputs)])
        return answers_of(predictions, self.model.confidence(predictions.values), self.name)

    def warm_up(self, batch_size: int) -> None:
        """Run the model, so that the first requests don't pay for it. Raises UserError for a model that can't run."""
        values = {"image": [np.zeros((8, 8, 3), dtype=np.uint8)], "text": ["a"]}
        try:
            cells = {name: one.raw(values[one.form], name) if one.form in values else [None] for name, one in self.inputs.items()}
            row = row_of({name: one.batch(cells[name], {}) for name, one in self.inputs.items()})
            for size in (1, batch_size):
                self.answers([row] * size)
        except Exception as error:  # whatever a model may raise
            raise UserError(f"{self.path} can't run: {type(error).__name__}: {first_line(error)}") from error


def row_of(inputs: Mapping[str, Any]) -> Row:
    """A sample's row, from a batch of one. Its length is that of its texts in tokens, and the number of its images."""
    wide = (getattr(one, field, None) for one in inputs.values() for field in ("ids", "image_mask"))
    return Row(inputs, sum(array.shape[1] for array in wide if array is not None))


@dataclass
class Versions:
    """Which version answers which request. Used by one thread, that of the event loop.

    main: answers whatever no canary does. canaries: with their shares of the requests. shadow: gets a copy of every request of the main
    version, and answers nobody. previous: the main version before the last promotion or reload. limits: of the watched ones.
    """

    main: Version
    limits: RollbackLimits = field(default_factory=RollbackLimits)
    canaries: list[tuple[Version, float]] = field(default_factory=list)
    shadow: Version | None = None
    previous: Version | None = None
    events: list[str] = field(default_factory=list)

    def route(self, id: str) -> Version:
        """The version that answers a request, by the hash of its id."""
        if not self.canaries:
            return self.main
        place = int.from_bytes(hashlib.blake2b(id.encode(errors="replace"), digest_size=8).digest()) / 2**64
        for version, share in self.canaries:
            if place < share:
                return version
            place -= share
        return self.main

    def compared_with(self, version: Version) -> Version | None:
        """The version that gets a copy of a request of this one: main's for a canary, the shadow for main."""
        return self.shadow if version is self.main else self.main

    def roles(self) -> dict[Version, str]:
        roles = {self.main: "main"} | {version: "canary" for version, _ in self.canaries}
        roles |= {self.shadow: "shadow"} if self.shadow else {}
        return roles | ({self.previous: "previous"} if self.previous else {})

    def check(self, version: Version, share: float = 0.0) -> None:
        """Raises UserError for a version that can't be served beside the others."""
        if version.reads != self.main.reads:
            reads = [", ".join(f"{name} ({' '.join(kind)})" for name, kind in one.reads.items()) for one in (version, self.main)]
            raise UserError(f"{version.path} reads {reads[0]}; this server's model reads {reads[1]}")
        known = set(self.main.answers_known)
        if known and version.answers_known and not known & set(version.answers_known):
            listed = [", ".join(one.answers_known[:3]) for one in (version, self.main)]
            raise UserError(
                f"{version.path} answers {listed[0]}, ...; this server's model answers {listed[1]}, ...: serve it on another port"
            )
        if version.name in {one.name for one, role in self.roles().items() if role != "previous"}:
            raise UserError(f"{version.path} is version {version.name}, which is already served")
        check_shares([*(one for _, one in self.canaries), share])

    def add_canary(self, version: Version, share: float) -> None:
        self.check(version, share)
        version.watch = Watch(self.limits)
        self.canaries.append((version, share))
        self.note(f"{version.name} is a canary of {share:.1%} of the requests".replace("%", " %"))

    def add_shadow(self, version: Version) -> None:
        self.check(version)
        version.watch = Watch(self.limits)
        self.shadow = version
        self.note(f"{version.name} is the shadow")

    def promote(self, name: str | None = None) -> None:
        """A canary or the shadow becomes the main version; it stays watched. Raises UserError."""
        candidates = [*(version for version, _ in self.canaries), *([self.shadow] if self.shadow else [])]
        found = [version for version in candidates if name in (None, version.name)]
        known = ", ".join(version.name for version in candidates) or "there is neither canary nor shadow"
        if len(found) != 1:
            raise UserError(f"which version is to be promoted? {known}" if found else f"can't promote {name or 'a version'}: {known}")
        self.drop(found[0])
        self.replace_main(found[0], "promoted")

    def replace_main(self, version: Version, how: str) -> None:
        """Another main version; the present one is kept for a rollback."""
        version.watch = Watch(self.limits)
        self.previous, self.main = self.main, version
        self.note(f"{version.name} is {how}: the main version; before: {self.previous.name}")

    def rollback(self) -> None:
        """End all canaries and the shadow; where there is none, return to the previous main version. Raises UserError where none is."""
        if self.canaries or self.shadow:
            names = [version.name for version, role in self.roles().items() if role in ("canary", "shadow")]
            self.canaries, self.shadow = [], None
            self.note(f"rolled back by command: {', '.join(names)}")
        elif self.previous:
            self.note(f"rolled back by command: {self.main.name}, to {self.previous.name}")
            self.main, self.previous = self.previous, None
        else:
            raise UserError("nothing to roll back: there is neither canary, shadow nor previous version")

    def judge(self, version: Version) -> Verdict | None:
        """Roll back a version whose requests exceed a limit; returns why."""
        verdict = version.watch.verdict() if version.watch else None
        role = self.roles().get(version)
        if verdict is None or role in (None, "previous") or (role == "main" and self.previous is None):
            return None
        if role == "main" and self.previous is not None:
            self.main, self.previous = self.previous, None
        else:
            self.drop(version)
        version.watch = None
        self.note(f"{version.name} is rolled back: {verdict.message}")
        return verdict

    def drop(self, version: Version) -> None:
        self.canaries = [(one, share) for one, share in self.canaries if one is not version]
        self.shadow = None if self.shadow is version else self.shadow

    def note(self, event: str) -> None:
        self.events = [*self.events[-99:], f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {event}"]

    def summary(self) -> dict[str, Any]:
        """The versions and events, for the control command."""
        shares = dict(self.canaries)
        listed = [
            {"version": version.name, "role": role, "path": version.path}
            | ({"share": shares[version]} if version in shares else {})
            | ({"watch": version.watch.summary()} if version.watch else {})
            for version, role in self.roles().items()
        ]
        return {"versions": listed, "events": self.events}


def check_shares(shares: Sequence[float]) -> None:
    """Raises UserError for canaries' shares of more than all requests."""
    if sum(shares) > 1 + 1e-9:
        listed = " + ".join(f"{share:.4g} %" for share in (100 * share for share in shares if share))
        raise UserError(f"the canaries get {listed} = {100 * sum(shares):.4g} % of the requests; expected at most 100 %")
