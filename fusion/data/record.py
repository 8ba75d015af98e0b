"""The run's record of which sample is in which split; samples are matched by content when the table has changed since."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion.data.table import Table
from fusion.errors import UserError

FILE = "samples.parquet"
FIXED = {"split": pa.string(), "file": pa.string(), "row": pa.int64(), "id": pa.string(), "label": pa.uint64(), "other": pa.uint64()}
CELL, DIGEST = "input.", "digest."  # prefixes of an input's name


@dataclass
class Difference:
    """How a table differs from the recorded one. sentences: one for each kind of change. samples: whether inputs, labels, splits or the
    order of the rows differ (a new path of an unchanged image doesn't count). others: whether other columns differ."""

    sentences: list[str]
    samples: bool
    others: bool

    def __str__(self) -> str:
        return "; ".join(self.sentences)


class Record:
    """The rows of a run's manifests in order: the split of each, digests of its cells and of the files that they name.

    Args:
        columns: named as in FIXED, and for each input its name after "input." and "digest."; all of one length. label and input.*: digests
            of the cells, 0 for a missing one (a file by its path relative to the manifest's folder, so that both may be moved). other:
            digest of all other columns except the split. digest.*: digests of an input's files, "" for none or unreadable ones.
    """

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns

    @classmethod
    def of(cls, table: Table, digests: Mapping[str, Mapping[Any, str]] | None = None) -> "Record":
        """The record of a table. digests: of the files, by input and cell; None: those computed when the files were checked."""
        columns: dict[str, list] = {}
        for name, kind in table.kinds.items():
            columns[f"{CELL}{name}"] = hashed(table.local_cells(name))
            known = None if digests is None else digests.get(name, {})
            cells = table.inputs[name]
            columns[f"{DIGEST}{name}"] = [kind.digest(cell) if known is None else known.get(cell, "") for cell in cells]
        columns["label"] = hashed(table.labels)
        others = [table.groups, *(table.extra[name] for name in sorted(table.extra))]
        columns["other"] = hashed(list(map(repr, zip(*others, strict=True))))
        columns |= {"split": list(table.splits), "file": [Path(file).name for file in table.files]}
        columns |= {"row": list(table.rows), "id": list(table.ids)}
        return cls(columns)

    def __len__(self) -> int:
        return len(self.columns["row"])

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs."""
        return [name.removeprefix(CELL) for name in self.columns if name.startswith(CELL)]

    @property
    def content(self) -> tuple[str, ...]:
        """The columns that identify a sample by content: its inputs' cells and its label."""
        return (*(f"{CELL}{name}" for name in self.inputs), "label")

    @property
    def bytes_content(self) -> tuple[str, ...]:
        """The same, with digests of an input's files instead of their paths, where it has files."""
        names = []
        for name in self.inputs:
            column = f"{DIGEST}{name}"
            names.append(column if any(self.columns[column]) else f"{CELL}{name}")
        return (*names, "label")

    def write(self, folder: Path) -> None:
        schema = {name: FIXED.get(name, pa.uint64() if name.startswith(CELL) else pa.string()) for name in self.columns}
        pq.write_table(pa.table(self.columns, schema=pa.schema(schema)), folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """A run's record; None where the run has none. Raises UserError where it can't be read."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"can't read {path}, the run's record of its samples: {str(error).splitlines()[0]}") from error
        if not FIXED.keys() <= set(table.column_names):
            raise UserError(f"can't read {path}, the run's record of its samples: it was written by another version of fusion")
        return cls(table.to_pydict())

    def digest(self) -> str:
        """Digest of all that training, validation and test depend on: the rows in order, with their files."""
        digest = blake2b(digest_size=16)
        for name in ("split", *self.content, *(f"{DIGEST}{name}" for name in self.inputs)):
            for cell in self.columns[name]:
                digest.update(f"{cell}\n".encode())
        return digest.hexdigest()

    def match(self, now: "Record") -> list[int | None]:
        """For each position in `now`, the position of the same sample in this record, None for a new sample.

        First by content: equal inputs and label, each recorded sample used once; among several equal ones those with the same id, file and
        split are preferred. A moved or renamed image is matched by the digest of its file, where `now` has it. The remaining samples are
        matched by id, if ids are stable; then those that agree in all but one of the inputs and the label, where the match is unique on
        both sides.
        """
        matches: list[int | None] = [None] * len(now)
        left: Sequence[int] = range(len(self))
        left_now: Sequence[int] = range(len(now))
        # Equal samples may be in different splits: those that also share their other columns are matched first.
        given = (("file", "id"), ("file", "split"), ("split",), ("file",), ())
        equal = [((*content, *more), True) for content in (self.content, self.bytes_content) for more in given]
        all_but_one = [
            (*content[:out], *content[out + 1 :])
            for out in reversed(range(len(self.content)))
            for content in (self.content, self.bytes_content)
        ]
        similar = [(names, False) for names in (("id",), *all_but_one) if names != ("label",)]
        for names, may_repeat in [*equal, *similar]:
            if names == ("id",) and not self.ids_are_stable(now, matches):
                continue
            by_key, now_by_key = self.group_by(names, left), now.group_by(names, left_now)
            for key, positions in now_by_key.items():
                same = by_key.get(key, [])
                if may_repeat or len(positions) == len(same) == 1:
                    for i, other in zip(positions, same, strict=False):
                        matches[i] = other
            left_now = [i for i in left_now if matches[i] is None]
            taken = {i for i in matches if i is not None}
            left = [i for i in left if i not in taken]
        return matches

    def group_by(self, names: Sequence[str], positions: Sequence[int]) -> dict[Hashable, list[int]]:
        """These positions grouped by their cells in these columns, in order.

        Left out are samples without a meaningful key: those whose id is only their line, if "id" is one of the columns, and those with an
        empty cell. Inputs may be empty where the key has all of the content, or where all digests of inputs with files are there.
        """
        groups: dict[Hashable, list[int]] = defaultdict(list)
        content, inputs, by_bytes = self.content, self.content[:-1], self.bytes_content[:-1]
        count = len(inputs)
        digests = [k for k, name in enumerate(by_bytes) if name.startswith(DIGEST)]
        for i in positions:
            key = tuple(self.columns[name][i] for name in names)
            if names[: count + 1] == content:
                is_complete = all(key[count + 1 :])
            elif names == inputs:  # a sample may have no value for one of them
                is_complete = any(key)
            elif names[:count] == by_bytes:
                is_complete = all(key[k] for k in digests) and all(key[count:])
            else:
                is_complete = all(key)
            if is_complete and not ("id" in names and self.is_line(i)):
                groups[key].append(i)
        return groups

    def ids_are_stable(self, now: "Record", matches: Sequence[int | None]) -> bool:
        """Whether ids name the same samples in both records, judged by samples of equal content; false once a table was renumbered."""
        pairs = [(then, i) for i, then in enumerate(matches) if then is not None]
        same = sum(self.columns["id"][then] == now.columns["id"][i] for then, i in pairs)
        return bool(pairs) and same >= 0.95 * len(pairs)

    def is_line(self, i: int) -> bool:
        """Whether the id at this position is only its line in the file."""
        id, line = str(self.columns["id"][i]), str(self.columns["row"][i])
        return id == line or id.endswith(f"-{line}")

    def difference(
        self, now: "Record", found: Sequence[int | None] | None = None, *, images: bool = True, carved: bool = False
    ) -> Difference:
        """How `now` differs from this record. found: the result of `match`, if known. images: whether files of inputs are compared. carved:
        `now` has the splits that its table gives, from which this record's may be carved out.
        """
        matches = self.match(now) if found is None else found
        gone = sorted(set(range(len(self))) - set(matches))
        new = [i for i, then in enumerate(matches) if then is None]
        pairs = [(then, i) for i, then in enumerate(matches) if then is not None]

        def changed_in(name: str) -> list[int]:
            ours, theirs = self.columns[name], now.columns[name]
            return [i for then, i in pairs if ours[then] != theirs[i]]

        split, split_now = self.columns["split"], now.columns["split"]
        # A training sample that data.train_samples left out has no split in this record.
        given = set(split_now) if carved else {*split}
        moved = [i for then, i in pairs if split_now[i] not in (None, (split[then] if split[then] in given else "") or "train")]
        other, renamed, changed = [], [], []
        for name in self.inputs:
            digests, digests_now = self.columns[f"{DIGEST}{name}"], now.columns[f"{DIGEST}{name}"]
            same_file = {i for then, i in pairs if digests[then] and digests[then] == digests_now[i]}
            paths = changed_in(f"{CELL}{name}")
            other.append(([i for i in paths if i not in same_file], now, f"of another {name}"))
            renamed.append(([i for i in paths if i in same_file], now, f"of the same {name} under another path"))
            files = [i for i in changed_in(f"{DIGEST}{name}") if now.columns["split"][i]] if images else []
            changed.append((files, now, f"of a changed {name} file"))
        changes = [
            (new, now, "new"),
            (gone, self, "gone"),
            *other,
            (changed_in("label"), now, "of another label"),
            *changed,
            (moved, now, "in another split"),
        ]
        sentences = [counted(positions, of, what) for positions, of, what in changes if positions]
        order = [then for then, _ in pairs]
        if not sentences and order != sorted(order):
            sentences.append("the rows are in another order")
        samples, others = bool(sentences), changed_in("other")
        sentences += [counted(positions, of, what) for positions, of, what in renamed if positions]
        if others:
            sentences.append(counted(others, now, f"changed in columns other than {', '.join(self.inputs)} and label"))
        return Difference(sentences, samples, bool(others))


def counted(positions: Sequence[int], record: Record, what: str) -> str:
    """A sentence with the number of rows, and file and row of the first."""
    first = f"{record.columns['file'][positions[0]]}, row {record.columns['row'][positions[0]]}"
    return f"{len(positions):,} row{'s are' if len(positions) > 1 else ' is'} {what} ({first})"


def hashed(cells: Iterable[str | None]) -> list[int]:
    """A digest of each cell, 0 for None; computed once for each distinct cell."""
    known: dict[str | None, int] = {None: 0}
    digests = []
    for cell in cells:
        if cell not in known:
            assert cell is not None
            known[cell] = int.from_bytes(blake2b(cell.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        digests.append(known[cell])
    return digests
